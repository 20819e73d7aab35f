"""What the commands have in common: names, how help looks, what signals and errors do, and the exit status.

    main(argv) ─► exit_status(work) ─► 0 done | 2 an error, in one line | 130 Ctrl-C     else what `work` has returned

Whoever typed `swarm server` is told of `swarm client`; whoever typed `python -m swarm.server`, of `python -m
swarm.client`. Light: commands import this before anything else. It doesn't know what they do.
"""

import argparse
import asyncio
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SCRIPT = "swarm"
"""Name of the console script, see `swarm.cli`."""
ERROR = 2
INTERRUPTED = 130
_MODULES = {"demo": "client.demo"}


def program(verb: str) -> str:
    """How to call a command, as this process was called: "swarm server" or "python -m swarm.server"."""
    if Path(sys.argv[0]).stem == SCRIPT:
        return f"{SCRIPT} {verb}"
    return f"python -m swarm.{_MODULES.get(verb, verb)}"


def exit_status(work: Callable[[], int | None]) -> int:
    """Do a command's work; what goes wrong is told in one line on stderr.

    Returns:
        What the work returns, 0 for None; ERROR for an error of the swarm's or the system's, INTERRUPTED after Ctrl-C.
    """
    from swarm.errors import SwarmError

    try:
        return work() or 0
    except (SwarmError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return ERROR
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help that shows every default that says something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_silent = action.default is None or action.default is False or action.default in ("", (), [])
        return action.help if is_silent else super()._get_help_string(action)


@contextmanager
def on_signals(callback: Callable[[], object]) -> Iterator[None]:
    """Within this, SIGTERM and SIGINT call back on the running loop; afterwards they do what they did before."""
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        loop.add_signal_handler(number, callback)
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
