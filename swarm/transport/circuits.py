"""The two ends of a connection through a relay: TLS between them, so that the relay does not know what it carries.

    dialler: Circuits.open ── OpenCircuit ─► relay ── CircuitOpened ─► Circuits.answer :target
                 ◄──────────── CircuitGreeting: fingerprint, nonce, signature ──────┘
            Connection ─TLS─ socket pair ═ CircuitBytes ═ relay ═ CircuitBytes ═ socket pair ─TLS─ Connection
            HELLO, its ticket: the dialler's signature of the nonce ──────────────────► who is it?

The target's signature proves the certificate to the dialler, and the dialler's signature, seen by nobody but the
target, proves the dialler: a relay can refuse, delay and count, but neither read, change, nor be anybody. What a
signature is good for is part of what is signed, as are both ends and the certificate: it is of no use elsewhere.

Each end puts TLS on a pair of sockets: so a relayed connection is like a direct one to all that is above.
"""

import asyncio
import logging
import secrets
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import cached_property

from swarm.errors import InvalidRequest, PeerBusy, PeerError, PeerMisbehaved, PeerUnreachable, SwarmError
from swarm.identity import Identity, verify
from swarm.network.listener import Handshake
from swarm.network.tasks import TaskSet
from swarm.network.tls import trusting_context
from swarm.protocol import CircuitBytes, CircuitGreeting, CircuitOpened, Message, OpenCircuit
from swarm.rates import Rate, Rates
from swarm.transport.direct import Certificate, check_certificate
from swarm.transport.stream import EndOfStream, Stream

log = logging.getLogger(__name__)

PIECE_BYTES = 32 << 10
NONCE_BYTES = 32
CALL_BACKS = Rate(burst=32, per_s=1)
"""How often one peer may have us connect to it, and how often one relay may say that somebody wants that."""
SEND_TIMEOUT_S = 30.0
"""How long the other end may leave a piece unread."""
_GREETING, _TICKET = b"swarm circuit greeting", b"swarm circuit ticket"

Redeem = Callable[[bytes], str | None]
"""Who a ticket proves its bearer to be."""


