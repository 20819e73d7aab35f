"""How commands name themselves, what their help shows, and what signals do to them."""

import argparse
import asyncio
import os
import signal
import sys

import pytest
import uvloop

from swarm.command import HelpFormatter, exit_status, on_signals, program
from swarm.errors import InvalidRequest


@pytest.mark.parametrize(
    ("called", "expected"),
    [
        ("/opt/venv/bin/swarm", ("swarm server", "swarm demo")),
        ("C:\\venv\\swarm.exe", None),
        ("/src/server/__main__.py", ("python -m swarm.server", "python -m swarm.client.demo")),
        ("", ("python -m swarm.server", "python -m swarm.client.demo")),
    ],
)
def test_a_command_is_named_as_it_was_called(
    called: str, expected: tuple[str, str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the console script, or as a module; what people are told to type works either way."""
    monkeypatch.setattr(sys, "argv", [called])
    if expected is not None:
        assert (program("server"), program("demo")) == expected


def test_help_shows_defaults_that_say_something() -> None:
    """A number or a word, but neither None nor an empty list; one that the text has already isn't repeated."""
    parser = argparse.ArgumentParser(formatter_class=HelpFormatter)
    parser.add_argument("--seconds", default=3.5, help="how long")
    parser.add_argument("--file", help="where")
    parser.add_argument("--peers", nargs="*", default=(), help="who")
    parser.add_argument("--all", action="store_true", help="everything")
    parser.add_argument("--level", default="warning", help="how loud (default: %(default)s)")
    text = parser.format_help()
    assert "how long (default: 3.5)" in text
    assert text.count("default:") == 2


@pytest.mark.parametrize(
    ("outcome", "status", "said"),
    [
        (None, 0, ""),
        (1, 1, ""),
        (InvalidRequest("--rank is 0"), 2, "error: --rank is 0\n"),
        (FileNotFoundError(2, "No such file", "x"), 2, "error: [Errno 2] No such file: 'x'\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
    ],
)
def test_every_command_ends_with_the_same_statuses(outcome, status, said, capsys) -> None:
    """Done, whatever the work says, an error in one line, Ctrl-C; anything else is a bug and shows."""

    def work() -> int | None:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    assert exit_status(work) == status
    assert capsys.readouterr().err == said

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        exit_status(fail)


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_call_back_and_then_do_what_they_did_before(new_loop, number) -> None:
    """Ctrl-C in the same process interrupts again afterwards."""
    numbers: list[int] = []

    def earlier(number: int, frame: object) -> None:
        numbers.append(number)

    async def main() -> None:
        came = asyncio.Event()
        with on_signals(came.set):
            os.kill(os.getpid(), number)
            await came.wait()

    before = signal.signal(number, earlier)
    try:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(main())
        assert numbers == []
        os.kill(os.getpid(), number)
        assert numbers == [number]
    finally:
        signal.signal(number, before)
