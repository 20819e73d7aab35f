"""The command line: text on stdout, one line and status 2 for errors, 130 for Ctrl-C."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from swarm.client import auto
from swarm.client.__main__ import build_parser, main
from swarm.errors import PeerUnreachable
from tests.client.conftest import Pair
from tests.client.local_blocks import LocalBlockService

ADDRESS = "/ip4/127.0.0.1/tcp/1/p2p/12D3"


@pytest.fixture
def command(
    pair: Pair, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> list[str]:
    """Arguments that ask the tiny model through local blocks."""
    tokenizer.save_pretrained(pair.path)
    monkeypatch.setattr(auto, "connect_to", lambda *_, **__: pair.service)
    return [
        "--model",
        str(pair.path),
        "--initial-peers",
        ADDRESS,
        "--cache-dir",
        str(tmp_path),
        "--max-new-tokens",
        "6",
    ]


def test_an_answer_is_streamed(command: list[str], pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    """The text alone on stdout; route and rates on stderr when asked for; everything closed."""
    assert main(["w3 w4", *command]) == 0
    plain = capsys.readouterr()
    assert main(["w3 w4", "--show-route", *command]) == 0
    routed = capsys.readouterr()
    assert plain.out == routed.out and plain.out.split()
    assert plain.err == ""
    assert "route: 12D3local [0:3]" in routed.err
    assert "time to first token" in routed.err and "tokens/s" in routed.err
    assert pair.service.num_open == 0 and pair.service.is_closed


def test_json_reports_everything(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """One object instead of the text."""
    assert main(["w3 w4", "--json", *command]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_tokens"] == 6 and report["text"]
    assert report["route"] == [{"name": "12D3local", "peer_id": "12D3local", "blocks": "0:3"}]


def test_chat_reads_questions_until_the_end(
    command: list[str], pair: Pair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One session for the question of the command line and those of the input."""
    monkeypatch.setattr("sys.stdin", io.StringIO("w5 w6\nw7\n"))
    assert main(["w3 w4", "--chat", *command]) == 0
    assert capsys.readouterr().out.count("\n") == 3
    assert len(pair.service.sessions) == 1


def test_seeds_make_sampling_repeatable(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The same seed gives the same text; sampling options imply sampling."""
    texts = []
    for seed in ("1", "1", "2"):
        assert main(["w3 w4", "--temperature", "2.0", "--seed", seed, *command]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hello"], "--initial-peers"),
        (["--initial-peers", ADDRESS], "nothing to ask"),
        (["hello", "--initial-peers", ADDRESS, "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["hello", "--initial-peers", ADDRESS, "--temperature", "0"], "--temperature is 0.0"),
        (["hello", "--initial-peers", ADDRESS, "--top-p", "1.5"], "--top-p is 1.5"),
        (["hello", "--initial-peers", ADDRESS, "--threads", "0"], "--threads is 0"),
        (["hello", "--initial-peers", ADDRESS, "--model", "no-such-model"], "no-such-model"),
    ],
)
def test_errors_are_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """No traceback; the line names the argument and its value."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.strip().splitlines()
    assert line.startswith("error: ") and message in line


def test_a_missing_tokenizer_is_one_line(command: list[str], pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    """Some checkpoints are weights only."""
    files = [file for file in pair.path.iterdir() if "token" in file.name]
    for file in files:
        file.rename(file.with_suffix(".away"))
    try:
        assert main(["w3", *command]) == 2
    finally:
        for file in files:
            file.with_suffix(".away").rename(file)
    assert "no tokenizer" in capsys.readouterr().err
    assert pair.service.is_closed


def test_network_errors_are_one_line_too(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unreachable peer is no reason for a traceback."""

    def connect(*_: Any, **__: Any) -> LocalBlockService:
        raise PeerUnreachable(f"no peer answers at {ADDRESS}")

    monkeypatch.setattr(auto, "connect_to", connect)
    assert main(["w3", *command]) == 2
    assert capsys.readouterr().err == f"error: no peer answers at {ADDRESS}\n"


def test_ctrl_c_stops_cleanly(command: list[str], pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    """Status 130, no traceback, session and service closed."""
    steps = []

    def interrupt() -> None:
        steps.append(None)
        if len(steps) == 3:
            raise KeyboardInterrupt

    pair.service.before_step = interrupt
    assert main(["w3 w4", *command]) == 130
    assert "Traceback" not in capsys.readouterr().err
    assert pair.service.num_open == 0 and pair.service.is_closed


def test_help_tells_defaults_and_units(capsys: pytest.CaptureFixture[str]) -> None:
    """Each option has a help text, and those with a default say it."""
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "in tokens (default: 256)" in text and "(default: smollm2-135m-instruct)" in text
    assert all(action.help for action in build_parser()._actions)
