"""Lets one announced member in for one service: who comes through a relay, which has said who it is, and may lie.

IncomingGreeting on a pipe ──Hello──► Guest: is it who was announced? ──► the house: Gate, limits ──► protocol
"""

import asyncio
from typing import Protocol

from swarm.errors import PeerMisbehaved, PeerUnreachable, SwarmError
from swarm.network.greeter import IncomingGreeting
from swarm.network.greeting import Hello, Refused, Welcome
from swarm.network.underlay import StreamFactory
from swarm.private.certificates import Proven, peer_id_in


class House(Protocol):
    """Who knows the members, and has room for them."""

    def admit(self, process: bytes, hello: Hello) -> tuple[Proven, Welcome]:
        """Judge a greeting.

        Raises:
            SwarmError: why the connection is refused.
        """

    def on_connected(self, transport: asyncio.Transport, proven: Proven) -> None:
        """A connection has been taken."""

    def refusal(self, error: SwarmError, process: bytes, hello: Hello | None) -> Refused:
        """How to tell a peer that it was refused."""


class Guest:
    """Who is waited for; a `swarm.network.greeter.Host` of one connection.

    Args:
        house: takes it in.
        peer_id: who it is said to be.
        service: what it may come for.
        factory: makes the protocol of its connection.
    """

    def __init__(self, house: House, peer_id: str, service: str, factory: StreamFactory) -> None:
        self._house, self._peer_id, self._service, self._factory = house, peer_id, service, factory

    def on_hello(self, process: bytes, hello: Hello) -> tuple[Proven, asyncio.Protocol, Welcome]:
        """Let it in, or not.

        Raises:
            PeerMisbehaved: it is somebody else. AccessDenied, PeerBusy, PeerUnreachable: why not.
        """
        found = peer_id_in(process)
        if found != self._peer_id:
            raise PeerMisbehaved(f"{found} comes in the name of {self._peer_id}", peer_id=found)
        if hello.service != self._service:
            raise PeerUnreachable(f"{hello.service!r} is not served through relays")
        proven, welcome = self._house.admit(process, hello)
        return proven, self._factory(proven.peer_id), welcome

    def on_connected(self, transport: asyncio.Transport, proven: Proven) -> None:
        """It is in."""
        self._house.on_connected(transport, proven)

    def refusal(self, error: SwarmError, process: bytes, hello: Hello | None) -> Refused:
        """It is not."""
        return self._house.refusal(error, process, hello)

    def on_greeting_over(self, greeting: IncomingGreeting) -> None:
        """Nobody waits for that: there are as many as circuits."""
