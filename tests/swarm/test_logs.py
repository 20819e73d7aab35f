"""Log lines for people and for programs."""

import argparse
import json
import logging
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from swarm.logs import JsonFormatter, add_arguments


@given(st.text(), st.text())
def test_a_record_is_one_line_of_json_whatever_it_holds(message: str, name: str) -> None:
    """Newlines, quotes and odd characters of strangers' names can't break a line or forge another."""
    record = logging.LogRecord(name, logging.WARNING, "", 0, "%s", (message,), None)
    line = JsonFormatter().format(record)
    assert line.splitlines() == [line] or "\n" not in line
    entry = json.loads(line)
    assert (entry["message"], entry["logger"], entry["level"]) == (message, name, "warning")
    assert entry["time"].endswith("Z")


def test_an_exception_keeps_its_traceback() -> None:
    """In a field of its own."""
    try:
        raise ValueError("no")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "failed", (), sys.exc_info())
    assert "ValueError: no" in json.loads(JsonFormatter().format(record))["traceback"]


def test_the_options_are_those_of_every_command() -> None:
    """Warnings as text, unless asked otherwise."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert vars(parser.parse_args([])) == {"log_level": "warning", "log_format": "text"}


def test_a_command_logs_json_to_stderr() -> None:
    """The whole way: a bootstrap peer that is told to."""
    code = (
        "import argparse, logging; from swarm import logs; p = argparse.ArgumentParser(); logs.add_arguments(p);"
        "logs.configure(p.parse_args(['--log-format', 'json', '--log-level', 'info']));"
        "logging.getLogger('a.b').info('hello'); logging.getLogger('a').debug('not this')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    [line] = done.stderr.splitlines()
    assert json.loads(line)["message"] == "hello" and not done.stdout
