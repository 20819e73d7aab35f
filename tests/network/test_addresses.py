"""Addresses as people write them, and the cards by which members pass theirs on."""

import msgspec
import pytest

from swarm.errors import ConfigError, PeerMisbehaved
from swarm.identity import Identity
from swarm.network import addresses
from swarm.network.addresses import AddressBook, Card, PeerAddress, as_text, listening_endpoints

PEER = Identity.generate()
NOW = 1e9


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("10.0.0.1:31337", ("10.0.0.1", 31337)),
        ("gpu1.lab:1", ("gpu1.lab", 1)),
        ("[::1]:7", ("::1", 7)),
        ("/ip4/10.0.0.1/tcp/7", ("10.0.0.1", 7)),
        (f"/ip4/10.0.0.1/tcp/7/p2p/{PEER.peer_id}", ("10.0.0.1", 7)),
        ("/dns4/gpu1.lab/tcp/7", ("gpu1.lab", 7)),
    ],
)
def test_a_private_swarm_takes_a_host_and_a_port(text: str, endpoint: tuple[str, int]):
    """With a peer id or without."""
    address = PeerAddress.parse(text, is_private=True)
    assert address.endpoint == endpoint
    assert address.peer_id == (PEER.peer_id if "p2p" in text else None)


@pytest.mark.parametrize(
    "text", ["", "x", "x:", ":7", "x:0", "x:65536", "x:7a", "/ip4/x/udp/7", "/p2p/x", "a/b:7", "x:²"]
)
def test_what_is_no_address_is_refused(text: str):
    """The message shows how to write one."""
    with pytest.raises(ConfigError, match="malformed"):
        PeerAddress.parse(text, is_private=True)


def test_an_open_swarm_needs_the_peer_id():
    """Nobody there proves to be a member."""
    with pytest.raises(ConfigError, match="names no peer"):
        PeerAddress.parse("/ip4/10.0.0.1/tcp/7")


def test_a_card_is_its_owners_word():
    """Changed or signed by somebody else it is refused; so are addresses that can't be dialled, and the future."""
    card = Card.make(PEER, [("10.0.0.1", 7)], NOW)
    card.check(NOW)
    for changes in ({"endpoints": (("10.0.0.2", 7),)}, {"at": NOW + 1}, {"peer_id": Identity.generate().peer_id}):
        with pytest.raises(PeerMisbehaved, match="forged"):
            msgspec.structs.replace(card, **changes).check(NOW)
    for host in ("gpu1.lab", "224.0.0.1", "0.0.0.0", "::"):
        with pytest.raises(PeerMisbehaved, match="can't be at"):
            Card.make(PEER, [(host, 7)], NOW).check(NOW)
    with pytest.raises(PeerMisbehaved, match="clocks differ"):
        Card.make(PEER, [], NOW + 200).check(NOW)


def test_the_book_keeps_the_newest_card_of_each_peer(monkeypatch: pytest.MonkeyPatch):
    """An older one changes nothing; the least recently used one is forgotten in the end."""
    monkeypatch.setattr(addresses, "MAX_CARDS", 2)
    book, others = AddressBook(), [Identity.generate() for _ in range(2)]
    new, old = Card.make(PEER, [("10.0.0.1", 7)], NOW), Card.make(PEER, [("10.0.0.9", 7)], NOW - 1)
    book.add(new, NOW)
    book.add(old, NOW)
    assert book.get(PEER.peer_id) == new
    book.forget(old)
    assert book.get(PEER.peer_id) == new
    book.add(Card.make(others[0], [], NOW), NOW)
    assert book.get(PEER.peer_id) == new
    book.add(Card.make(others[1], [], NOW), NOW)
    assert book.get(others[0].peer_id) is None and book.get(PEER.peer_id) == new
    book.forget(new)
    assert book.get(PEER.peer_id) is None


def test_what_is_announced_or_what_this_machine_has():
    """Announced addresses replace all others; a single address is itself; any address means all, loopback last."""
    assert listening_endpoints("0.0.0.0", 7, ["10.0.0.1", "10.0.0.2:9", "/ip4/10.0.0.3/tcp/8"]) == (
        ("10.0.0.1", 7),
        ("10.0.0.2", 9),
        ("10.0.0.3", 8),
    )
    assert listening_endpoints("127.0.0.1", 7, ()) == (("127.0.0.1", 7),)
    assert listening_endpoints("0.0.0.0", 7, ())[-1] == ("127.0.0.1", 7)
    assert as_text(("::1", 7), "PEER") == "/ip6/::1/tcp/7/p2p/PEER"
    with pytest.raises(ConfigError, match="no IP address"):
        listening_endpoints("0.0.0.0", 7, ["gpu1.lab"])
