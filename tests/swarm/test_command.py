"""How commands name themselves, and what their help shows."""

import argparse
import sys

import pytest

from swarm.command import HelpFormatter, program


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
