"""Where peers can be dialled: addresses as people write them, and the signed cards by which peers pass theirs on.

    "/ip4/HOST/tcp/PORT/p2p/PEER_ID" ──parse──► PeerAddress        (in a private swarm HOST:PORT will do: whoever is
    Card: peer id, addresses, time, signature ──► AddressBook        there has to prove membership anyway)

libp2p has its own ways to learn addresses; cards are for private swarms, which do without it. Pure, but for asking the
system for the addresses of this machine.
"""

import array
import fcntl
import ipaddress
import socket
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec

from swarm.errors import ConfigError, PeerMisbehaved
from swarm.identity import MAX_PEER_ID_CHARS, Identity, verify
from swarm.network.hive import Multiaddr, MultiaddrError, PeerID

MAX_ADDRESSES = 8
"""Of one peer."""
MAX_CARDS = 4096
"""In one address book."""
CLOCK_SKEW_S = 120.0
_DOMAIN = b"swarm card 1"
_SIOCGIFCONF = 0x8912
_PATTERN = "/ip4/HOST/tcp/PORT/p2p/PEER_ID"

Endpoint = tuple[str, int]
"""An IP address and a TCP port."""


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """Where a peer can be dialled, and who it has to be; None is any member of a private swarm."""

    text: str
    location: str
    peer_id: str | None

    @classmethod
    def parse(cls, text: str, *, is_private: bool = False) -> "PeerAddress":
        """Read "/ip4/HOST/tcp/PORT/p2p/PEER_ID", or for a private swarm "HOST:PORT".

        Raises:
            ConfigError: when it is neither.
        """
        location, separator, peer_id = text.rpartition("/p2p/")
        if not separator and not is_private:
            raise ConfigError(f"peer address {text!r} names no peer; write {_PATTERN}")
        if separator and not _names_peer(peer_id):
            raise ConfigError(f"peer address {text!r} is malformed; write {_PATTERN}")
        address = cls(text, location, peer_id) if separator else cls(text, text, None)
        _ = address.endpoint if is_private else address.multiaddr
        return address

    @property
    def multiaddr(self) -> object:
        """For libp2p, without the peer id.

        Raises:
            ConfigError: malformed.
        """
        try:
            return Multiaddr(self.location)
        except (MultiaddrError, ValueError, KeyError) as error:
            raise ConfigError(f"peer address {self.text!r} is malformed; write {_PATTERN}") from error

    @property
    def endpoint(self) -> Endpoint:
        """Host (a name or an address) and TCP port.

        Raises:
            ConfigError: malformed.
        """
        parts = self.location.split("/")
        if len(parts) == 5 and parts[1] in ("ip4", "ip6", "dns", "dns4", "dns6") and parts[3] == "tcp":
            host, port = parts[2], parts[4]
        else:
            host, _, port = self.location.rpartition(":")
        if not host or "/" in host or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            raise ConfigError(f"peer address {self.text!r} is malformed; write HOST:PORT or /ip4/HOST/tcp/PORT")
        return host.strip("[]"), int(port)


