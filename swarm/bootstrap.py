"""`python -m swarm.bootstrap`: a peer that serves no blocks and helps others to find and to reach each other.

arguments --> Node.start, help_others --> addresses, ONLINE --> (SIGTERM, SIGINT) --> close
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence

from swarm import logs
from swarm.command import HelpFormatter, exit_status, on_signals, program
from swarm.network import Node, NodeConfig
from swarm.options import MBIT_BYTES, add_initial_peers, add_relay_rate, check_relay_rate
from swarm.private.arguments import add_credentials, load_credentials
from swarm.transport import Transport
from swarm.transport.public import help_others
from swarm.transport.relay import BYTES_PER_S


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 after a clean stop, 2 an error, 130 interrupted before."""
    args = build_parser().parse_args(argv)
    logs.configure(args)
    return exit_status(lambda: _run(_config(args), args))


def _config(args: argparse.Namespace) -> NodeConfig:
    check_relay_rate(args)
    return NodeConfig(
        identity_path=args.identity,
        initial_peers=tuple(args.initial_peers),
        host=args.host,
        port=args.port,
        announce=tuple(args.announce),
        nat_port_map=args.nat_port_map,
        credentials=load_credentials(args),
    )


async def serve(config: NodeConfig, *, data_port: int = 0, relayed_bytes_per_s: float = BYTES_PER_S) -> None:
    """Be a peer until SIGTERM or SIGINT.

    Args:
        data_port: TCP port for direct connections; 0 picks a free one.
        relayed_bytes_per_s: what to carry for peers that nobody can connect to.
    """
    stopped = asyncio.Event()
    with on_signals(stopped.set):
        start = asyncio.ensure_future(Node.start(config))
        stop = asyncio.ensure_future(stopped.wait())
        await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not start.done():
            start.cancel()
            await asyncio.wait({start})
            return
        stop.cancel()
        async with start.result() as node, Transport(node, listen=(config.host, data_port)) as transport:
            help_others(transport, relayed_bytes_per_s=relayed_bytes_per_s)
            for address in node.addresses:
                print(address, flush=True)
            print(f"ONLINE {node.peer_id}; others join with --initial-peers {node.addresses[0]}", flush=True)
            await _until(stopped, node)
            print("stopping", flush=True)


async def _until(stopped: asyncio.Event, node: Node) -> None:
    """Wait for the end.

    Raises:
        AccessDenied: we are no member of this private swarm any more.
    """
    ends = [asyncio.ensure_future(event.wait()) for event in (stopped, node.denied)]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    for end in ends:
        end.cancel()
    if not stopped.is_set():
        node.check_access()


def _run(config: NodeConfig, args: argparse.Namespace) -> None:
    serving = serve(config, data_port=args.data_port, relayed_bytes_per_s=args.relay_rate * MBIT_BYTES)
    try:
        import uvloop
    except ImportError:
        asyncio.run(serving)
    else:
        uvloop.run(serving)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=program("bootstrap"),
        description="A peer that serves no blocks: the address by which others join a swarm.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--host", default="0.0.0.0", metavar="IP", help="address to listen on")
    parser.add_argument("--port", type=int, default=0, metavar="PORT", help="TCP port to listen on; 0 picks a free one")
    parser.add_argument(
        "--data-port", type=int, default=0, metavar="PORT", help="TCP port for direct connections; 0 picks a free one"
    )
    parser.add_argument(
        "--identity", metavar="FILE", help="identity file, made when missing; without it, a new identity"
    )
    parser.add_argument(
        "--announce",
        nargs="+",
        default=[],
        metavar="HOST",
        help="hosts or multiaddrs to announce in place of those found",
    )
    add_initial_peers(parser, without="none: a new swarm begins")
    add_credentials(parser)
    add_relay_rate(parser)
    parser.add_argument("--nat-port-map", action="store_true", help="ask the router for a port (UPnP, NAT-PMP)")
    logs.add_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
