"""How the two ends of a circuit make sure of each other: once for open swarms, once for members of a private one.

PinnedEnds   dialler ◄── CircuitGreeting: fingerprint, nonce, signature ─── target
                     ═══ TLS, the target's certificate ═══════════════════►
                     ─── HELLO, its ticket: a signature of the nonce ─────►
MemberEnds   dialler ═══ TLS, both passports, Hello, Welcome ═════════════►     as on every connection between members

The target's signature proves the certificate to the dialler, and the dialler's signature, seen by nobody but the
target, proves the dialler: a relay can refuse, delay and count, but neither read, change, nor be anybody. What a
signature is good for is part of what is signed, as are both ends and the certificate: it is of no use elsewhere.
Members prove more than who they are, and need no signatures besides; whoever the relay says comes must be who comes.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable
from functools import cached_property

from swarm.errors import PeerMisbehaved, PeerUnreachable
from swarm.identity import Identity, verify
from swarm.network import Node
from swarm.network.listener import Handshake
from swarm.network.tls import trusting_context
from swarm.protocol import CircuitGreeting
from swarm.transport.circuits import MakeProtocol, Pipe
from swarm.transport.direct import Certificate, check_certificate
from swarm.transport.stream import EndOfStream

log = logging.getLogger(__name__)

NONCE_BYTES = 32
_GREETING, _TICKET = b"swarm circuit greeting", b"swarm circuit ticket"

Redeem = Callable[[bytes], str | None]
"""Who a ticket proves its bearer to be."""


class PinnedEnds:
    """TLS with a certificate that its owner has signed with its identity.

    Args:
        identity: who we are.
        accept: makes the protocol of a connection that is taken.
        timeout_s: deadline of each step.
    """

    def __init__(self, identity: Identity, accept: Callable[[Redeem], asyncio.Protocol], timeout_s: float) -> None:
        self._identity, self._accept, self._timeout_s = identity, accept, timeout_s

    async def dial(self, pipe: Pipe, target: str, make_protocol: MakeProtocol) -> None:
        """See `swarm.transport.circuits.Ends`."""
        greeting = await self._greeting_of(pipe, target)
        ticket = self._answer_to(greeting, target)
        near = await pipe.open()
        try:
            transport, _ = await asyncio.get_running_loop().create_unix_connection(
                lambda: make_protocol(ticket),
                sock=near,
                ssl=trusting_context(),
                server_hostname="swarm",
                ssl_handshake_timeout=self._timeout_s,
            )
        except (OSError, TimeoutError) as error:
            reason = f"no TLS with {target} through {pipe.stream.peer_id}: {error!r}"
            raise PeerUnreachable(reason, peer_id=target) from error
        check_certificate(transport, greeting.fingerprint)

    async def take(self, pipe: Pipe, dialler: str) -> None:
        """See `swarm.transport.circuits.Ends`."""
        nonce, sides = secrets.token_bytes(NONCE_BYTES), {"dialler": dialler, "target": self._identity.peer_id}
        fingerprint = self._certificate.fingerprint
        signature = self._identity.sign(statement(_GREETING, fingerprint, nonce, **sides))
        await pipe.stream.send(
            CircuitGreeting(fingerprint=fingerprint, nonce=nonce, signature=signature), timeout_s=self._timeout_s
        )
        expected = statement(_TICKET, fingerprint, nonce, **sides)

        def redeem(ticket: bytes) -> str | None:
            return dialler if verify(dialler, expected, ticket) else None

        await asyncio.get_running_loop().connect_accepted_socket(
            lambda: Handshake(lambda: self._accept(redeem)),
            await pipe.open(),
            ssl=self._certificate.context,
            ssl_handshake_timeout=self._timeout_s,
        )

    async def _greeting_of(self, pipe: Pipe, target: str) -> CircuitGreeting:
        try:
            greeting, _ = await pipe.stream.receive(self._timeout_s)
        except EndOfStream as error:
            raise PeerUnreachable(f"{pipe.stream.peer_id} ended the circuit to {target}", peer_id=target) from error
        if not isinstance(greeting, CircuitGreeting):
            raise PeerMisbehaved(f"{type(greeting).__name__} in place of CircuitGreeting", peer_id=target)
        return greeting

    def _answer_to(self, greeting: CircuitGreeting, target: str) -> bytes:
        """Our ticket for who greets us.

        Raises:
            PeerMisbehaved: it is not the target.
        """
        sides = {"dialler": self._identity.peer_id, "target": target}
        if not verify(target, statement(_GREETING, greeting.fingerprint, greeting.nonce, **sides), greeting.signature):
            raise PeerMisbehaved(f"who answers for {target} is somebody else", peer_id=target)
        return self._identity.sign(statement(_TICKET, greeting.fingerprint, greeting.nonce, **sides))

    @cached_property
    def _certificate(self) -> Certificate:
        return Certificate.generate()


def statement(kind: bytes, fingerprint: bytes, nonce: bytes, *, dialler: str, target: str) -> bytes:
    """What is signed. No two meanings have the same bytes: the parts have fixed lengths, or none of their own."""
    return b"\n".join((kind, fingerprint + nonce, dialler.encode(), target.encode()))


class MemberEnds:
    """A raw stream between two members of a private swarm, as it would be without a relay.

    Args:
        node: our membership.
        stream_name: of that stream.
        accept: makes the protocol of one that is taken, given the peer.
        timeout_s: deadline of each step.
    """

    def __init__(self, node: Node, stream_name: str, accept: Callable[[str], asyncio.Protocol], timeout_s: float):
        self._node, self._stream_name, self._accept, self._timeout_s = node, stream_name, accept, timeout_s

    async def dial(self, pipe: Pipe, target: str, make_protocol: MakeProtocol) -> None:
        """See `swarm.transport.circuits.Ends`."""
        near = await pipe.open()
        await self._node.open_stream_on(near, target, self._stream_name, make_protocol(b""), timeout_s=self._timeout_s)

    async def take(self, pipe: Pipe, dialler: str) -> None:
        """See `swarm.transport.circuits.Ends`."""
        near = await pipe.open()
        await self._node.take_stream_on(near, dialler, self._stream_name, self._accept, timeout_s=self._timeout_s)
