"""Options that several commands take, worded and checked alike.

    add_initial_peers, add_checkpoint, add_threads, add_relay_rate (parser) ─► args ─► require_at_least, check_...

Light, since parsers are built before anything else is imported. It doesn't know what commands do with them.
"""

import argparse
from pathlib import Path

from swarm.errors import ConfigError, InvalidRequest

MBIT_BYTES = 1e6 / 8
MAX_RELAY_RATE = 1e6
MODEL = "embedded name, checkpoint directory or hub id (default: %(default)s)"
"""Help of whatever names a model."""


def add_initial_peers(
    parser: argparse.ArgumentParser, *, without: str = "required, unless the credentials name some"
) -> None:
    """Add --initial-peers.

    Args:
        parser: of the command.
        without: what it means to leave it out.
    """
    parser.add_argument(
        "--initial-peers",
        nargs="+",
        metavar="ADDR",
        default=[],
        help=f"full addresses of any peers of the swarm ({without})",
    )


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add --revision and --cache-dir."""
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id (default: main)")
    parser.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        help="where converted and downloaded files are kept (default: $SWARM_CACHE or ~/.cache/swarm)",
    )


def add_threads(parser: argparse.ArgumentParser, *, what: str = "the local part") -> None:
    """Add --threads: for `what`."""
    parser.add_argument("--threads", type=int, metavar="N", help=f"CPU threads for {what} (default: torch's choice)")


def add_relay_rate(parser: argparse.ArgumentParser) -> None:
    """Add --relay-rate, in Mbit/s."""
    parser.add_argument(
        "--relay-rate",
        type=float,
        default=100.0,
        metavar="MBIT/S",
        help="what to carry to and from servers that nobody can connect to; 0 carries nothing",
    )


def check_relay_rate(args: argparse.Namespace) -> None:
    """Refuse rates that are none.

    Raises:
        ConfigError: names the limits.
    """
    if not 0 <= args.relay_rate <= MAX_RELAY_RATE:
        raise ConfigError(f"--relay-rate {args.relay_rate:g}, range 0..{MAX_RELAY_RATE:g} Mbit/s")


def require_at_least(args: argparse.Namespace, least: int, *names: str) -> None:
    """Refuse numbers that are too small; what was not given is none.

    Raises:
        InvalidRequest: names the option, its value and `least`.
    """
    for name in names:
        value = getattr(args, name)
        if value is not None and value < least:
            raise InvalidRequest(f"--{name.replace('_', '-')} is {value}, need at least {least}")
