"""`python -m swarm.server [MODEL]`: serve some blocks of a model.

Parses the command line, prints what an operator needs to see, turns errors into one line and signals into a clean stop.
"""

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from swarm import __version__, logs
from swarm.command import HelpFormatter, exit_status, on_signals, program
from swarm.errors import ConfigError
from swarm.options import (
    MBIT_BYTES,
    add_checkpoint,
    add_initial_peers,
    add_relay_rate,
    add_threads,
    check_relay_rate,
    require_at_least,
)
from swarm.private.arguments import add_credentials, load_credentials
from swarm.server.config import CacheSize, ServerConfig, parse_bytes
from swarm.types import BlockRange

if TYPE_CHECKING:
    from swarm.server.plan import Plan
    from swarm.server.screen import Screen
    from swarm.server.server import Server

DEFAULT_MODEL = "smollm2-135m-instruct"
MAX_DRAIN_S = 3600.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a server; returns the exit status: 0 after a clean stop, 2 after an error, 130 when interrupted before."""
    args = build_parser().parse_args(argv)
    logs.configure(args)
    return exit_status(lambda: _run(_config(args)))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=program("server"),
        description="Serve a range of a model's transformer blocks. Without --initial-peers a new swarm begins.",
        formatter_class=HelpFormatter,
    )
    add_initial_peers(parser, without="none: a new swarm begins")
    _add_blocks(parser)
    _add_memory(parser)
    _add_network(parser)
    _add_operation(parser)
    parser.add_argument("--version", action="version", version=f"swarm {__version__}")
    return parser


def _add_blocks(parser: argparse.ArgumentParser) -> None:
    """Which blocks of which model, and how they are run."""
    add = parser.add_argument
    add("model", nargs="?", default=DEFAULT_MODEL, help="embedded model, checkpoint directory or Hugging Face hub id")
    add(
        "--blocks",
        metavar="START:END",
        help="half-open range of blocks, 0:24 is 24 blocks; if not given, as many as fit into free memory, where the"
        " swarm gains most, and later others if it would gain more there",
    )
    add("--num-blocks", type=int, metavar="N", help="how many blocks to choose; as many as fit if not given")
    add(
        "--quantization",
        choices=("auto", "none", "int8", "nf4"),
        default="auto",
        help="auto: int8 on GPUs, none on CPU",
    )
    add(
        "--dtype",
        choices=("auto", "float32", "float16", "bfloat16"),
        default="auto",
        help="auto: 16 bits on GPUs, float32 on CPU",
    )
    add("--device", default="auto", help="cpu, cuda or cuda:N; auto: a GPU if there is one")
    add_threads(parser, what="the blocks")
    add_checkpoint(parser)
    add("--token", metavar="TOKEN", help="access token for the hub")


def _add_memory(parser: argparse.ArgumentParser) -> None:
    """What memory is for, and the adapters that are kept in it."""
    add = parser.add_argument
    add("--kv-cache", default="16384", metavar="SIZE", help="room for the KV cache in tokens (16384) or bytes (2GiB)")
    add(
        "--history-memory",
        default="1GiB",
        metavar="SIZE",
        help="memory for what was sent to the next servers, so that a lost one can be replaced without asking the"
        " client for everything again; 0 keeps nothing",
    )
    add("--adapters", nargs="+", default=(), metavar="ADAPTER", help="PEFT adapters to have from the start: directories"
        " or hub ids; clients may bring others")  # fmt: skip
    add("--max-adapter-memory", default="1GiB", metavar="SIZE", help="host memory for adapters; 0 takes none")
    add(
        "--training-memory",
        default="1GiB",
        metavar="SIZE",
        help="memory of the device for what training keeps until gradients come; what does not fit is computed again;"
        " 0 takes no training",
    )


def _add_network(parser: argparse.ArgumentParser) -> None:
    """How it is reached, and who it is."""
    add = parser.add_argument
    add("--host", default="0.0.0.0", metavar="IP", help="address to listen on")
    add("--port", type=int, default=0, metavar="PORT", help="TCP port for discovery and control; 0 picks a free one")
    add("--data-port", type=int, default=0, metavar="PORT", help="TCP port for direct connections; 0 picks a free one")
    add("--announce", nargs="+", default=(), metavar="ADDR", help="addresses to announce in place of those found")
    add(
        "--relay",
        choices=("auto", "always", "never"),
        default="auto",
        help="be reached through other peers, which carry connections but can't read them; auto: if peers that are"
        " asked now and then can't connect to us",
    )
    add_relay_rate(parser)
    add("--public-name", default="", metavar="NAME", help="name shown to others, at most 32 bytes")
    add(
        "--identity",
        type=Path,
        metavar="FILE",
        help="file with this peer's key, made when missing; a new identity if not given",
    )
    add_credentials(parser)


def _add_operation(parser: argparse.ArgumentParser) -> None:
    """How it ends, and what its owner sees of it."""
    add = parser.add_argument
    add(
        "--drain-timeout",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="how long a server that is told to stop waits for its sessions to move to others; 0 doesn't wait, and a"
        " second signal ends it at once",
    )
    add("--metrics-port", type=int, metavar="PORT", help="TCP port of metrics for Prometheus; none if not given")
    add("--metrics-host", default="127.0.0.1", metavar="IP", help="address on which the metrics can be read")
    logs.add_arguments(parser)


def _config(args: argparse.Namespace) -> ServerConfig:
    require_at_least(args, 1, "threads")
    if not 0 <= args.drain_timeout <= MAX_DRAIN_S:
        raise ConfigError(f"--drain-timeout {args.drain_timeout:g}, range 0..{MAX_DRAIN_S:g} seconds")
    require_at_least(args, 1, "num_blocks")
    check_relay_rate(args)
    if args.adapters and not parse_bytes(args.max_adapter_memory):
        raise ConfigError("--adapters needs memory, but --max-adapter-memory is 0")
    return ServerConfig(
        model=args.model,
        blocks=BlockRange.parse(args.blocks) if args.blocks else None,
        num_blocks=args.num_blocks,
        revision=args.revision,
        cache_dir=args.cache_dir,
        token=args.token,
        initial_peers=tuple(args.initial_peers),
        host=args.host,
        port=args.port,
        data_port=args.data_port,
        announce=tuple(args.announce),
        relay=args.relay,
        relayed_bytes_per_s=args.relay_rate * MBIT_BYTES,
        public_name=args.public_name,
        identity_path=args.identity,
        credentials=load_credentials(args),
        device=args.device,
        dtype=args.dtype,
        quantization=args.quantization,
        cache_size=CacheSize.parse(args.kv_cache),
        history_bytes=parse_bytes(args.history_memory),
        training_bytes=parse_bytes(args.training_memory),
        adapters=tuple(args.adapters),
        adapter_bytes=parse_bytes(args.max_adapter_memory),
        threads=args.threads,
        metrics_port=args.metrics_port,
        metrics_host=args.metrics_host,
        drain_timeout_s=args.drain_timeout,
    )


def _run(config: ServerConfig) -> None:
    import torch
    import uvloop

    if not torch.cuda.is_available():
        from swarm.server.lean import import_transformers_lean

        import_transformers_lean()
    from swarm.server.plan import make_plan

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    plan = make_plan(config)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(config, plan))


async def _serve(config: ServerConfig, plan: "Plan") -> None:
    from swarm.server.screen import Screen
    from swarm.server.server import Server

    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():  # the second time: at once
            os._exit(130)
        stop.set()

    with on_signals(on_signal):
        await _serve_until(stop, Server(config, plan), Screen(config, plan))


async def _serve_until(stop: asyncio.Event, server: "Server", screen: "Screen") -> None:
    from swarm.server.lean import settle_heap
    from swarm.server.loading import LoadingStopped

    async with server:
        joining = asyncio.create_task(server.join())
        if await _first(stop, joining):
            joining.cancel()
            return
        await joining
        relays = server.reach.relays if server.reach.is_relayed else None
        screen.joined(server.node.addresses, server.plan, server.reason, relays=relays)
        loading = asyncio.create_task(server.load(screen.loaded))
        if await _first(stop, loading):
            await server.leave()
            with suppress(LoadingStopped):
                await loading
            return
        await loading
        settle_heap()
        screen.online(server)
        await server.serve_until(stop, on_drain=screen.draining, on_moved=lambda: screen.online(server))
    screen.stopped()


async def _first(stop: asyncio.Event, task: asyncio.Task[None]) -> bool:
    """Wait for either; whether it was `stop` and the task still runs."""
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    return not task.done()


if __name__ == "__main__":
    sys.exit(main())
