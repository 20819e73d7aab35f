"""Handlers with fake executors on real transports, all on loopback in one loop."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest_asyncio

from swarm.network import Node, NodeConfig
from swarm.protocol import PUSH_SERVICE, SESSION_SERVICE, STATE_SERVICE
from swarm.transport import Transport
from tests.server.fakes import Chain, FakeExecutor, make_handler


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def nodes() -> AsyncIterator[list[Node]]:
    """A client and four servers."""
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(await Node.start(NodeConfig(host="127.0.0.1")))
        others = [
            await stack.enter_async_context(
                await Node.start(NodeConfig(host="127.0.0.1", initial_peers=tuple(first.addresses)))
            )
            for _ in range(3)
        ]
        client = await stack.enter_async_context(
            await Node.start(NodeConfig(client_mode=True, initial_peers=tuple(first.addresses)))
        )
        yield [client, first, *others]


@asynccontextmanager
async def chain_of(nodes: list[Node], num_servers: int = 3, *, executor: Any = None, **limits: Any):
    """`num_servers` handlers; the executor of number i adds 10 * (i + 1)."""
    async with AsyncExitStack() as stack:
        transports, handlers = [], []
        for index, node in enumerate(nodes[1 : num_servers + 1]):
            transport = await stack.enter_async_context(Transport(node, listen=("127.0.0.1", 0)))
            fake = FakeExecutor(10 * (index + 1), **(executor or {}))
            handler = make_handler(fake, transport, **limits)
            transport.serve(SESSION_SERVICE, handler.session)
            transport.serve(PUSH_SERVICE, handler.push)
            transport.serve(STATE_SERVICE, handler.receive_state)
            stack.push_async_callback(handler.close)
            transports.append(transport)
            handlers.append(handler)
        client = await stack.enter_async_context(Transport(nodes[0]))
        yield Chain(client, transports, handlers)
