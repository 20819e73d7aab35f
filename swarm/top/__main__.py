"""`python -m swarm.top --initial-peers ADDR` or `--metrics URL`: a swarm, or one server, live in this terminal.

    Census.look ─────► models ─► view.draw_swarm  ─┐
    scrape.fetch(URL) ─► Sample ─► view.draw_server ┴─► rich.Live, again and again; once with --once

Exit status: 0 after Ctrl-C or --once, 2 an error (one line on stderr), 130 interrupted before there was anything.
"""

import argparse
import asyncio
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING

from swarm import logs
from swarm.command import HelpFormatter, exit_status, on_signals, program
from swarm.errors import InvalidRequest
from swarm.options import add_initial_peers
from swarm.private.arguments import add_credentials, load_credentials, require_peers

if TYPE_CHECKING:
    from rich.console import RenderableType

    Views = AsyncGenerator[RenderableType, None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = build_parser().parse_args(argv)
    logs.configure(args)
    return exit_status(lambda: _run(args))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=program("top"),
        description="Watch a swarm, or one server by its metrics, in this terminal. Ctrl-C ends it.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add_initial_peers(parser, without="required for a swarm, unless the credentials name some")
    add_credentials(parser)
    add("--metrics", metavar="URL", help="watch one server: what it printed for --metrics-port")
    add("--period", type=float, default=2.0, metavar="S", help="how often to look, in seconds")
    add("--once", action="store_true", help="look once, print, and end")
    logs.add_arguments(parser)
    return parser


def _run(args: argparse.Namespace) -> None:
    import uvloop

    if bool(args.initial_peers or args.credentials) == bool(args.metrics):
        raise InvalidRequest("give either --initial-peers or --credentials for a swarm, or --metrics for a server")
    if not args.period >= 0.2:
        raise InvalidRequest(f"--period is {args.period:g} s, need at least 0.2")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_show(args))


async def _show(args: argparse.Namespace) -> None:
    """Draw until a signal comes, or once."""
    from rich.console import Console
    from rich.live import Live

    task = asyncio.current_task()
    assert task is not None
    views = _server_views(args) if args.metrics else _swarm_views(args)
    console = Console(highlight=False)
    with on_signals(task.cancel), suppress(asyncio.CancelledError):
        async with aclosing(views):
            if args.once:
                console.print(await anext(views))
                return
            with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
                async for view in views:
                    live.update(view, refresh=True)


async def _swarm_views(args: argparse.Namespace) -> "Views":
    """What a swarm looks like, again and again."""
    credentials = load_credentials(args)
    initial_peers = require_peers(args, credentials)
    from swarm.health.census import Census
    from swarm.health.state import Model
    from swarm.network import Node, NodeConfig
    from swarm.top.view import draw_swarm
    from swarm.transport import Transport

    config = NodeConfig(initial_peers=initial_peers, client_mode=True, credentials=credentials)
    async with await Node.start(config) as node, Transport(node) as transport:
        census, models = Census(node, transport, period_s=args.period), tuple[Model, ...]()
        try:
            while True:
                models = await census.look({}, models, wait_s=2.0 if args.once else min(1.0, args.period))
                yield draw_swarm(models, num_peers=node.num_peers)
                await asyncio.sleep(args.period)
        finally:
            await census.close()


async def _server_views(args: argparse.Namespace) -> "Views":
    """What a server looks like, again and again: rates need two looks."""
    from swarm.top.scrape import fetch
    from swarm.top.view import draw_server

    before = await fetch(args.metrics)
    while True:
        await asyncio.sleep(args.period)
        now = await fetch(args.metrics)
        yield draw_server(before, now, seconds=args.period)
        before = now


if __name__ == "__main__":
    sys.exit(main())
