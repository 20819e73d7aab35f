"""Whether others can connect to us: they try, at the address that we come from, and say so. No central site is asked.

    ask_around ── DialBack: our ports and certificate ──► some peers: DialBackDesk ── TCP, TLS ──► our ports
        ◄──────────────────────── DialedBack: where we come from, whether that worked ┘

A peer dials no address but the one that the question came from, so nobody is made to knock at a stranger's door; where
that is its own router, which stands for anybody, it says nothing. What peers say of public addresses counts more than
what a neighbour in the same house says.
"""

import asyncio
import ipaddress
import logging
import random
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from swarm.errors import InvalidRequest, PeerBusy, PeerMisbehaved, PeerUnreachable, SwarmError
from swarm.protocol import DIAL_BACK_SERVICE, DialBack, DialedBack
from swarm.rates import Rate, Rates
from swarm.transport.direct import reach
from swarm.transport.standing import Verdict
from swarm.transport.stream import EndOfStream, Stream
from swarm.transport.transport import Transport

log = logging.getLogger(__name__)

ROUTES = Path("/proc/net/route")
NUM_ASKED = 5
DIAL_TIMEOUT_S = 3.0
CONNECT_TIMEOUT_S, ASK_TIMEOUT_S = 3.0, 8.0
MAX_DIALS = 16
"""Dials at a time."""
DIALS = Rate(burst=4, per_s=1 / 15)
"""How often one peer may ask."""


async def ask_around(transport: Transport, control_port: int, peer_ids: Collection[str]) -> Verdict | None:
    """Ask some of these peers whether they can connect to us; None if nobody could tell."""
    entrance = transport.entrance
    if entrance is None:
        return None
    question = DialBack(port=entrance.port, fingerprint=entrance.fingerprint, control_port=control_port)
    known = sorted(peer_id for peer_id in peer_ids if not transport.node.relays.of(peer_id))
    asked = random.sample(known, min(NUM_ASKED, len(known)))  # who is hidden itself can't be asked directly
    answers = await asyncio.gather(*(_ask(transport, peer_id, question) for peer_id in asked))
    return judge([answer for answer in answers if answer is not None])


def judge(answers: Sequence[DialedBack]) -> Verdict | None:
    """Half of those who can tell decide; where some see us at a public address, only they can. Pure.

    A peer on this machine that can't connect to us says nothing: we may listen at another of its addresses.
    """
    answers = [it for it in answers if it.is_reachable or not ipaddress.ip_address(it.host).is_loopback]
    public = [answer for answer in answers if _is_public(answer.host)]
    counted = public or list(answers)
    if not counted:
        return None
    yes = [answer for answer in counted if answer.is_reachable]
    is_reachable = 2 * len(yes) >= len(counted)
    hosts = Counter(answer.host for answer in (yes if is_reachable else counted))
    return Verdict(is_reachable=is_reachable, host=hosts.most_common(1)[0][0], num_answers=len(counted))


async def _ask(transport: Transport, peer_id: str, question: DialBack) -> DialedBack | None:
    try:
        stream = await transport.open(peer_id, DIAL_BACK_SERVICE, timeout_s=CONNECT_TIMEOUT_S, carrier="direct")
        async with stream:
            await stream.send(question)
            answer, _ = await stream.receive(ASK_TIMEOUT_S)
        if not isinstance(answer, DialedBack):
            raise PeerMisbehaved(f"{type(answer).__name__} in place of DialedBack", peer_id=peer_id)
        ipaddress.ip_address(answer.host)
    except (SwarmError, EndOfStream, ValueError) as error:
        log.debug("%s can't tell whether we can be reached: %s", peer_id, error)
        return None
    return answer


def _is_public(host: str) -> bool:
    return ipaddress.ip_address(host).is_global


class DialBackDesk:
    """Tries to connect to peers that ask for it; its `serve` is the handler of the `dial-back` service."""

    def __init__(self) -> None:
        self._rates = Rates(DIALS)
        self._num_dials = 0

    async def serve(self, stream: Stream) -> None:
        """Answer one question.

        Raises:
            InvalidRequest: we can't see where it comes from. PeerBusy: asked too often, or by too many.
        """
        message, _ = await stream.receive(ASK_TIMEOUT_S)
        host, now = stream.remote_host, asyncio.get_running_loop().time()
        if not isinstance(message, DialBack):
            raise InvalidRequest(f"{type(message).__name__} in place of DialBack")
        if host is None or host in gateways(ROUTES):
            raise InvalidRequest("we can't see where you are: ask over a direct connection, past no router of ours")
        if self._num_dials >= MAX_DIALS or not self._rates.charge(stream.account, now):
            raise PeerBusy("asked too often", retry_after_s=1 / DIALS.per_s)
        self._num_dials += 1
        try:
            is_reachable = await _can_reach(host, message)
        finally:
            self._num_dials -= 1
        await stream.send(DialedBack(host=host, is_reachable=is_reachable), timeout_s=ASK_TIMEOUT_S)


def gateways(routes: Path) -> frozenset[str]:
    """The routers through which this machine reaches others, by Linux's table; none where there is no such table."""
    try:
        lines = routes.read_text().splitlines()[1:]
    except OSError:
        return frozenset()
    fields = [line.split() for line in lines]
    packed = [int(it[2], 16) for it in fields if len(it) > 2 and it[2] != "00000000"]
    return frozenset(str(ipaddress.IPv4Address(number.to_bytes(4, sys.byteorder))) for number in packed)


async def _can_reach(host: str, message: DialBack) -> bool:
    try:
        await reach(host, message.port, fingerprint=message.fingerprint, timeout_s=DIAL_TIMEOUT_S)
        if message.control_port != message.port:  # they are one in a private swarm
            await reach(host, message.control_port, timeout_s=DIAL_TIMEOUT_S)
    except PeerUnreachable as error:
        log.debug("can't reach %s: %s", host, error)
        return False
    return True
