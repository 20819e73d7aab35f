"""A server under attack: 100,000 fuzzed messages and 1,000 hostile connections, while an honest client decodes.

    python tests/bench/bench_edge.py [--messages 100000] [--connections 1000] [--seconds 20]

The server is a real one (`swarm.server.server.Server`, eight blocks of the embedded model) in a process of its own. An
honest client in this process decodes token by token: --seconds in peace, then for as long as the attack lasts. The
attackers are processes of their own, as many peers as --attackers says, each from a loopback address of its own:

    messages     mutated steps, sessions, pushes, forwards on streams that any peer may open, on both carriers
    connections  half-open TCP, plain text, TLS without HELLO, trickled bytes, wrong tickets, floods of PING and OPEN

Afterwards the server must be the same process with the same daemon, hold no pages and no streams but the client's, and
have grown by a bounded amount. Attack and server share the machine. Attackers run at the lowest priority, since
elsewhere they would have processors of their own; what remains of their work is in the client's times.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE
from collections import Counter
from contextlib import AsyncExitStack, suppress
from typing import Any

import uvloop
from common import judged, percentile, print_report

SPAN = (0, 8)
HIDDEN = 576
CONTEXT = 512
MUTATIONS = 3
STREAMS = 32
"""That each attacker has open at a time."""
POLL_S = 2.0
RIGHT_SIZE = 0.05
"""Share of bodies as large as a step's: more would be use of the server, by which batches grow, rather than abuse."""
SETTLE_S = 20.0
KINDS = ("half-open", "plain text", "no HELLO", "trickle", "wrong ticket", "PING flood", "OPEN flood", "silent p2p")


# --- the server's process ---


