"""What carries a node: authenticated connections to peers by their id, unary calls and raw streams over them.

    Node ──► Underlay ◄── Libp2p          anybody may join: hivemind's libp2p daemon
                      ◄── MemberNetwork   a private swarm: mutual TLS between members, and nothing else

Errors are those of `swarm.errors`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from swarm.errors import AccessDenied
from swarm.network.addresses import PeerAddress
from swarm.network.listener import Entrance
from swarm.network.records import SignedRecords

StreamFactory = Callable[[str], asyncio.Protocol]
"""Makes the protocol of an incoming raw stream, given the base58 id of the authenticated peer."""
Restarted = Callable[[], Awaitable[None]]
Expelled = Callable[[str, AccessDenied], None]


class Caller(Protocol):
    """Unary calls, in the form in which hivemind's P2P makes them; ids are hivemind's."""

    async def call_unary_handler(self, peer_id: Any, name: str, data: bytes) -> bytes:
        """Call a peer's handler. Cancelling the call is no risk for others."""

    async def add_unary_handler(self, name: str, handler: Any, balanced: bool = False) -> None:
        """Serve `name` to all peers."""

    async def remove_unary_handler(self, name: str) -> None:
        """Stop serving `name`."""


class Underlay(Protocol):
    """See above."""

    is_private: bool
    num_restarts: int
    denied: asyncio.Event
    """Set when we belong to the swarm no more; `check_access` says why."""

    @property
    def caller(self) -> Caller:
        """For the DHT."""

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Full addresses under which others may dial us."""

    @property
    def listening(self) -> tuple[str, ...]:
        """Full addresses at which neighbours find us, even where nobody else can connect to us."""

    @property
    def entrance(self) -> Entrance | None:
        """Where raw streams come in as direct connections; None where libp2p brings them."""

    @property
    def is_up(self) -> bool:
        """Whether it works at the moment."""

    async def start(self) -> None:
        """Listen.

        Raises:
            ConfigError: a setting can't work.
        """

    async def present(self, announce: Sequence[str], *, is_hidden: bool) -> None:
        """Announce other addresses from now on, or none; calls and streams go on as far as that is possible.

        Args:
            announce: hosts, in place of those found.
            is_hidden: whether nobody can connect to us.

        Raises:
            PeerTimeout: it can't be done now.
        """

    async def supervise(self, on_restart: Restarted) -> None:
        """Keep it working until cancelled; `on_restart` is called when all connections were lost."""

    async def close(self) -> None:
        """End all connections."""

    def make_records(self) -> SignedRecords:
        """Signs our records, and says which ones of others are believed."""

    def account_of(self, peer_id: str) -> str:
        """Who is charged for what a connected peer does."""

    def may_be_asked(self, peer_id: str) -> bool:
        """Whether a connected peer may take part in the DHT, and not only use it."""

    async def connect(self, peer: PeerAddress, *, timeout_s: float) -> str:
        """Make sure that there is a connection; the id of who is there.

        Raises:
            PeerError: when there is no way. AccessDenied: when we are not let in.
        """

    async def list_peers(self) -> list[str]:
        """Peers with a connection.

        Raises:
            PeerTimeout: when that can't be said.
        """

    async def list_addresses(self) -> list[str]:
        """Full addresses of these peers, as far as they are known.

        Raises:
            PeerTimeout: when that can't be said.
        """

    async def open_stream(self, peer_id: str, name: str, protocol: asyncio.Protocol, *, timeout_s: float) -> None:
        """Open a raw stream to a peer and hand it to `protocol`.

        Raises:
            PeerUnreachable, PeerTimeout: when it can't be opened. AccessDenied: when we are not let in.
        """

    async def add_stream_factory(self, name: str, factory: StreamFactory) -> None:
        """Serve raw streams of `name`."""

    async def remove_stream_factory(self, name: str) -> None:
        """Stop serving raw streams of `name`; those that are open stay."""

    def check_access(self) -> None:
        """Whether we still belong to the swarm.

        Raises:
            AccessDenied: why not.
        """

    def check_may_announce(self) -> None:
        """Whether we may store records.

        Raises:
            AccessDenied: why not.
        """

    def on_expelled(self, listener: Expelled) -> None:
        """Call `listener(peer_id, error)` when a peer that was let in may stay no longer."""
