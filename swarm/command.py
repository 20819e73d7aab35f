"""What the commands have in common: how they call themselves, and how their help looks.

Whoever typed `swarm server` is told of `swarm client`; whoever typed `python -m swarm.server`, of `python -m
swarm.client`. Light: commands import this before anything else. It doesn't know what they do.
"""

import argparse
import sys
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
