"""How the rows of one step are read by paged attention on a CPU: bookkeeping over pages, no attention.

    PagedBatch --make_plan--> rows        decode rows in one run of pages
                              shared      decode rows with a prefix in common, which is read once for all of them
                              sequences   chunks, scattered pages, biases
                              gathered    many tiny decode rows

Made once per step and form for all layers. Why so, in figures: `cpu_paged_attention`.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from swarm.kernels.paged_attention import AttentionForm, PagedBatch, RowSpan

_MIN_GATHERED_ROWS = 3
_MIN_SHARED_KEYS = 512
"""Keys that needn't be read again, from which on a run that several rows share is worth calls of its own."""


class Row(NamedTuple):
    """A decode row whose visible keys are the slots [first_slot, first_slot + num_keys)."""

    row: int
    first_slot: int
    num_keys: int


class Shared(NamedTuple):
    """Decode rows whose visible keys lie in several runs of slots, some of them common to several rows."""

    calls: list[tuple[Tensor, int, int]]
    """Each run once: the rows that see it, its first slot, its number of keys."""
    places_NR: Tensor
    """The results of each row's runs among those of all calls; padded with the place behind the last one."""


class OneSequence(NamedTuple):
    """One sequence on its own: keys [first_key, length) from `first_slot` on or, scattered, in these slots."""

    span: RowSpan
    first_key: int
    first_slot: int
    slots: Tensor | None


class Gathered(NamedTuple):
    """Decode rows of several short sequences, padded to the same number of pages (with pages of their own)."""

    rows: Tensor
    pages: Tensor
    keys_BL: Tensor
    seen_BL: Tensor
    positions_B: Tensor


class Plan(NamedTuple):
    """The sequences of a step by the way they are read; results come in this order."""

    rows: list[Row]
    shared: Shared | None
    sequences: list[OneSequence]
    gathered: Gathered | None
    order_T: Tensor | None
    """Where each row of the step is among the results; None where they are in order."""


def make_plan(batch: PagedBatch, form: AttentionForm, max_gathered_keys: int, as_views: bool, can_merge: bool) -> Plan:
    rows: list[Row] = []
    sequences: list[OneSequence] = []
    firsts = [form.first_key(span.position) for span in batch.spans]
    short = {
        index
        for index, (span, first) in enumerate(zip(batch.spans, firsts, strict=True))
        if span.count == 1 and span.length - first <= max_gathered_keys
    }
    if len(short) < _MIN_GATHERED_ROWS:
        short = set()
    sharing = _sharing(batch, firsts, short) if can_merge else {}
    for index, (span, run, first) in enumerate(zip(batch.spans, batch.runs, firsts, strict=True)):
        if index in short or index in sharing:
            continue
        if run is not None and span.count == 1 and as_views:
            rows.append(Row(span.start, run + first, span.length - first))
        else:
            sequences.append(_sequence(span, run, first, batch.page_size))
    gathered = [batch.spans[index] for index in sorted(short)]
    order = [it.row for it in rows] + [batch.spans[index].start for index in sharing]
    for span in (*(it.span for it in sequences), *gathered):
        order += range(span.start, span.start + span.count)
    return Plan(
        rows,
        _shared([(batch.spans[index].start, runs) for index, runs in sharing.items()]) if sharing else None,
        sequences,
        _gathered(gathered, batch.page_size, form) if gathered else None,
        None if order == list(range(batch.num_rows)) else torch.tensor(order).argsort(),
    )


def _sharing(batch: PagedBatch, firsts: list[int], short: set[int]) -> dict[int, list[tuple[int, int]]]:
    """The sequences of one row that have a long run in common with others, and their runs."""
    runs = {
        index: _runs(span, firsts[index], batch.page_size)
        for index, span in enumerate(batch.spans)
        if span.count == 1 and batch.runs[index] is None and index not in short
    }
    owners = Counter(run for of_one in runs.values() for run in of_one)
    long = {run for run, count in owners.items() if (count - 1) * run[1] >= _MIN_SHARED_KEYS}
    return {index: of_one for index, of_one in runs.items() if not long.isdisjoint(of_one)}


def _runs(span: RowSpan, first_key: int, page_size: int) -> list[tuple[int, int]]:
    """(first slot, keys) of the runs of pages that hold keys [first_key, length)."""
    runs: list[tuple[int, int]] = []
    end = -1
    for index in range(first_key // page_size, -(-span.length // page_size)):
        first = max(first_key, index * page_size)
        count = min(span.length, (index + 1) * page_size) - first
        slot = span.pages[index] * page_size + first % page_size
        if slot == end:
            runs[-1] = (runs[-1][0], runs[-1][1] + count)
        else:
            runs.append((slot, count))
        end = slot + count
    return runs


def _shared(sharing: list[tuple[int, list[tuple[int, int]]]]) -> Shared:
    seen_by: dict[tuple[int, int], list[int]] = {}
    for row, runs in sharing:
        for run in runs:
            seen_by.setdefault(run, []).append(row)
    places: dict[int, list[int]] = {row: [] for row, _ in sharing}
    total = 0
    for rows in seen_by.values():
        for row in rows:
            places[row].append(total)
            total += 1
    width = max(map(len, places.values()))
    padded = [known + [total] * (width - len(known)) for known in places.values()]
    calls = [(torch.tensor(rows), first_slot, num_keys) for (first_slot, num_keys), rows in seen_by.items()]
    return Shared(calls, torch.tensor(padded))


def _sequence(span: RowSpan, run: int | None, first_key: int, page_size: int) -> OneSequence:
    if run is not None:
        return OneSequence(span, first_key, run + first_key, None)
    first_page = first_key // page_size
    pages = torch.tensor(list(span.pages[first_page : -(-span.length // page_size)]))
    slots = (pages[:, None] * page_size + torch.arange(page_size)).flatten()
    return OneSequence(span, first_key, 0, slots[first_key - first_page * page_size :][: span.length - first_key])


def _gathered(spans: Sequence[RowSpan], page_size: int, form: AttentionForm) -> Gathered:
    firsts = [form.first_key(span.position) for span in spans]
    tables = [
        list(span.pages[first // page_size : span.position // page_size + 1])
        for span, first in zip(spans, firsts, strict=True)
    ]
    width = max(map(len, tables))
    pages = torch.tensor([table + table[:1] * (width - len(table)) for table in tables])
    first_B1 = torch.tensor(firsts)[:, None]
    positions_B = torch.tensor([span.position for span in spans])
    keys_BL = first_B1 // page_size * page_size + torch.arange(width * page_size)
    seen_BL = (keys_BL >= first_B1) & (keys_BL <= positions_B[:, None])
    return Gathered(torch.tensor([span.start for span in spans]), pages, keys_BL, seen_BL, positions_B)
