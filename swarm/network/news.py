"""What one process knows of revocations, and how that spreads: over links, at once and again until both ends agree.

revoke, a peer's Statements, a Refused ──learn──► Gate ──new ones──► on_new: part from them
a peer's Known ──on_known──► other than ours? ──► it gets ours       └─► all other links, and the disk
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import islice

from swarm.errors import InvalidRequest, PeerMisbehaved
from swarm.network.calls import CallLink
from swarm.network.links import Links
from swarm.network.roll import Roll
from swarm.private.certificates import read_invitation
from swarm.private.gate import Gate
from swarm.private.revocations import (
    MAX_BY_ADMIN,
    MAX_BY_AUTHORITY,
    Revocation,
    decode_revocations,
    encode_revocations,
)
from swarm.private.store import RevocationStore

log = logging.getLogger(__name__)

RETELL_S = 60.0
"""How long a peer that was told all our revocations, and knows others, is not told them again."""
MAX_LOGGED = 16
"""Of revocations that come together, those that are logged one by one."""
PORTION = 512
"""Revocations in one message."""


class News:
    """Keeps the links of a process, and what is told over them besides calls.

    Args:
        gate: believes what is signed by who may.
        links: with whom we talk.
        roll: knows names.
        store: outlasts us.
        on_new: called when somebody was revoked.
    """

    def __init__(
        self, gate: Gate, links: Links, roll: Roll, store: RevocationStore, on_new: Callable[[], object]
    ) -> None:
        self.has_news = asyncio.Event()
        """Set when somebody was revoked: what that member has stored is to be forgotten."""
        self._gate, self._links, self._roll, self._store, self._on_new = gate, links, roll, store, on_new
        self._heard = asyncio.Event()

    def load(self) -> None:
        """Learn what we knew when we were here before."""
        with suppress(PeerMisbehaved):  # who has changed our file can only make us forget
            self._gate.learn(self._store.load(), time.time())

    async def revoke(self, statements: Iterable[Revocation], timeout_s: float) -> int:
        """Tell the swarm; how many of those who have a link with us know it when this returns.

        Raises:
            PeerMisbehaved: one is not signed by who may. InvalidRequest: one is not taken.
        """
        statements = list(statements)
        self.learn(statements)
        num_missing = sum(not self._gate.revocations.has(entry) for entry in statements)
        if num_missing:
            raise InvalidRequest(
                f"no room for {num_missing} of {len(statements)} revocations: {MAX_BY_ADMIN} of one admin, and"
                f" {MAX_BY_AUTHORITY} of the authority are kept until the invitations expire"
            )
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while any(link.known != self._gate.revocations.digest for link in self._links):
                    self._heard.clear()
                    await self._heard.wait()
        return sum(link.known == self._gate.revocations.digest for link in self._links)

    def on_known(self, link: CallLink) -> None:
        """A peer has said which revocations it knows; if they are others than ours, it gets ours."""
        self._heard.set()
        ours, now = self._gate.revocations.digest, time.monotonic()
        if link.known != ours and (link.told != ours or now - link.told_at > RETELL_S):
            link.told, link.told_at = ours, now  # who can't take all of it must not be told again with every answer
            self._tell(link, self._gate.revocations)

    def on_statements(self, link: CallLink, data: bytes) -> None:
        """Take revocations from a peer, act on those that are new, and pass them on.

        Raises:
            PeerMisbehaved: one is not signed by who may.
        """
        self.learn(decode_revocations(data), source=link)

    def learn(self, statements: Iterable[Revocation], *, source: CallLink | None = None) -> None:
        """Take revocations, act on those that are new, and pass them on.

        Raises:
            PeerMisbehaved: one is not signed by who may.
        """
        new = self._gate.learn(statements, time.time())
        if not new:
            return
        with suppress(PeerMisbehaved):  # other processes of this swarm may have the same file
            new += self._gate.learn(self._store.load(), time.time())
        self._log_revoked(new)
        self.has_news.set()
        self._store.save(self._gate.revocations)
        for link in self._links:
            if link is not source:
                self._tell(link, new)
        self._on_new()

    def _log_revoked(self, statements: Sequence[Revocation]) -> None:
        for entry in statements[:MAX_LOGGED]:
            by = read_invitation(entry.signer, self._gate.authority) if entry.signer else "the authority"
            log.warning("%s was revoked by %s", self._roll.name_of(entry.member), by)
        if len(statements) > MAX_LOGGED:
            log.warning("%d more were revoked", len(statements) - MAX_LOGGED)

    def _tell(self, link: CallLink, statements: Iterable[Revocation]) -> None:
        """Pass statements on, in portions between which others have their turn."""
        remaining = iter(statements)
        while portion := list(islice(remaining, PORTION)):
            link.tell(encode_revocations(portion))

    def on_link_lost(self, link: CallLink) -> None:
        """A link is over."""
        self._links.remove(link)
        self._heard.set()
