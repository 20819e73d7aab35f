"""What a hop costs without its blocks: servers that push to each other over loopback, all in this process.

    python tests/bench/bench_hops.py [--steps 1000] [--hidden 576]

Each server has a transport, a handler and a device thread that returns its inputs. A step of one token goes up to the
first and comes back from the last of 1, 2 and 3 servers; the difference is the price of one more. Target: 1 ms.
"""

import argparse
import asyncio
import json
import platform
import queue
import statistics
import sys
import threading
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import torch
import uvloop

from swarm.network import Node, NodeConfig
from swarm.protocol import PUSH_SERVICE, SESSION_SERVICE
from swarm.server.work import Produced, ProducedRow, Work
from swarm.transport import Transport

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))
from fakes import Chain, FakeCache, FakeExecutor, make_handler, make_step

TARGET_MS = 1.0
NUM_SERVERS = 3


class EchoDevice(FakeExecutor):
    """Returns its inputs through a thread, as the real device does with its outputs."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.span.hidden_size = hidden_size
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[tuple[FakeCache, Work]] = queue.SimpleQueue()
        self._positions: dict[FakeCache, int] = {}
        threading.Thread(target=self._main, daemon=True).start()

    def submit(self, session: FakeCache, work: Work) -> None:
        self._queue.put((session, work))

    def _main(self) -> None:
        while True:
            self._loop.call_soon_threadsafe(self._produce, *self._queue.get())

    def _produce(self, session: FakeCache, work: Work) -> None:
        count, position = len(work.hidden_states), self._positions.get(session, 0)
        self._positions[session] = position + count
        session.listener.produced(
            Produced(
                step_id=work.step_id,
                rows=(ProducedRow(row=0, position=position, hidden_states=work.hidden_states.clone()),),
                num_tokens=count,
                queue_s=0.0,
                compute_s=0.0,
                batch_tokens=count,
            )
        )


async def run(num_steps: int, hidden_size: int) -> list[dict[str, Any]]:
    """Median and 99th percentile of a step, for each number of servers."""
    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(await Node.start(NodeConfig(host="127.0.0.1")))]
        peers = tuple(nodes[0].addresses)
        for _ in range(NUM_SERVERS - 1):
            node = await Node.start(NodeConfig(host="127.0.0.1", initial_peers=peers))
            nodes.append(await stack.enter_async_context(node))
        client_node = await stack.enter_async_context(
            await Node.start(NodeConfig(client_mode=True, initial_peers=peers))
        )
        transports, handlers = [], []
        for node in nodes:
            transport = await stack.enter_async_context(Transport(node, listen=("127.0.0.1", 0)))
            handler = make_handler(EchoDevice(hidden_size), transport)
            transport.serve(SESSION_SERVICE, handler.session)
            transport.serve(PUSH_SERVICE, handler.push)
            transports.append(transport)
            handlers.append(handler)
        client = await stack.enter_async_context(Transport(client_node))
        chain = Chain(client, transports, handlers)
        return [await measure(chain, count, num_steps, hidden_size) for count in range(1, NUM_SERVERS + 1)]


async def measure(chain: Chain, num_hops: int, num_steps: int, hidden_size: int) -> dict[str, Any]:
    """Steps of one token through the first `num_hops` servers."""
    hops = await chain.open_route(*range(num_hops), max_length=4096)
    token, times = torch.zeros(1, hidden_size), []
    for step in range(num_steps + 100):
        started = time.perf_counter()
        await hops[0].stream.send(*make_step(step, [token], positions=[step]))
        await hops[-1].stream.receive(10)
        times.append(time.perf_counter() - started)
    for hop in hops:
        await hop.stream.close()
    times = sorted(times[100:])
    return {
        "hops": num_hops,
        "median_ms": round(statistics.median(times) * 1e3, 3),
        "p99_ms": round(times[int(len(times) * 0.99)] * 1e3, 3),
    }


def main() -> None:
    """A table for people, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="steps per chain")
    parser.add_argument("--hidden", type=int, default=576, help="floats in a hidden state")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = uvloop.run(run(args.steps, args.hidden))
    print(f"{'hops':>5}{'median ms':>12}{'p99 ms':>10}")
    for row in rows:
        print(f"{row['hops']:5}{row['median_ms']:12.3f}{row['p99_ms']:10.3f}")
    per_hop_ms = round((rows[-1]["median_ms"] - rows[0]["median_ms"]) / (NUM_SERVERS - 1), 3)
    print(f"one hop more costs {per_hop_ms} ms, target at most {TARGET_MS:g} ms")
    settings = {"steps": args.steps, "hidden": args.hidden, "python": platform.python_version()}
    print(json.dumps({"bench": "hops", **settings, "per_hop_ms": per_hop_ms, "target_ms": TARGET_MS, "rows": rows}))


if __name__ == "__main__":
    main()
