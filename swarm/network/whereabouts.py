"""Where the members of a private swarm can be dialled: from their own cards, or from peers who have met them.

    Hello, Welcome ──learn──► AddressBook ◄──answer── who is asked        ask(peer) ──WHERE──► some of those with a link
    we are elsewhere: move(card) ──HERE──► all of those, who `hear` it

Cards are signed, so a wrong answer can only be an old one.
"""

import asyncio
import logging
import random
import time
from contextlib import suppress
from typing import Any

import msgspec

from swarm.errors import PeerError, PeerMisbehaved, PeerUnreachable
from swarm.network.addresses import AddressBook, Card, as_text
from swarm.network.calls import CallLink
from swarm.network.links import Links
from swarm.private.certificates import Proven

log = logging.getLogger(__name__)

WHERE = "/swarm/where"
"""Unary call: the address card of a peer, or nothing."""
HERE = "/swarm/here"
"""Unary call: the caller's own card, which is another one now."""
TIMEOUT_S = 2.0
NUM_ASKED = 8
"""Peers that are asked where another one is."""

_decoder = msgspec.msgpack.Decoder(Card)


class Whereabouts:
    """What one process knows of where others are.

    Args:
        links: with those who can be asked.
    """

    def __init__(self, links: Links) -> None:
        self.own: Card | None = None
        """Our own card, if we listen."""
        self._links = links
        self._book = AddressBook()

    def learn(self, card: Card, proven: Proven) -> None:
        """Take a peer's own card; clients are not dialled.

        Raises:
            PeerMisbehaved: it is somebody else's, or forged.
        """
        if card.peer_id != proven.peer_id:
            raise PeerMisbehaved(f"{proven.member} shows the address card of {card.peer_id}")
        if proven.member.role.may_announce:
            self._book.add(card, time.time())

    def known(self, peer_id: str) -> Card | None:
        """The card of a peer, if we have it."""
        return self._book.get(peer_id)

    def forget(self, card: Card) -> None:
        """The peer was not there."""
        self._book.forget(card)

    async def ask(self, peer_id: str) -> Card:
        """The newest card of a peer that some of those with a link to us have.

        Clients are not asked: with a card made up for it, one could make us dial any address.

        Raises:
            PeerUnreachable: they have none.
        """
        links = [link for link in self._links if link.is_usable and link.proven.member.role.may_announce]
        asked = random.sample(links, min(NUM_ASKED, len(links)))
        for card in await asyncio.gather(*(_ask(link, peer_id) for link in asked)):
            if card is not None:
                with suppress(PeerMisbehaved):
                    self._book.add(card, time.time())
        found = self._book.get(peer_id)
        if found is None:
            raise PeerUnreachable(f"none of {len(asked)} peers knows the address of {peer_id}", peer_id=peer_id)
        return found

    @property
    def listening(self) -> tuple[str, ...]:
        """Full addresses on our own card."""
        return () if self.own is None else tuple(as_text(it, self.own.peer_id) for it in self.own.endpoints)

    async def move(self, card: Card) -> None:
        """Say where we are, if that is elsewhere now; who doesn't hear it asks others when it doesn't find us."""
        if self.own is not None and self.own.endpoints == card.endpoints:
            return
        self.own = card
        await asyncio.gather(*(_tell(link, card) for link in self._links))

    async def hear(self, data: bytes, peer_id: Any) -> bytes:
        """Serve HERE.

        Raises:
            PeerMisbehaved: that is no card of the caller's.
        """
        link = self._links.live(peer_id.to_base58())
        if link is not None:
            try:
                self.learn(_decoder.decode(data), link.proven)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise PeerMisbehaved(f"a malformed address card: {error}") from error
        return b""

    async def answer(self, data: bytes, peer_id: Any) -> bytes:
        """Serve WHERE."""
        wanted = data.decode(errors="replace")
        card = self.own if self.own is not None and self.own.peer_id == wanted else self._book.get(wanted)
        return b"" if card is None else msgspec.msgpack.encode(card)


async def _tell(link: CallLink, card: Card) -> None:
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await link.call(HERE, msgspec.msgpack.encode(card))
    except (TimeoutError, PeerError) as error:
        log.debug("%s does not hear where we are: %s", link.proven.member, error)


async def _ask(link: CallLink, peer_id: str) -> Card | None:
    try:
        async with asyncio.timeout(TIMEOUT_S):
            answer = await link.call(WHERE, peer_id.encode())
        card = _decoder.decode(answer) if answer else None
    except (TimeoutError, PeerError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        log.debug("%s does not say where %s is: %s", link.proven.member, peer_id, error)
        return None
    return card if card is not None and card.peer_id == peer_id else None
