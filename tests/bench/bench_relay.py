"""What a relay costs: a step's round trip and bulk data to a peer that nobody can connect to, against a direct way.

    python tests/bench/bench_relay.py [--steps 400] [--rounds 5] [--private]

Processes on loopback: a bootstrap peer is the relay, its rate so high that it doesn't matter; two targets serve an
echo, one listens, the other has a reservation. So the ways cost nothing, and what is left is what the relay and the
second TLS do. Every target takes its turn in each round. In a private swarm all of them are members.
"""

import argparse
import asyncio
import statistics
import sys
import time
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import uvloop
from common import judged, print_report

from swarm.client.processes import PeerProcess
from swarm.network import Node, NodeConfig
from swarm.private.arguments import add_credentials, load_credentials
from swarm.private.authority import Authority, utc_now
from swarm.private.certificates import Role
from swarm.private.credentials import Credentials
from swarm.protocol import InfoRequest
from swarm.transport import Stream, Transport
from swarm.transport.reservations import Reservations

STEP_BYTES = 4 * 576
BULK_BYTES = 1 << 20
NUM_BULK = 32
TIMEOUT_S = 30.0
TARGETS = {"added_ms": 1.0}


def main() -> None:
    """Measure, print a table and one JSON line; or be a target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="round trips per target and round (default: 400)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    parser.add_argument("--private", action="store_true", help="in a private swarm")
    parser.add_argument("--be", choices=("direct", "relay"), help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    add_credentials(parser)
    args = parser.parse_args()
    if args.be:
        uvloop.run(be_target(args.be, args.address, load_credentials(args)))
        return
    with TemporaryDirectory() as home:
        invited = invite(Path(home)) if args.private else {}
        rows = run(args, invited)
    report(rows, args)


def invite(home: Path) -> dict[str, str]:
    """Files of members of a new private swarm, by what each is for."""
    authority, now = Authority.create(home / "authority", "bench", utc_now()), utc_now()
    files = {}
    for name in ("relay", "direct", "hidden", "client"):
        role = Role.CLIENT if name == "client" else Role.SERVER
        files[name] = str(home / name)
        authority.credentials(name, role, expires_at=now + timedelta(days=1), now=now).save(files[name])
    return files


def run(args: argparse.Namespace, invited: dict[str, str]) -> list[dict[str, float]]:
    """Start the others, and measure."""
    shown = {name: ["--credentials", file] for name, file in invited.items()}
    options = ["--host", "127.0.0.1", "--relay-rate", "100000", *shown.get("relay", [])]
    with PeerProcess("swarm.bootstrap", options) as bootstrap:
        address = bootstrap.address()
        own = ["bench_relay", "--address", address]
        with (
            Target([*own, "--be", "direct", *shown.get("direct", [])]) as direct,
            Target([*own, "--be", "relay", *shown.get("hidden", [])]) as relayed,
        ):
            plain, hidden = (it.wait_for(r"READY (\S+) ?(\S*)", TIMEOUT_S) for it in (direct, relayed))
            credentials = Credentials.load(invited["client"]) if invited else None
            return uvloop.run(measure(address, plain[1], hidden[1], hidden[2], args, credentials))


class Target(PeerProcess):
    """This script as a child."""

    def __init__(self, args: list[str]):
        super().__init__(args[0], args[1:])


async def be_target(kind: str, address: str, credentials: Credentials | None) -> None:
    """Serve an echo until killed."""
    is_hidden = kind == "relay"
    config = NodeConfig(host="127.0.0.1", client_mode=is_hidden, initial_peers=(address,), credentials=credentials)
    listen = None if is_hidden else ("127.0.0.1", 0)
    async with await Node.start(config) as node, Transport(node, listen=listen) as transport:
        transport.serve("echo", echo)
        relays: tuple[str, ...] = ()
        if is_hidden:

            async def candidates() -> tuple[str, ...]:
                return await node.connected_peers()

            reservations = Reservations(transport, candidates)
            assert await reservations.start(TIMEOUT_S)
            relays = reservations.relays
        print("READY", node.peer_id, *relays, flush=True)
        await asyncio.Event().wait()


async def echo(stream: Stream) -> None:
    """Send small messages back; answer large ones with an empty one."""
    while True:
        message, body = await stream.receive()
        await stream.send(message, body if len(body) <= STEP_BYTES else b"")


async def measure(
    address: str,
    direct: str,
    hidden: str,
    relay: str,
    args: argparse.Namespace,
    credentials: Credentials | None,
) -> list[dict[str, float]]:
    """Per round and target: the median round trip of a step in ms, and MB/s."""
    config = NodeConfig(client_mode=True, initial_peers=(address,), credentials=credentials)
    rows = []
    async with await Node.start(config) as node, Transport(node) as transport:
        node.relays.learn(hidden, (relay,))
        for _ in range(args.rounds):
            for peer_id, carrier in ((direct, "direct"), (hidden, "relay")):
                async with await transport.open(peer_id, "echo", timeout_s=TIMEOUT_S) as stream:
                    assert stream.carrier == carrier
                    rows.append({"carrier": carrier, **await times(stream, args.steps)})
    return rows


async def times(stream: Stream, num_steps: int) -> dict[str, float]:
    """Of one stream."""
    body, steps = bytes(STEP_BYTES), []
    for _ in range(num_steps):
        started = time.perf_counter()
        await stream.send(InfoRequest(), body)
        await stream.receive(TIMEOUT_S)
        steps.append(time.perf_counter() - started)
    started = time.perf_counter()
    for _ in range(NUM_BULK):
        await stream.send(InfoRequest(), bytes(BULK_BYTES))
    for _ in range(NUM_BULK):
        await stream.receive(TIMEOUT_S)
    took_s = time.perf_counter() - started
    return {"step_ms": 1e3 * statistics.median(steps), "mb_per_s": NUM_BULK * BULK_BYTES / took_s / 1e6}


def report(rows: list[dict[str, float]], args: argparse.Namespace) -> None:
    """A table and one JSON line."""
    found = {}
    print(f"{'':>8}{'step ms':>10}{'MB/s':>8}")
    for carrier in ("direct", "relay"):
        own = [row for row in rows if row["carrier"] == carrier]
        found[carrier] = {key: round(statistics.median(row[key] for row in own), 3) for key in ("step_ms", "mb_per_s")}
        print(f"{carrier:>8}{found[carrier]['step_ms']:10}{found[carrier]['mb_per_s']:8.0f}")
    added_ms = round(found["relay"]["step_ms"] - found["direct"]["step_ms"], 3)
    targets = {"added_ms": judged(added_ms, "<=", TARGETS["added_ms"])}
    print_report("relay", targets, rounds=args.rounds, steps=args.steps, private=args.private, **found)


if __name__ == "__main__":
    sys.exit(main())
