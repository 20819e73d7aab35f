"""Round trips of activations between two processes: both carriers, a bare TCP echo, and hivemind's own stream RPC.

    python tests/bench/bench_transport.py [--seconds 1.5] [--rounds 3]

Each path has a server process of its own; the client is this process. N in flight are N streams (connections, for TCP)
with one message each under way. The paths take turns, in several rounds, and the median of the rounds is reported. CPU
per message is user + system time of all processes that take part: both Python ends and the libp2p daemons of the path.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import struct
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from swarm.network import Node, NodeConfig
from swarm.network.hive import P2P, PeerID, p2pd_pb2
from swarm.protocol import InfoRequest
from swarm.transport import EndOfStream, Stream, Transport

SIZES = (2304, 16384)
IN_FLIGHT = (1, 8, 64)
PATHS = ("tcp", "direct", "p2p", "hivemind")
TARGETS = {"direct_median_ms": 0.35, "hivemind_over_direct_cpu": 2.0}
Reply = p2pd_pb2.CallUnaryResponse  # a protobuf message that carries bytes
TICK_S = 1 / os.sysconf("SC_CLK_TCK")

Exchange = Callable[[bytes], Awaitable[None]]


@dataclass
class Route:
    """One way to a server: opens exchanges, and names the processes besides this one that work for it."""

    open: Callable[[], AbstractAsyncContextManager[Exchange]]
    pids: list[int]


# --- servers, each in a process of its own ---


class TcpEcho(asyncio.Protocol):
    """Sends back every byte."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


async def serve_tcp() -> str:
    """A bare echo on uvloop; says its port."""
    server = await asyncio.get_running_loop().create_server(TcpEcho, "127.0.0.1", 0)
    return json.dumps({"port": server.sockets[0].getsockname()[1], "daemon": None})


async def serve_swarm() -> str:
    """Our node and transport; says its address and daemon."""

    async def echo(stream: Stream) -> None:
        try:
            while True:
                message, body = await stream.receive()
                await stream.send(message, body)
        except EndOfStream:
            return

    node = await Node.start(NodeConfig(host="127.0.0.1"))
    transport = Transport(node, listen=("127.0.0.1", 0))
    transport.serve("echo", echo)
    await transport.start()
    keep.append(transport)
    return json.dumps({"address": node.addresses[0], "peer_id": node.peer_id, "daemon": node.daemon_pid})


