"""What the commands have in common: how they call themselves, how their help looks, and that signals end them.

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
_MODULES = {"demo": "client.demo"}


def program(verb: str) -> str:
    """How to call a command, as this process was called: "swarm server" or "python -m swarm.server"."""
    if Path(sys.argv[0]).stem == SCRIPT:
        return f"{SCRIPT} {verb}"
    return f"python -m swarm.{_MODULES.get(verb, verb)}"


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
