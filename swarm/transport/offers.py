"""Offers of direct connections, asked for and made over authenticated p2p streams.

dialler: ask_offer(peer) --/swarm/offer: version--> listener: OfferDesk --offer with a ticket bound to the dialler-->
"""

import asyncio
import ipaddress
import logging
from collections.abc import Callable

import msgspec

from swarm.errors import PeerBusy, PeerDisconnected, PeerMisbehaved, ProtocolMismatch
from swarm.network import Node
from swarm.protocol import AskOffer, DirectOffer
from swarm.rates import Rate, Rates
from swarm.transport.direct import MAX_HOSTS, DirectListener, Offer, Tickets
from swarm.transport.stream import Stream

log = logging.getLogger(__name__)

OFFER_STREAM = "/swarm/offer"
"""Name of the p2p stream that hands out offers."""
MAX_OFFER_BYTES = 1024
MAX_OFFERS_AT_ONCE = 64

_decoder = msgspec.msgpack.Decoder(Offer)


async def ask_offer(node: Node, peer_id: str, *, version: int, timeout_s: float) -> Offer:
    """Ask a peer how to connect to it directly.

    Raises:
        PeerUnreachable, PeerTimeout, PeerDisconnected: no answer. PeerMisbehaved: no sense in it.
        ProtocolMismatch: the peer speaks another version.
    """
    reader, writer = await node.open_stream(peer_id, OFFER_STREAM, timeout_s)
    try:
        writer.write(version.to_bytes(2, "big"))
        size = int.from_bytes(await reader.readexactly(2), "big")
        if size > MAX_OFFER_BYTES:
            raise PeerMisbehaved(f"{peer_id} makes an offer of {size} bytes, limit {MAX_OFFER_BYTES}", peer_id=peer_id)
        offer = decode_offer(await reader.readexactly(size), peer_id=peer_id)
    except (ConnectionError, asyncio.IncompleteReadError) as error:
        raise PeerDisconnected(f"{peer_id} closed the stream without an offer", peer_id=peer_id) from error
    finally:
        writer.close()
    if offer.version != version:
        raise ProtocolMismatch(f"{peer_id} speaks protocol version {offer.version}, we speak {version}")
    return offer


async def ask_offer_over(stream: Stream, *, version: int, timeout_s: float) -> Offer:
    """The same over a stream to the peer's `offer` service, which is closed afterwards."""
    async with stream:
        await stream.send(AskOffer(), timeout_s=timeout_s)
        answer, _ = await stream.receive(timeout_s)
    if not isinstance(answer, DirectOffer):
        raise PeerMisbehaved(f"{type(answer).__name__} in place of DirectOffer", peer_id=stream.peer_id)
    return Offer(
        version=version, hosts=answer.hosts, port=answer.port, fingerprint=answer.fingerprint, ticket=answer.ticket
    )


def decode_offer(data: bytes, *, peer_id: str) -> Offer:
    """Read an offer.

    Raises:
        PeerMisbehaved: malformed.
    """
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise PeerMisbehaved(f"{peer_id} makes a malformed offer: {error}", peer_id=peer_id) from error


class OfferDesk:
    """Answers peers that ask for a direct connection.

    Args:
        node: for its addresses.
        listener: what is offered; None offers nothing.
        announce_hosts: addresses to offer; None for those of listener or node.
        has_room: whether one more connection would be taken, perhaps in the place of another.
        version: protocol version that we speak.
        timeout_s: how long a peer may take.
        rate: how often one peer may ask.
    """

    def __init__(
        self,
        node: Node,
        listener: DirectListener | None,
        *,
        announce_hosts: tuple[str, ...] | None,
        has_room: Callable[[], bool],
        version: int,
        timeout_s: float,
        rate: Rate,
    ) -> None:
        self._node = node
        self._listener = listener
        self.announce_hosts = announce_hosts
        self._has_room = has_room
        self._version = version
        self._timeout_s = timeout_s
        self._tickets = Tickets()
        self._rates = Rates(rate)
        self._num_answering = 0

    async def serve(self, stream: Stream) -> None:
        """The handler of the `offer` service, for peers that have come through a relay.

        Raises:
            PeerBusy: asked too often.
        """
        await stream.receive(self._timeout_s)
        if not self._rates.charge(stream.peer_id, self._now):
            raise PeerBusy("asked for too many offers", retry_after_s=1 / self._rates.rate.per_s)
        offer = self._offer_for(stream.peer_id)
        answer = DirectOffer(hosts=offer.hosts, port=offer.port, fingerprint=offer.fingerprint, ticket=offer.ticket)
        await stream.send(answer, timeout_s=self._timeout_s)

    def redeem(self, ticket: bytes) -> str | None:
        """The peer to whom a ticket was given; it is void afterwards."""
        return self._tickets.redeem(ticket, self._now)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer_id: str) -> None:
        """The handler of OFFER_STREAM."""
        if self._num_answering >= MAX_OFFERS_AT_ONCE or not self._rates.charge(peer_id, self._now):
            return
        self._num_answering += 1
        try:
            async with asyncio.timeout(self._timeout_s):
                version = int.from_bytes(await reader.readexactly(2), "big")
                if version != self._version:
                    log.info("%s speaks protocol version %d, we speak %d", peer_id, version, self._version)
                data = msgspec.msgpack.encode(self._offer_for(peer_id) if version == self._version else self._nothing)
                writer.write(len(data).to_bytes(2, "big") + data)
                while await reader.read(64):  # until the peer closes: the daemon would cut the tail of what we sent
                    pass
        except TimeoutError:
            log.debug("%s asked for an offer and did not take it", peer_id)
        finally:
            self._num_answering -= 1

    def _offer_for(self, peer_id: str) -> Offer:
        if self._listener is None or not self._has_room():
            return self._nothing
        ticket = self._tickets.issue(peer_id, self._now)
        if ticket is None:
            return self._nothing
        return Offer(
            version=self._version,
            hosts=self._hosts(self._listener),
            port=self._listener.port,
            fingerprint=self._listener.certificate.fingerprint,
            ticket=ticket,
        )

    @property
    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    @property
    def _nothing(self) -> Offer:
        return Offer(version=self._version)

    def _hosts(self, listener: DirectListener) -> tuple[str, ...]:
        """Where peers may try us: as configured, or the address we listen on, or the node's when that is any."""
        if self.announce_hosts is not None:
            return self.announce_hosts[:MAX_HOSTS]
        if not ipaddress.ip_address(listener.host).is_unspecified:
            return (listener.host,)
        hosts = [parts[2] for address in self._node.addresses if (parts := address.split("/"))[1] in ("ip4", "ip6")]
        return tuple(dict.fromkeys(hosts))[:MAX_HOSTS]
