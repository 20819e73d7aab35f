"""Handlers with fake executors on real transports, all on loopback in one loop."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest_asyncio

from swarm.network import Node, NodeConfig
from swarm.protocol import PUSH_SERVICE, SESSION_SERVICE
from swarm.server.handler import Handler
from swarm.transport import Transport
from tests.server.fakes import FakeExecutor, HopClient, make_handler


class Chain:
    """Servers in a row and the client's transport."""

    def __init__(self, client: Transport, transports: list[Transport], handlers: list[Handler]):
        self.client, self.transports, self.handlers = client, transports, handlers

    @property
    def executors(self) -> list[FakeExecutor]:
        return [handler.executor for handler in self.handlers]  # type: ignore[misc]

    def peer_id(self, index: int) -> str:
        return self.transports[index].node.peer_id

    async def open(self, index: int, *, is_last: bool = False, **fields: Any) -> HopClient:
        """A session on one server."""
        return await HopClient.open(self.client, self.peer_id(index), is_last=is_last, **fields)

    async def open_route(self, *indices: int, **fields: Any) -> list[HopClient]:
        """Sessions on several servers, each told to push to the next."""
        hops = [await self.open(i, is_last=n + 1 == len(indices), **fields) for n, i in enumerate(indices)]
        for hop, following in pairwise(hops):
            await hop.forward(0, following, held=(0,) * fields.get("rows", 1))
        return hops

    @property
    def pages(self) -> int:
        return sum(executor.pages for executor in self.executors)


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
            stack.push_async_callback(handler.close)
            transports.append(transport)
            handlers.append(handler)
        client = await stack.enter_async_context(Transport(nodes[0]))
        yield Chain(client, transports, handlers)