class Circuits:
    """Makes and takes connections through relays.

    Args:
        identity: who we are.
        is_relay: whether we have asked a peer to be our relay.
        accept: makes the protocol of a connection that is taken.
        dial: connects directly to a peer that asks us to.
        timeout_s: deadline of each step.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        is_relay: Callable[[str], bool],
        accept: Callable[[Redeem], asyncio.Protocol],
        dial: Callable[[str], Awaitable[object]],
        timeout_s: float,
    ) -> None:
        self._identity, self._is_relay, self._accept, self._dial = identity, is_relay, accept, dial
        self._timeout_s = timeout_s
        self._call_backs = Rates(CALL_BACKS)
        self._tasks = TaskSet()

    async def open(self, stream: Stream, target: str, make_protocol: Callable[[bytes], asyncio.Protocol]) -> None:
        """Connect to `target` over a stream to a relay that was opened for this.

        Args:
            stream: to the relay's service; it is used up.
            target: peer id.
            make_protocol: makes the protocol of the connection, given the ticket for its HELLO.

        Raises:
            PeerUnreachable: the target has no reservation there any more, or the way broke. PeerBusy, PeerTimeout:
            the relay, or the target. PeerMisbehaved: who answers is not the target.
        """
        await stream.send(OpenCircuit(peer_id=target, is_call_back=False), timeout_s=self._timeout_s)
        greeting = await self._first(stream, target)
        if not isinstance(greeting, CircuitGreeting):
            raise PeerMisbehaved(f"{type(greeting).__name__} in place of CircuitGreeting", peer_id=target)
        ticket = self._answer_to(greeting, target)
        near, far = socket.socketpair()
        pump = await self._start(stream, far)
        try:
            transport, _ = await asyncio.get_running_loop().create_unix_connection(
                lambda: make_protocol(ticket),
                sock=near,
                ssl=trusting_context(),
                server_hostname="swarm",
                ssl_handshake_timeout=self._timeout_s,
            )
        except BaseException as error:
            pump.cancel()
            near.close()
            if not isinstance(error, OSError | TimeoutError):
                raise
            reason = f"no TLS with {target} through {stream.peer_id}: {error!r}"
            raise PeerUnreachable(reason, peer_id=target) from error
        check_certificate(transport, greeting.fingerprint)

    async def call_back(self, stream: Stream, target: str) -> None:
        """Have `target` connect to us, over a stream to a relay that was opened for this; returns when it says it has.

        Raises:
            PeerError: it could not, or will not.
        """
        await stream.send(OpenCircuit(peer_id=target, is_call_back=True), timeout_s=self._timeout_s)
        with suppress(EndOfStream):
            message, _ = await stream.receive(self._timeout_s)
            raise PeerMisbehaved(f"{type(message).__name__} in place of a connection", peer_id=target)

    async def answer(self, stream: Stream) -> None:
        """The handler of the `circuit` service; returns when the connection is over.

        Raises:
            InvalidRequest: who opens the stream is no relay of ours. PeerBusy: called back too often.
            PeerError: we can't connect to who wants to be called back.
        """
        message, _ = await stream.receive(self._timeout_s)
        if not isinstance(message, CircuitOpened):
            raise PeerMisbehaved(f"{type(message).__name__} opens no circuit", peer_id=stream.peer_id)
        if not self._is_relay(stream.peer_id):
            raise InvalidRequest("we have no reservation with this relay")
        if not message.is_call_back:
            return await self._take(stream, dialler=message.peer_id)
        now = asyncio.get_running_loop().time()
        if not all(self._call_backs.charge(key, now) for key in (stream.peer_id, message.peer_id)):
            raise PeerBusy("asked too often to connect", retry_after_s=1 / CALL_BACKS.per_s)
        try:
            await self._dial(message.peer_id)
        except SwarmError as error:
            log.debug("can't connect to %s, who wants it: %s", message.peer_id, error)
            raise PeerUnreachable("no connection to you") from None  # what our network looks like is not theirs to know

    async def close(self) -> None:
        """End what was made."""
        await self._tasks.close()

    async def _take(self, stream: Stream, *, dialler: str) -> None:
        """Be the target of a circuit, to its end."""
        nonce, sides = secrets.token_bytes(NONCE_BYTES), {"dialler": dialler, "target": self._identity.peer_id}
        fingerprint = self._certificate.fingerprint
        signature = self._identity.sign(statement(_GREETING, fingerprint, nonce, **sides))
        await stream.send(
            CircuitGreeting(fingerprint=fingerprint, nonce=nonce, signature=signature), timeout_s=self._timeout_s
        )
        expected = statement(_TICKET, fingerprint, nonce, **sides)

        def redeem(ticket: bytes) -> str | None:
            return dialler if verify(dialler, expected, ticket) else None

        near, far = socket.socketpair()
        pump = await self._start(stream, far)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: Handshake(lambda: self._accept(redeem)),
                near,
                ssl=self._certificate.context,
                ssl_handshake_timeout=self._timeout_s,
            )
            await asyncio.wait([pump])
        except (OSError, TimeoutError) as error:
            log.debug("no TLS with %s through %s: %r", dialler, stream.peer_id, error)
            near.close()
        finally:
            pump.cancel()

    async def _start(self, stream: Stream, pipe: socket.socket) -> asyncio.Task[None]:
        """Carry bytes between a stream and a socket from now on."""
        reader, writer = await asyncio.open_unix_connection(sock=pipe, limit=PIECE_BYTES)
        pump = self._tasks.spawn(_carry(stream, reader, writer), name=f"circuit through {stream.peer_id}")
        pump.add_done_callback(lambda _: writer.close())  # a task that is cancelled at once never begins
        return pump

    def _answer_to(self, greeting: CircuitGreeting, target: str) -> bytes:
        """Our ticket for who greets us.

        Raises:
            PeerMisbehaved: it is not the target.
        """
        sides = {"dialler": self._identity.peer_id, "target": target}
        if not verify(target, statement(_GREETING, greeting.fingerprint, greeting.nonce, **sides), greeting.signature):
            raise PeerMisbehaved(f"who answers for {target} is somebody else", peer_id=target)
        return self._identity.sign(statement(_TICKET, greeting.fingerprint, greeting.nonce, **sides))

    async def _first(self, stream: Stream, target: str) -> Message:
        try:
            message, _ = await stream.receive(self._timeout_s)
        except EndOfStream as error:
            raise PeerUnreachable(f"{stream.peer_id} ended the circuit to {target}", peer_id=target) from error
        return message

    @cached_property
    def _certificate(self) -> Certificate:
        return Certificate.generate()


def statement(kind: bytes, fingerprint: bytes, nonce: bytes, *, dialler: str, target: str) -> bytes:
    """What is signed. No two meanings have the same bytes: the parts have fixed lengths, or none of their own."""
    return b"\n".join((kind, fingerprint + nonce, dialler.encode(), target.encode()))


async def _carry(stream: Stream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Move bytes until either end does; then end the stream."""
    ways = [asyncio.ensure_future(_send_all(reader, stream)), asyncio.ensure_future(_receive_all(stream, writer))]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        await stream.close()


async def _send_all(reader: asyncio.StreamReader, stream: Stream) -> None:
    with suppress(PeerError, ConnectionError):
        while data := await reader.read(PIECE_BYTES):
            await stream.send(CircuitBytes(), data, timeout_s=SEND_TIMEOUT_S)


async def _receive_all(stream: Stream, writer: asyncio.StreamWriter) -> None:
    with suppress(PeerError, ConnectionError, EndOfStream):
        while isinstance((received := await stream.receive())[0], CircuitBytes):
            writer.write(received[1])
            await writer.drain()