class Card(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a peer says of where it can be dialled."""

    peer_id: Annotated[str, msgspec.Meta(max_length=MAX_PEER_ID_CHARS)]
    endpoints: Annotated[
        tuple[tuple[Annotated[str, msgspec.Meta(max_length=45)], Annotated[int, msgspec.Meta(ge=1, le=65535)]], ...],
        msgspec.Meta(max_length=MAX_ADDRESSES),
    ]
    at: Annotated[float, msgspec.Meta(ge=0, le=1e11)]
    signature: Annotated[bytes, msgspec.Meta(max_length=64)] = b""

    @classmethod
    def make(cls, identity: Identity, endpoints: Sequence[Endpoint], now: float) -> "Card":
        """Our own card."""
        card = cls(identity.peer_id, tuple(endpoints)[:MAX_ADDRESSES], now)
        return msgspec.structs.replace(card, signature=identity.sign(_signed_bytes(card)))

    def check(self, now: float) -> None:
        """Whether its owner has written it, and only addresses into it.

        Raises:
            PeerMisbehaved: it has not.
        """
        if self.at > now + CLOCK_SKEW_S:
            raise PeerMisbehaved(
                f"an address card from {self.at - now:.0f} s ahead: clocks differ", peer_id=self.peer_id
            )
        if not verify(self.peer_id, _signed_bytes(self), self.signature):
            raise PeerMisbehaved(f"a forged address card of {self.peer_id}", peer_id=self.peer_id)
        for host, _ in self.endpoints:
            try:
                address = ipaddress.ip_address(host)
            except ValueError as error:
                raise PeerMisbehaved(f"{self.peer_id} can't be at {host!r}", peer_id=self.peer_id) from error
            if address.is_multicast or address.is_unspecified:
                raise PeerMisbehaved(f"{self.peer_id} can't be at {host}", peer_id=self.peer_id)


class AddressBook:
    """The latest card of each peer that we heard of, the least recently used ones forgotten."""

    def __init__(self) -> None:
        self._cards: dict[str, Card] = {}

    def add(self, card: Card, now: float) -> None:
        """Keep a card if it is newer than what we have.

        Raises:
            PeerMisbehaved: it is forged.
        """
        known = self._cards.get(card.peer_id)
        if known is not None and known.at >= card.at:
            return
        card.check(now)
        self._cards.pop(card.peer_id, None)
        self._cards[card.peer_id] = card
        if len(self._cards) > MAX_CARDS:
            del self._cards[next(iter(self._cards))]

    def get(self, peer_id: str) -> Card | None:
        """The card of a peer."""
        card = self._cards.pop(peer_id, None)
        if card is not None:
            self._cards[peer_id] = card
        return card

    def forget(self, card: Card) -> None:
        """The peer was not there."""
        if self._cards.get(card.peer_id) == card:
            del self._cards[card.peer_id]


def listening_endpoints(host: str, port: int, announce: Iterable[str]) -> tuple[Endpoint, ...]:
    """Where others can dial us: what is to be announced, or the address listened on, or all of this machine."""
    announced = [_announced(text, port) for text in announce]
    if announced:
        return tuple(dict.fromkeys(announced))[:MAX_ADDRESSES]
    address = ipaddress.ip_address(host)
    if not address.is_unspecified:
        return ((str(address), port),)
    return tuple((found, port) for found in _local_addresses())[:MAX_ADDRESSES]


def as_text(endpoint: Endpoint, peer_id: str) -> str:
    """The full address of a peer: /ip4/HOST/tcp/PORT/p2p/PEER_ID."""
    host, port = endpoint
    return f"/ip{ipaddress.ip_address(host).version}/{host}/tcp/{port}/p2p/{peer_id}"


def _announced(text: str, port: int) -> Endpoint:
    if text.startswith("/") or (text.rpartition(":")[2].isdigit() and text.count(":") == 1):
        host, port = PeerAddress.parse(text, is_private=True).endpoint
    else:
        host = text
    try:
        return str(ipaddress.ip_address(host)), port
    except ValueError as error:
        raise ConfigError(f"address to announce {text!r} is no IP address") from error


def _local_addresses() -> list[str]:
    """IPv4 addresses of this machine's interfaces, loopback last."""
    buffer = array.array("B", bytes(16384))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        request = struct.pack("iL", len(buffer), buffer.buffer_info()[0])
        used = struct.unpack("iL", fcntl.ioctl(asker, _SIOCGIFCONF, request))[0]
    found = [socket.inet_ntoa(buffer[start + 20 : start + 24].tobytes()) for start in range(0, used, 40)]
    return sorted(dict.fromkeys(found), key=lambda address: address.startswith("127."))


def _names_peer(text: str) -> bool:
    try:
        PeerID.from_base58(text)
    except ValueError:
        return False
    return True


def _signed_bytes(card: Card) -> bytes:
    return _DOMAIN + msgspec.msgpack.encode((card.peer_id, card.endpoints, card.at))
