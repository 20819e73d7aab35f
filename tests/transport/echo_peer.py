"""A peer in a process of its own, for tests that kill and stop it: serves "echo" and "flood"."""

import asyncio
import sys

from swarm.network import Node, NodeConfig
from swarm.protocol import InfoRequest
from swarm.transport import Stream, Transport


async def echo(stream: Stream) -> None:
    """Send every message back."""
    while True:
        message, body = await stream.receive()
        await stream.send(message, body)


async def flood(stream: Stream) -> None:
    """Send messages for ever."""
    while True:
        await stream.send(InfoRequest(), bytes(1000))
        await asyncio.sleep(0.01)


async def main(initial_peer: str) -> None:
    """Serve until killed."""
    async with await Node.start(NodeConfig(host="127.0.0.1", initial_peers=(initial_peer,))) as node:
        transport = Transport(node, listen=("127.0.0.1", 0))
        transport.serve("echo", echo)
        transport.serve("flood", flood)
        async with transport:
            print(node.peer_id, flush=True)
            await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
