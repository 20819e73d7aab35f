"""A connection ends whatever its carrier does."""

import asyncio

import pytest

from swarm.errors import PeerDisconnected
from swarm.transport import connection as connection_module
from swarm.transport.connection import Connection
from swarm.transport.limits import Limits, Traffic
from swarm.transport.mux import Mux


class MuteCarrier(asyncio.Transport):
    """Takes everything and never says that it is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.num_aborts = 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        pass

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        pass

    def abort(self) -> None:
        self.num_aborts += 1


class Owner:
    def __init__(self) -> None:
        self.traffic, self.closed = Traffic(), 0

    def on_closed(self, connection: Connection) -> None:
        self.closed += 1


async def test_a_carrier_that_never_says_that_it_is_gone_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    """As uvloop's TLS when its socket was closed under it: whoever waits for the end must not wait for ever."""
    monkeypatch.setattr(connection_module, "GOODBYE_S", 0.02)
    owner, carrier, limits = Owner(), MuteCarrier(), Limits()
    connection = Connection(owner, "direct", lambda now: Mux(is_dialler=True, limits=limits, now=now), limits)
    connection.connection_made(carrier)
    connection.start()
    connection.close(PeerDisconnected("over"))
    await asyncio.wait_for(connection.wait_gone(), 10)
    assert carrier.num_aborts >= 1 and owner.closed == 1


async def test_nothing_that_comes_is_looked_at_before_it_is_known_who_is_there():
    """A stranger who ends TLS early could say HELLO, and open a stream, before his certificate is compared."""
    owner, limits = Owner(), Limits()
    greeted: list[Connection] = []
    owner.on_greeted = lambda connection, ticket: greeted.append(connection)  # type: ignore[attr-defined]
    connection = Connection(owner, "relay", lambda now: Mux(is_dialler=True, limits=limits, now=now), limits)  # type: ignore[arg-type]
    carrier = MuteCarrier()
    connection.connection_made(carrier)
    hello = Mux(is_dialler=False, limits=limits, now=0.0).take_output()
    connection.data_received(hello)
    assert not greeted and not connection.is_greeted
    connection.start()
    assert greeted == [connection] and connection.is_greeted
    late = Connection(owner, "relay", lambda now: Mux(is_dialler=True, limits=limits, now=now), limits)  # type: ignore[arg-type]
    late.connection_made(carrier)
    late.data_received(bytes(connection_module.MAX_EARLY_BYTES + 1))
    assert carrier.num_aborts == 1
    for made in (connection, late):
        made.close(PeerDisconnected("over"))
