"""A server whose router closes and opens again while it runs; real nodes on an emulated network.

In an open swarm, and in a private one.
"""

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TypeVar

import pytest

from swarm.network import Node, NodeConfig
from swarm.private.certificates import Role
from swarm.protocol import InfoRequest
from swarm.rates import Rate
from swarm.server.config import ServerConfig
from swarm.server.reach import Reach
from swarm.transport import Stream, Transport, dial_back, standing
from swarm.transport.public import help_others
from tests.swarm.private.labs import Lab, lab_now
from tests.wan import Wan, WanUnavailable

HELPER, SERVER, CLIENT = range(3)
TIMEOUT_S = 60.0
T = TypeVar("T")


class Host:
    """An event loop in a thread on one host, and what lives there: members, where the swarm is private with a lab."""

    def __init__(self, wan: Wan, host: int, lab: Lab | None, home: Path) -> None:
        self.address, self._lab, self._home = wan.address(host), lab, home
        self._loop, self._stack, ready = asyncio.new_event_loop(), AsyncExitStack(), threading.Event()

        def work() -> None:
            with wan.inside(host):
                self._loop.call_soon(ready.set)
                self._loop.run_forever()

        self._thread = threading.Thread(target=work)
        self._thread.start()
        ready.wait()

    def run(self, work: Coroutine[object, object, T]) -> T:
        """Have it done there."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(TIMEOUT_S)

    async def peer(self, *, is_client: bool, initial_peers: tuple[str, ...] = ()) -> Transport:
        """A new peer there."""
        config = NodeConfig(
            host=self.address,
            client_mode=is_client,
            initial_peers=initial_peers,
            credentials=self._lab and self._lab.invite(role=Role.CLIENT if is_client else Role.SERVER),
            state_dir=self._home,
        )
        node = await self._stack.enter_async_context(await Node.start(config))
        transport = Transport(node, listen=None if is_client else (self.address, 0))
        return await self._stack.enter_async_context(transport)

    async def server(self, initial_peers: tuple[str, ...]) -> tuple[Reach, asyncio.Event]:
        """A server's place in the network, and an event that tells of changes."""
        credentials = self._lab and self._lab.invite()
        config = ServerConfig(model="tiny", host=self.address, initial_peers=initial_peers, credentials=credentials)
        reach, changed = Reach(config), asyncio.Event()
        self._stack.push_async_callback(reach.close)
        await reach.enter()
        reach.transport.serve("echo", echo)
        reach.follow(tuple, changed.set)
        return reach, changed

    def close(self) -> None:
        self.run(self._stack.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def echo(stream: Stream) -> None:
    while True:
        message, body = await stream.receive()
        await stream.send(message, body)


async def until(changed: asyncio.Event, reach: Reach, *, is_relayed: bool) -> None:
    """Wait until the server says so."""
    while reach.is_relayed is not is_relayed or bool(reach.relays) is not is_relayed:
        changed.clear()
        await changed.wait()


async def says(stream: Stream) -> str:
    """Send something and get it back; over which carrier."""
    await stream.send(InfoRequest(), b"hello")
    assert (await stream.receive(TIMEOUT_S))[1] == b"hello"
    return stream.carrier


@pytest.fixture(params=["open", "private"])
def hosts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[tuple[Wan, list[Host]]]:
    """Three: the second is behind a router that lets everybody in. Others are asked many times a second."""
    for name, seconds in (("PERIOD_S", 0.5), ("CONFIRM_S", 0.2), ("HOLD_S", 0.2)):
        monkeypatch.setattr(standing, name, seconds)
    monkeypatch.setattr(dial_back, "DIAL_TIMEOUT_S", 0.5)
    monkeypatch.setattr(dial_back, "DIALS", Rate(burst=1000, per_s=100))
    try:
        wan = Wan(3, nats={SERVER: "open"}).__enter__()
    except WanUnavailable as error:
        pytest.skip(str(error))
    lab = lab_now() if request.param == "private" else None
    made = [Host(wan, host, lab, tmp_path) for host in range(3)]
    try:
        yield wan, made
    finally:
        for host in reversed(made):
            host.close()
        wan.__exit__(None, None, None)


def test_a_server_whose_router_closes_is_reached_through_relays_until_it_opens(hosts: tuple[Wan, list[Host]]):
    """It finds out by itself, both times; a stream that was open goes on all the while."""
    wan, (helper, server, client) = hosts
    helping = helper.run(helper.peer(is_client=False))
    help_others(helping, relayed_bytes_per_s=1e6)
    peers = helping.node.addresses
    reach, changed = server.run(server.server(peers))
    server_id, outside = reach.node.peer_id, wan.outside_address(SERVER)
    assert not reach.is_relayed and any(f"/{outside}/" in address for address in reach.node.addresses)
    old = client.run(client.peer(is_client=True, initial_peers=peers))
    stream = client.run(old.open(server_id, "echo", timeout_s=TIMEOUT_S))
    assert client.run(says(stream)) == "direct"

    wan.set_nat(SERVER, "closed")
    server.run(until(changed, reach, is_relayed=True))
    assert reach.relays == (helping.peer_id,) and reach.node.addresses == () and not reach.transport.is_reachable
    assert client.run(says(stream)) == "direct"
    new = client.run(client.peer(is_client=True, initial_peers=peers))
    new.node.relays.learn(server_id, reach.relays)
    relayed = client.run(new.open(server_id, "echo", timeout_s=TIMEOUT_S))
    assert client.run(says(relayed)) == "relay"

    wan.set_nat(SERVER, "open")
    server.run(until(changed, reach, is_relayed=False))
    assert reach.node.peer_id == server_id and any(f"/{outside}/" in address for address in reach.node.addresses)
    new.node.relays.learn(server_id, reach.relays)
    assert client.run(says(client.run(new.open(server_id, "echo", timeout_s=TIMEOUT_S)))) == "direct"
    assert client.run(says(relayed)) == "relay" and client.run(says(stream)) == "direct"
