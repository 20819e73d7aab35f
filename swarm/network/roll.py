"""Who the members are, as far as peers have met them: for admins, who revoke by name and have no list of their own.

    every connection ──meet──► Roll ──answer──► an admin's `members` ──► names, roles, ids

What is passed on are invitations, which the authority has signed, so nobody can make one up.
"""

import asyncio
import logging
from contextlib import suppress
from typing import Annotated, Any

import msgspec

from swarm.errors import AccessDenied, PeerError, PeerMisbehaved
from swarm.network.calls import CallLink
from swarm.network.links import Links
from swarm.private.certificates import MAX_CERTIFICATE_BYTES, Member, Proven, read_invitation
from swarm.private.gate import Gate

log = logging.getLogger(__name__)

MEMBERS = "/swarm/members"
"""Unary call: the invitations of members who were here."""
MAX_MET = 2048
TIMEOUT_S = 5.0

_decoder: msgspec.msgpack.Decoder[tuple[bytes, ...]] = msgspec.msgpack.Decoder(
    Annotated[
        tuple[Annotated[bytes, msgspec.Meta(max_length=MAX_CERTIFICATE_BYTES)], ...],
        msgspec.Meta(max_length=MAX_MET + 1),
    ]
)


class Roll:
    """The members that one process has met.

    Args:
        links: with those who can be asked for more.
        gate: our own membership.
    """

    def __init__(self, links: Links, gate: Gate) -> None:
        self._links, self._gate = links, gate
        self._met: dict[str, bytes] = {}
        """Of each member the invitation, the latest last."""

    def meet(self, proven: Proven) -> None:
        """A member is here."""
        self._met.pop(proven.member.id, None)
        self._met[proven.member.id] = proven.invitation
        if len(self._met) > MAX_MET:
            del self._met[next(iter(self._met))]

    def name_of(self, member_id: str) -> str:
        """Name and role of a member, for people; the id of one whom we have not met."""
        invitation = self._met.get(member_id)
        return member_id if invitation is None else str(read_invitation(invitation, self._gate.authority))

    async def members(self) -> list[Member]:
        """Members whom we or those with a link to us have met, each once."""
        answers = await asyncio.gather(*(_ask(link) for link in self._links))
        found = {invitation for answer in (*answers, tuple(self._met.values())) for invitation in answer}
        members = []
        for invitation in found:
            with suppress(PeerMisbehaved):
                members.append(read_invitation(invitation, self._gate.authority))
        return members

    async def answer(self, data: bytes, peer_id: Any) -> bytes:
        """Serve MEMBERS.

        Raises:
            AccessDenied: the caller is no admin.
        """
        link = self._links.live(peer_id.to_base58())
        if link is None or not link.proven.member.role.may_revoke:
            raise AccessDenied("only admins are told who the members are")
        return msgspec.msgpack.encode((self._gate.passport.invitation, *self._met.values()))


async def _ask(link: CallLink) -> tuple[bytes, ...]:
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return _decoder.decode(await link.call(MEMBERS, b""))
    except (TimeoutError, PeerError, msgspec.MsgspecError) as error:
        log.info("%s does not say who the members are: %s", link.proven.member, error)
        return ()
