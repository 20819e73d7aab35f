"""`python -m swarm.health --initial-peers ADDR`: a page that shows how a swarm is.

    arguments ─► Page.start ─► ONLINE and its address ─► until SIGTERM, SIGINT ─► Page.close

Exit status: 0 after a clean stop, 2 an error (one line on stderr), 130 interrupted before it could stop so.
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swarm import logs
from swarm.checkpoint.cache import default_cache_dir
from swarm.checkpoint.embedded import DEFAULT_MODEL
from swarm.command import HelpFormatter, exit_status, on_signals, program
from swarm.errors import InvalidRequest
from swarm.options import add_initial_peers
from swarm.private.arguments import add_credentials, load_credentials, require_peers

if TYPE_CHECKING:
    from swarm.health.monitor import Settings

HISTORY = "health.sqlite3"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = build_parser().parse_args(argv)
    logs.configure(args)
    return exit_status(lambda: _run(args))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=program("health"),
        description="A page that shows how a swarm is: models, servers, coverage, latency, history, and a token that is"
        " sent through everything each minute. Any peer may run one, and several may run at once.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add_initial_peers(parser)
    add_credentials(parser)
    add("--host", default="127.0.0.1", metavar="IP", help="address to listen on; 0.0.0.0 shows the page to others")
    add("--port", type=int, default=8080, metavar="PORT", help="TCP port of the page; 0 picks a free one")
    add("--period", type=float, default=10.0, metavar="S", help="how often the swarm is looked at, in seconds")
    add(
        "--canary",
        nargs="+",
        metavar="MODEL",
        help="models that real tokens are sent through: embedded names, directories, hub ids; the others get made-up"
        f" hidden states (default: {DEFAULT_MODEL})",
    )
    add("--no-canary", action="store_true", help="send nothing through the swarm; saves memory")
    add("--history", type=Path, metavar="FILE", help="SQLite file of the last week; if not given, in ~/.cache/swarm")
    logs.add_arguments(parser)
    return parser


def _run(args: argparse.Namespace) -> None:
    import uvloop

    settings = _settings(args)
    if not args.period >= 0.5:
        raise InvalidRequest(f"--period is {args.period:g} s, need at least 0.5")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(args, settings))


async def _serve(args: argparse.Namespace, settings: "Settings") -> None:
    from rich.console import Console

    from swarm.health.serving import Page

    stop = asyncio.Event()
    history = args.history or default_cache_dir() / HISTORY
    with on_signals(stop.set):
        starting = asyncio.create_task(Page.start(settings, host=args.host, port=args.port, history=history))
        if await _first(stop, starting):
            starting.cancel()
            await asyncio.wait({starting})
            return
        page = await starting
        try:
            Console(highlight=False).print(f"[bold green]ONLINE[/] {page.url}", soft_wrap=True)
            watching = asyncio.create_task(page.wait())
            if not await _first(stop, watching):
                await watching
            watching.cancel()
        finally:
            await page.close()
    print("stopped", flush=True)


async def _first(stop: asyncio.Event, task: asyncio.Task[Any]) -> bool:
    """Wait for either; whether it was `stop` and the task still runs."""
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    return not task.done()


def _settings(args: argparse.Namespace) -> "Settings":
    credentials = load_credentials(args)
    initial_peers = require_peers(args, credentials)
    from swarm.health.monitor import Settings

    return Settings(
        initial_peers=initial_peers,
        credentials=credentials,
        period_s=args.period,
        checkpoints=tuple(args.canary or [DEFAULT_MODEL]),
        has_canary=not args.no_canary,
    )


if __name__ == "__main__":
    sys.exit(main())