async def serve() -> None:
    """A real server that answers questions about itself on stdin, one per line."""
    import torch

    from swarm import protocol
    from swarm.server.config import CacheSize, ServerConfig
    from swarm.server.plan import make_plan
    from swarm.server.server import Server
    from swarm.transport import stream as stream_module
    from swarm.types import BlockRange

    counts: Counter[str] = Counter()
    decode = protocol.decode

    def counted(data: Any) -> Any:
        counts["messages"] += 1
        return decode(data)

    stream_module.decode = counted  # type: ignore[attr-defined]
    config = ServerConfig(
        model="smollm2-135m-instruct",
        blocks=BlockRange(*SPAN),
        host="127.0.0.1",
        device="cpu",
        cache_size=CacheSize(tokens=16384),
    )
    torch.set_num_threads(1)  # of two cores: the other one is for everything else
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda loop, context: counts.update(["loop errors"]))
    async with Server(config, await asyncio.to_thread(make_plan, config)) as server:
        await server.join()
        await server.load()
        print(json.dumps({"address": server.node.addresses[0], "model": server.plan.checkpoint.digest}), flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            serving = server.serving
            assert serving is not None
            state = {
                "pages": await serving.executor.pages_in_use(),
                "sessions": server.tenancy.num_sessions,
                "streams": server.transport._handling.total(),
                "connections": server.transport.num_connections,
                "restarts": server.node.num_restarts,
                "rss_mb": round(int(_status("VmRSS").split()[0]) / 1024),
                "daemon_mb": round(int(_status("VmRSS", server.node.daemon_pid).split()[0]) / 1024),
                "fds": len(os.listdir("/proc/self/fd")),
                "messages": counts["messages"],
                "loop_errors": counts["loop errors"],
                "died": serving.executor.died.is_set(),
            }
            print(json.dumps(state), flush=True)


def _status(field: str, pid: int | str = "self") -> str:
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return next(line for line in file if line.startswith(field)).split(":")[1]


class Served:
    """The server's process, from here."""

    def __init__(self, process: asyncio.subprocess.Process, info: dict[str, Any]) -> None:
        self.process, self.address, self.model = process, info["address"], info["model"]

    @classmethod
    async def start(cls) -> "Served":
        """Start it; returns when it serves."""
        process = await asyncio.create_subprocess_exec(sys.executable, __file__, "--serve", stdin=PIPE, stdout=PIPE)
        assert process.stdout is not None
        return cls(process, json.loads(await process.stdout.readline()))

    async def state(self) -> dict[str, Any]:
        """What it says of itself; empty when it has died."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(ConnectionError, ValueError):
            self.process.stdin.write(b"\n")
            async with asyncio.timeout(30):
                return dict(json.loads(await self.process.stdout.readline()))
        return {}

    async def stop(self) -> None:
        """End it."""
        with suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()


# --- the attackers' processes ---


async def attack(address: str, model: str, *, connections: int, seed: int) -> None:
    """One hostile peer: both kinds of attack at once, from the first line on stdin to its end. Prints what it did."""
    from swarm.network import Node, NodeConfig
    from swarm.transport import Transport

    rng, done = random.Random(seed), Counter[str]()
    node_config = NodeConfig(client_mode=True, initial_peers=(address,))
    async with await Node.start(node_config) as node, Transport(node) as transport:
        peer_id, over = address.rpartition("/")[2], asyncio.Event()
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        async with asyncio.TaskGroup() as group:
            for _ in range(STREAMS):
                group.create_task(_send_fuzzed(transport, peer_id, model, over, rng, done))
            group.create_task(_connect_hostile(node, peer_id, connections, rng, done, source=f"127.0.1.{seed + 1}"))
            await asyncio.to_thread(sys.stdin.readline)
            over.set()
    print(json.dumps(done), flush=True)


async def _send_fuzzed(
    transport: Any, peer_id: str, model: str, over: asyncio.Event, rng: random.Random, done: "Counter[str]"
) -> None:
    """Mutated messages on streams that any peer may open; refusals set the pace."""
    from swarm.errors import PeerBusy, SwarmError

    seeds = _seeds(model)
    while not over.is_set():
        service = rng.choice(("session", "push", "info"))
        try:
            carrier = "direct" if rng.random() < 0.7 else "p2p"
            stream = await transport.open(peer_id, service, timeout_s=10, carrier=carrier)
            async with stream:
                await _talk_nonsense(stream, seeds[service], rng, done)
                await stream.receive(2)
        except PeerBusy as busy:
            done["refused"] += 1
            await asyncio.sleep(min(busy.retry_after_s, 1.0))
        except SwarmError:
            done["errors"] += 1
        except Exception as error:  # noqa: BLE001 - EndOfStream, or whatever the end of a hostile stream looks like here
            done[type(error).__name__] += 1


async def _talk_nonsense(stream: Any, seeds: list[bytes], rng: random.Random, done: "Counter[str]") -> None:
    """A few messages of one stream: the first perhaps valid, so that the others get further."""
    from tests.fuzz.mutations import mutate

    connection = stream._connection
    for index in range(rng.randrange(1, 6)):
        data = seeds[0] if index == 0 and rng.random() < 0.6 else rng.choice(seeds)
        if index or rng.random() < 0.5:
            for _ in range(rng.randrange(1, MUTATIONS)):
                data = mutate(data, seeds, rng)
        sizes = (HIDDEN * 4, HIDDEN * 8) if rng.random() < RIGHT_SIZE else (0, 4, HIDDEN * 4 - 4, HIDDEN * 8 + 4)
        body = rng.randbytes(rng.choice(sizes))
        if stream.is_over or not connection.send_now(stream._id, data[: 1 << 17], body):
            return
        done["messages"] += 1


def _seeds(model: str) -> dict[str, list[bytes]]:
    """Valid messages of each service, to be mutated."""
    from swarm import protocol
    from swarm.protocol import DType, TensorSpec

    opening = protocol.OpenSession(
        session_id=bytes(16),
        push_key=bytes(16),
        model=model,
        start=SPAN[0],
        end=SPAN[1],
        batch_size=1,
        max_length=CONTEXT,
        is_last=True,
    )
    steps = [
        protocol.Step(
            step_id=step,
            order=None,
            base=(0,),
            positions=(0,),
            num_tokens=(count,),
            outputs_from=(0,),
            hidden_states=TensorSpec(DType.FLOAT32, (count, HIDDEN)),
        )
        for step, count in ((0, 1), (1, 2))
    ]
    forward = protocol.Forward(epoch=0, peer_id="", push_key=bytes(16), held=(0,), as_of=-1, max_step_tokens=16)
    hello, probe = protocol.PushHello(push_key=bytes(16)), protocol.Probe(nonce=1)
    services: dict[str, list[protocol.Message]] = {
        "session": [opening, *steps, forward, probe],
        "push": [hello, *steps],
        "info": [protocol.InfoRequest()],
    }
    return {service: [protocol.encode(message) for message in messages] for service, messages in services.items()}


async def _connect_hostile(
    node: Any, peer_id: str, count: int, rng: random.Random, done: "Counter[str]", *, source: str
) -> None:
    """Hostile connections of all kinds, some at a time, spread over the attack."""
    from swarm.errors import SwarmError
    from swarm.protocol import PROTOCOL_VERSION
    from swarm.transport.offers import ask_offer

    offer = await ask_offer(node, peer_id, version=PROTOCOL_VERSION, timeout_s=10)
    places = asyncio.Semaphore(32)

    async def one(kind: str) -> None:
        async with places:
            done[kind] += 1
            with suppress(OSError, SwarmError, asyncio.TimeoutError, asyncio.IncompleteReadError):
                async with asyncio.timeout(8):
                    await _misbehave(kind, node, peer_id, offer, source, rng)

    async with asyncio.TaskGroup() as group:
        for index in range(count):
            group.create_task(one(KINDS[index % len(KINDS)]))


async def _misbehave(kind: str, node: Any, peer_id: str, offer: Any, source: str, rng: random.Random) -> None:
    """One hostile connection, held until the server ends it."""
    from swarm.network.tls import trusting_context
    from swarm.protocol import PROTOCOL_VERSION
    from swarm.transport.frames import HELLO_PREFIX, Kind, encode_frame

    hello = encode_frame(Kind.HELLO, 0, HELLO_PREFIX + PROTOCOL_VERSION.to_bytes(2, "big") + bytes(32))
    if kind == "silent p2p":
        reader, writer = await node.open_stream(peer_id, "/swarm/mux", 5)
    else:
        raw = socket.socket()
        raw.setblocking(False)
        raw.bind((source, 0))
        await asyncio.get_running_loop().sock_connect(raw, (offer.hosts[0], offer.port))
        secure = kind not in ("half-open", "plain text")
        options: dict[str, Any] = {"ssl": trusting_context(), "server_hostname": "swarm"} if secure else {}
        reader, writer = await asyncio.open_connection(sock=raw, **options)
    try:
        if kind == "plain text":
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        elif kind == "trickle":
            for byte in hello:
                writer.write(bytes([byte]))
                await asyncio.sleep(0.1)
        elif kind == "wrong ticket":
            writer.write(hello)
        elif kind == "PING flood":
            writer.write(encode_frame(Kind.PING, 0, bytes(8)) * 1000)
        elif kind == "OPEN flood":
            writer.write(hello + b"".join(encode_frame(Kind.OPEN, 2 * index + 1, b"session") for index in range(1000)))
        while await reader.read(1 << 16):
            pass
    finally:
        writer.transport.abort()


# --- the honest client ---


class Client:
    """Decodes in one session after the other, and keeps the time of each token."""

    def __init__(self, transport: Any, peer_id: str, model: str) -> None:
        self._transport, self._peer_id, self._model = transport, peer_id, model
        self.times: list[float] = []
        self.failures: list[str] = []

    async def decode_until(self, over: asyncio.Event) -> list[float]:
        """Times of tokens, in seconds, until `over`."""
        from swarm.errors import SwarmError

        self.times = []
        while not over.is_set():
            try:
                await self._one_session(over)
            except SwarmError as error:
                self.failures.append(f"{type(error).__name__}: {error}")
                await asyncio.sleep(0.1)
        return self.times

    async def _one_session(self, over: asyncio.Event) -> None:
        import torch

        from tests.server.fakes import HopClient

        hop = await HopClient.open(
            self._transport,
            self._peer_id,
            is_last=True,
            model=self._model,
            start=SPAN[0],
            end=SPAN[1],
            max_length=CONTEXT,
        )
        token = torch.zeros(1, HIDDEN)
        async with hop.stream:
            for position in range(CONTEXT):
                started = time.perf_counter()
                await hop.step(position, [token], positions=[position])
                await hop.results(position, [position + 1])
                self.times.append(time.perf_counter() - started)
                if over.is_set():
                    return


async def run(args: argparse.Namespace) -> None:
    """Peace, attack, aftermath; then the report."""
    from swarm.network import Node, NodeConfig
    from swarm.transport import Transport

    served = await Served.start()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(served.stop)
        node_config = NodeConfig(client_mode=True, initial_peers=(served.address,))
        node = await stack.enter_async_context(await Node.start(node_config))
        transport = await stack.enter_async_context(Transport(node))
        client = Client(transport, served.address.rpartition("/")[2], served.model)
        peace = await _for_seconds(client, args.seconds)
        before = await served.state()
        print(f"in peace: {_summary(peace)}; {before}", flush=True)
        started = time.monotonic()
        war, attackers = await _under_attack(client, served, args)
        elapsed_s = time.monotonic() - started
        print(f"attacked: {_summary(war)}; {dict(attackers)} in {elapsed_s:.0f} s", flush=True)
        after = await _settled(served)
        print(f"afterwards: {after}", flush=True)
        again = await _for_seconds(client, 3.0)
        print(f"in peace again: {_summary(again)}", flush=True)
    _report(args, peace, war, attackers, before, after, client.failures, elapsed_s)


async def _for_seconds(client: Client, seconds: float) -> list[float]:
    over = asyncio.Event()
    asyncio.get_running_loop().call_later(seconds, over.set)
    return await client.decode_until(over)


async def _under_attack(client: Client, served: Served, args: argparse.Namespace) -> tuple[list[float], "Counter[str]"]:
    """Attack until the server has read as many fuzzed messages as are wanted; the client's times, and what was done."""
    over, total = asyncio.Event(), Counter[str]()
    processes = []
    for index in range(args.attackers):
        command = ["nice", "-n", "19", sys.executable, __file__, "--attack", served.address, "--model", served.model]
        command += ["--seed", str(index), "--connections", str(-(-args.connections // args.attackers))]
        process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL)
        assert process.stdout is not None
        await process.stdout.readline()
        processes.append(process)
    decoding = asyncio.create_task(client.decode_until(over))
    start, num_read = (await served.state())["messages"], 0
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"\n")
    while num_read < args.messages and (state := await served.state()):
        num_read = state["messages"] - start - len(client.times)
        await asyncio.sleep(POLL_S)
    for process in processes:
        output, _ = await process.communicate(b"\n")
        if process.returncode == 0:
            total.update(json.loads(output.splitlines()[-1]))
        else:
            total["attackers that failed"] += 1
    over.set()
    total["messages read"] = num_read
    return await decoding, total


async def _settled(served: Served) -> dict[str, Any]:
    """The server's state once the client has nothing open there and the rest has had its time to go."""
    until = time.monotonic() + SETTLE_S
    while True:
        state = await served.state()
        if not state or time.monotonic() > until or not (state["pages"] or state["streams"] or state["sessions"]):
            return state
        await asyncio.sleep(0.5)


def _summary(times: list[float]) -> str:
    shown = ", ".join(f"p{share * 100:g} {percentile(times, share) * 1e3:.1f} ms" for share in (0.5, 0.9, 0.95, 0.99))
    return f"{len(times)} tokens, {shown}"


def _report(
    args: argparse.Namespace,
    peace: list[float],
    war: list[float],
    attackers: "Counter[str]",
    before: dict[str, Any],
    after: dict[str, Any],
    failures: list[str],
    elapsed_s: float,
) -> None:
    crashes = int(not after) + after.get("restarts", 1) + after.get("loop_errors", 1) + int(after.get("died", True))
    leaked = {key: after.get(key, -1) for key in ("pages", "sessions", "streams")}
    targets = {
        "fuzzed messages that the server has read": judged(attackers["messages read"], ">=", args.messages),
        "hostile connections": judged(sum(attackers[kind] for kind in KINDS), ">=", args.connections),
        "crashes": judged(crashes, "==", 0),
        "leaked pages": judged(leaked["pages"], "==", 0),
        "leaked sessions and streams": judged(leaked["sessions"] + leaked["streams"], "==", 0),
        "failures of the honest client": judged(len(failures), "==", 0),
        "p99 under attack over p99 in peace": judged(percentile(war, 0.99) / percentile(peace, 0.99), "<=", 2.0),
    }
    for failure in failures[:5]:
        print(f"the client saw {failure}")
    print_report(
        "edge",
        targets,
        seconds=round(elapsed_s, 1),
        cores=os.cpu_count(),
        attack=dict(attackers),
        peace_ms={"median": statistics.median(peace) * 1e3, "p99": percentile(peace, 0.99) * 1e3},
        attacked_ms={"median": statistics.median(war) * 1e3, "p99": percentile(war, 0.99) * 1e3},
        before=before,
        after=after,
    )


def main() -> None:
    """Run the benchmark, or one of its processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=100_000, help="fuzzed messages in all (default: 100000)")
    parser.add_argument("--connections", type=int, default=1_000, help="hostile connections in all (default: 1000)")
    parser.add_argument("--attackers", type=int, default=8, help="hostile peers (default: 8)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of peace before the attack (default: 20)")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--attack", help=argparse.SUPPRESS)
    parser.add_argument("--model", default="", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        uvloop.run(serve())
    elif args.attack:
        uvloop.run(attack(args.attack, args.model, connections=args.connections, seed=args.seed))
    else:
        uvloop.run(run(args))


if __name__ == "__main__":
    main()