async def serve_hivemind() -> str:
    """hivemind's P2P with a streaming handler; says its address and daemon."""

    async def echo(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            yield request

    p2p = await P2P.create(nat_port_map=False)
    await p2p.add_protobuf_handler("echo", echo, Reply, stream_input=True, stream_output=True)
    keep.append(p2p)
    address = str((await p2p.get_visible_maddrs())[0])
    return json.dumps({"address": address, "peer_id": str(p2p.peer_id), "daemon": p2p._child.pid})


SERVERS = {"tcp": serve_tcp, "direct": serve_swarm, "p2p": serve_swarm, "hivemind": serve_hivemind}
keep: list[Any] = []


async def serve(path: str) -> None:
    """Serve until the parent closes our input."""
    print(await SERVERS[path](), flush=True)
    await asyncio.to_thread(sys.stdin.read)


# --- clients, all in this process ---


class TcpClient(asyncio.Protocol):
    """One length-prefixed message under way at a time."""

    def connection_made(self, transport: Any) -> None:
        self.transport, self.missing = transport, 0

    def data_received(self, data: bytes) -> None:
        self.missing -= len(data)
        if not self.missing:
            self.done.set_result(None)

    async def exchange(self, body: bytes) -> None:
        """Send and wait until as much has come back."""
        self.done = asyncio.get_running_loop().create_future()
        data = struct.pack("!I", len(body)) + body
        self.missing = len(data)
        self.transport.write(data)
        await self.done


async def connect_tcp(info: dict[str, Any]) -> Route:
    """Bare TCP."""

    @asynccontextmanager
    async def open_exchange() -> AsyncIterator[Exchange]:
        loop = asyncio.get_running_loop()
        transport, protocol = await loop.create_connection(TcpClient, "127.0.0.1", info["port"])
        yield protocol.exchange
        transport.abort()

    return Route(open_exchange, [])


async def connect_swarm(info: dict[str, Any], carrier: str, stack: AsyncExitStack) -> Route:
    """Our transport on one carrier."""
    config = NodeConfig(client_mode=True, initial_peers=(info["address"],))
    node = await stack.enter_async_context(await Node.start(config))
    transport = await stack.enter_async_context(Transport(node))

    @asynccontextmanager
    async def open_exchange() -> AsyncIterator[Exchange]:
        stream = await transport.open(info["peer_id"], "echo", timeout_s=10, carrier=carrier)  # type: ignore[arg-type]

        async def exchange(body: bytes) -> None:
            await stream.send(InfoRequest(), body)
            await stream.receive()

        yield exchange
        await stream.close()

    return Route(open_exchange, [node.daemon_pid])


async def connect_hivemind(info: dict[str, Any], stack: AsyncExitStack) -> Route:
    """hivemind's streaming RPC."""
    p2p = await P2P.create(nat_port_map=False, initial_peers=[info["address"]], dht_mode="client")
    stack.push_async_callback(p2p.shutdown)

    @asynccontextmanager
    async def open_exchange() -> AsyncIterator[Exchange]:
        requests: asyncio.Queue[bytes] = asyncio.Queue()

        async def feed() -> AsyncIterator[Any]:
            while True:
                yield Reply(response=await requests.get())

        answers = await p2p.iterate_protobuf_handler(PeerID.from_base58(info["peer_id"]), "echo", feed(), Reply)

        async def exchange(body: bytes) -> None:
            requests.put_nowait(body)
            await anext(answers)

        yield exchange
        await answers.aclose()

    return Route(open_exchange, [p2p._child.pid])


# --- measuring ---


def cpu_s(pids: list[int]) -> float:
    """User and system time that processes, and this one, have used."""
    total = time.process_time()
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += (int(fields[11]) + int(fields[12])) * TICK_S
    return total


async def measure(path: Route, size: int, in_flight: int, seconds: float) -> tuple[list[float], float, float]:
    """(round trips in seconds, messages per second, CPU seconds per message)."""
    body = os.urandom(size)
    samples: list[float] = []

    async def work(exchange: Exchange, until: float) -> None:
        while (started := time.perf_counter()) < until:
            await exchange(body)
            samples.append(time.perf_counter() - started)

    async with AsyncExitStack() as stack:
        exchanges = [await stack.enter_async_context(path.open()) for _ in range(in_flight)]
        for exchange in exchanges:
            await exchange(body)
        cpu, started = cpu_s(path.pids), time.perf_counter()
        await asyncio.gather(*(work(exchange, started + seconds) for exchange in exchanges))
        elapsed, cpu = time.perf_counter() - started, cpu_s(path.pids) - cpu
    return samples, len(samples) / elapsed, cpu / len(samples)


@asynccontextmanager
async def server_process(path: str) -> AsyncIterator[tuple[int, dict[str, Any]]]:
    """A server of one path: its process id and what it says of itself."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, __file__, "--serve", path, stdin=pipe, stdout=pipe)
    assert process.stdout is not None
    try:
        yield process.pid, json.loads(await process.stdout.readline())
    finally:
        process.kill()
        await process.communicate()


async def run(seconds: float, rounds: int) -> list[dict[str, Any]]:
    """Measure all paths in turns; one row per path, size and number in flight."""
    results: dict[tuple[str, int, int], list[tuple[float, float, float, float]]] = {}
    async with AsyncExitStack() as stack:
        paths = {}
        for name in PATHS:
            pid, info = await stack.enter_async_context(server_process(name))
            if name == "tcp":
                path = await connect_tcp(info)
            elif name == "hivemind":
                path = await connect_hivemind(info, stack)
            else:
                path = await connect_swarm(info, name, stack)
            path.pids += [pid, *([info["daemon"]] if info["daemon"] else [])]
            paths[name] = path
        for _ in range(rounds):
            for size in SIZES:
                for in_flight in IN_FLIGHT:
                    for name, path in paths.items():
                        samples, rate, cpu = await measure(path, size, in_flight, seconds)
                        samples.sort()
                        figures = (statistics.median(samples), samples[int(0.99 * len(samples))], rate, cpu)
                        results.setdefault((name, size, in_flight), []).append(figures)
    rows = []
    for (name, size, in_flight), values in sorted(results.items(), key=lambda item: item[0][1:]):
        median, p99, rate, cpu = (statistics.median(column) for column in zip(*values, strict=True))
        rows.append(
            {
                "path": name,
                "bytes": size,
                "in_flight": in_flight,
                "median_ms": round(median * 1e3, 3),
                "p99_ms": round(p99 * 1e3, 3),
                "messages_per_s": round(rate),
                "cpu_us": round(cpu * 1e6, 1),
            }
        )
    return rows


def report(rows: list[dict[str, Any]], seconds: float, rounds: int) -> None:
    """A table for people, then one JSON line."""
    print(f"{'path':10}{'bytes':>7}{'in flight':>11}{'median ms':>11}{'p99 ms':>9}{'messages/s':>12}{'CPU us':>9}")
    for row in rows:
        print(
            f"{row['path']:10}{row['bytes']:7}{row['in_flight']:11}{row['median_ms']:11.3f}{row['p99_ms']:9.3f}"
            f"{row['messages_per_s']:12}{row['cpu_us']:9.1f}"
        )
    cpu = {(row["path"], row["bytes"], row["in_flight"]): row["cpu_us"] for row in rows}
    ratios = {
        f"{size} B, {in_flight} in flight": round(cpu["hivemind", size, in_flight] / cpu["direct", size, in_flight], 2)
        for size in SIZES
        for in_flight in IN_FLIGHT
    }
    direct = next(
        row["median_ms"] for row in rows if (row["path"], row["bytes"], row["in_flight"]) == ("direct", 2304, 1)
    )
    print(f"direct round trip of 2304 B: {direct} ms; CPU of hivemind's stream over direct: {ratios}")
    settings = {"seconds": seconds, "rounds": rounds, "python": platform.python_version(), "cores": os.cpu_count()}
    figures = {"direct_median_ms": direct, "hivemind_over_direct_cpu": ratios}
    print(json.dumps({"bench": "transport", **settings, "figures": figures, "targets": TARGETS, "rows": rows}))


def main() -> None:
    """Run the benchmark, or one of its servers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.5, help="time per measurement")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each path; medians are reported")
    parser.add_argument("--serve", choices=PATHS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        uvloop.run(serve(args.serve))
    else:
        report(uvloop.run(run(args.seconds, args.rounds)), args.seconds, args.rounds)


if __name__ == "__main__":
    main()
