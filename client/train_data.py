"""Rows to train on: chats or texts from a file, or a data set by name, checked before a step is made.

    chats.jsonl, texts.csv, org/data ─► datasets.load_dataset ─► check ─► (rows to train on, rows to evaluate on)

A row has `messages` (a chat), `prompt` and `completion`, or `text`; everything else is dropped. What a tokenizer makes
of it is the trainer's business.
"""

import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets

from swarm.errors import InvalidRequest

KINDS: tuple[tuple[str, ...], ...] = (("messages",), ("prompt", "completion"), ("text",))
"""Columns of each kind of row; the first kind that is there counts."""
_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
_CHECKED = 100
"""Rows of a data set that isn't JSONL that are looked at."""


def load_rows(
    data: str, *, split: str, num_eval: int, streaming: bool, seed: int, cache_dir: str | None = None
) -> tuple[Any, Any]:
    """Load a data set.

    Args:
        data: path of a file, or name of a data set.
        split: of a named one.
        num_eval: rows to keep back; 0 for none.
        streaming: read rows as they are used; those kept back are the first ones, then.
        seed: of which rows are kept back.
        cache_dir: where `datasets` keeps what it has read; its own place by default.

    Returns:
        Rows to train on, and rows to evaluate on or None.

    Raises:
        InvalidRequest: there is nothing, or a row is none of the known kinds; says which.
    """
    rows = _load(data, split, streaming=streaming, cache_dir=cache_dir)
    columns = _columns(data, rows)
    rows = rows.select_columns(list(columns))
    if not num_eval:
        return rows, None
    if streaming:
        return rows.skip(num_eval), rows.take(num_eval)
    if num_eval >= len(rows):
        raise InvalidRequest(f"--eval-rows is {num_eval}, {data} has {len(rows)} rows")
    parts = rows.train_test_split(test_size=num_eval, seed=seed)
    return parts["train"], parts["test"]


def _load(data: str, split: str, **options: Any) -> Any:
    path = Path(data).expanduser()
    builder = _BUILDERS.get(path.suffix)
    if builder is not None and not path.is_file():
        raise InvalidRequest(f"no file {data}")
    if path.suffix == ".jsonl":
        _check_lines(path)
    try:
        if path.is_file():
            if builder is None:
                raise InvalidRequest(f"{data} is none of {', '.join(_BUILDERS)}")
            return datasets.load_dataset(builder, data_files=str(path), split="train", **options)
        return datasets.load_dataset(data, split=split, **options)
    except (datasets.exceptions.DatasetsError, FileNotFoundError, ValueError, OSError) as error:
        raise InvalidRequest(f"{data} can't be read: {(str(error).splitlines() or ['?'])[0]}") from error


def _check_lines(path: Path) -> None:
    """Read a JSONL file once, and say in which line it is wrong.

    Raises:
        InvalidRequest: with the line.
    """
    num_rows, kind = 0, None
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InvalidRequest(f"{path}, line {number}: no JSON: {error}") from error
            found = _kind(row, f"{path}, line {number}")
            if kind is not None and found != kind:
                raise InvalidRequest(f"{path}, line {number}: has {' and '.join(found)}, others {' and '.join(kind)}")
            num_rows, kind = num_rows + 1, found
    if not num_rows:
        raise InvalidRequest(f"{path} has no rows")


def _columns(data: str, rows: Iterable[Any]) -> tuple[str, ...]:
    """The columns that are trained on."""
    first = list(itertools.islice(iter(rows), _CHECKED))
    if not first:
        raise InvalidRequest(f"{data} has no rows")
    kinds = [_kind(row, f"{data}, row {index}") for index, row in enumerate(first)]
    return kinds[0]


def _kind(row: Any, where: str) -> tuple[str, ...]:
    """Which kind of row it is.

    Raises:
        InvalidRequest: none.
    """
    if not isinstance(row, Mapping):
        raise InvalidRequest(f"{where}: {type(row).__name__}, expected an object")
    kind = next((it for it in KINDS if all(row.get(column) is not None for column in it)), None)
    if kind is None:
        has = ", ".join(map(str, row)) or "nothing"
        raise InvalidRequest(f"{where}: has {has}; expected messages, prompt and completion, or text")
    for column in kind:
        value = row[column]
        if column == "messages" or not isinstance(value, str):
            _check_messages(value, f"{where}: {column}")
    return kind


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest(f"{where} is {type(messages).__name__}, expected a list of messages")
    for index, message in enumerate(messages):
        is_fine = isinstance(message, Mapping) and isinstance(message.get("role"), str)
        if not is_fine or not isinstance(message.get("content"), str):
            raise InvalidRequest(f"{where}, message {index}: expected role and content, both strings")
