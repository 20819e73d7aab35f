"""Makes connections to members of our private swarm, and says in our words why one can't be made.

    dial(endpoints, hello) ──TCP, TLS──► whose certificate? ──Hello──► Welcome ──► Dialled: a connection to hand over
                                                             └─► Refused ──► AccessDenied or PeerError

All endpoints are tried at once; the first that works is taken.
"""

import asyncio
import socket
import ssl
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from swarm.errors import AccessDenied, PeerError, PeerMisbehaved, PeerTimeout, PeerUnreachable
from swarm.network.addresses import Endpoint
from swarm.network.greeter import OutgoingGreeting
from swarm.network.greeting import Hello, Refused, Welcome
from swarm.network.tls import PRIVATE_PROTOCOL, trusting_context
from swarm.private.certificates import Passport, Proven, peer_id_in
from swarm.private.gate import Gate
from swarm.private.revocations import Revocation, decode_revocations
from swarm.protocol import error_from_wire


class ReachedOurselves(Exception):
    """The address is our own."""


class PeerRefused(PeerUnreachable):
    """The peer is there, and does not take the connection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialled:
    """A connection with a member that has let us in."""

    greeting: OutgoingGreeting
    proven: Proven
    welcome: Welcome


class Dialler:
    """Dials members.

    Args:
        gate: says who is one, and that we are.
        context: TLS with our certificates.
        learn: takes the revocation with which a peer proves that we are out.
    """

    def __init__(self, gate: Gate, context: ssl.SSLContext, learn: Callable[[Iterable[Revocation]], None]) -> None:
        self._gate = gate
        self._context = context
        self._learn = learn

    async def dial(
        self, endpoints: Sequence[Endpoint], hello: Hello, *, peer_id: str | None, timeout_s: float
    ) -> Dialled:
        """Connect to a peer, or with None to any member, at one of these endpoints.

        Raises:
            PeerUnreachable, PeerTimeout: nobody is there, or somebody else. PeerRefused: the peer does not want us.
            AccessDenied: we are no member any more.
            ReachedOurselves: it is us who listen there.
        """
        self._gate.check_ourselves(time.time())
        attempts = {asyncio.ensure_future(self._dial(endpoint, hello, peer_id, timeout_s)) for endpoint in endpoints}
        failures: list[str] = []
        pending = attempts
        try:
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for attempt in done:
                    error = attempt.exception()
                    if error is None:
                        attempts.discard(attempt)
                        return attempt.result()
                    if isinstance(error, PeerRefused) or not isinstance(error, PeerError):
                        raise error
                    failures.append(str(error))
        finally:
            for attempt in attempts:  # those that run, and those that came second
                attempt.cancel()
                attempt.add_done_callback(_drop)
        raise PeerUnreachable("; ".join(failures) or f"{peer_id} takes no connections", peer_id=peer_id)

    async def dial_on(self, pipe: socket.socket, hello: Hello, *, peer_id: str, timeout_s: float) -> Dialled:
        """Connect to a peer over a socket that leads to it somehow; errors as `dial`."""
        self._gate.check_ourselves(time.time())
        return await self._greet(self._connect_on(pipe), "through a relay", hello, peer_id, timeout_s)

    async def _dial(self, endpoint: Endpoint, hello: Hello, peer_id: str | None, timeout_s: float) -> Dialled:
        host, port = endpoint
        return await self._greet(self._connect(endpoint), f"{host} port {port}", hello, peer_id, timeout_s)

    async def _connect(self, endpoint: Endpoint) -> OutgoingGreeting:
        transport, greeting = await asyncio.get_running_loop().create_connection(
            OutgoingGreeting, *endpoint, ssl=self._context, server_hostname="swarm"
        )
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return greeting

    async def _connect_on(self, pipe: socket.socket) -> OutgoingGreeting:
        _, greeting = await asyncio.get_running_loop().create_unix_connection(
            OutgoingGreeting, sock=pipe, ssl=self._context, server_hostname="swarm"
        )
        return greeting

    async def _greet(
        self,
        connecting: Coroutine[Any, Any, OutgoingGreeting],
        where: str,
        hello: Hello,
        peer_id: str | None,
        timeout_s: float,
    ) -> Dialled:
        """Say Hello to who is there, if it is who we want."""
        greeting: OutgoingGreeting | None = None
        try:
            async with asyncio.timeout(timeout_s):
                greeting = await connecting
                self._check_certificate(greeting.process, peer_id)
                greeting.send(hello)
                return self._judge(greeting, await greeting.answer)
        except BaseException as error:
            if greeting is not None:
                greeting.transport.abort()
            if isinstance(error, TimeoutError):
                raise PeerTimeout(f"{where}: no answer within {timeout_s:g} s", peer_id=peer_id) from error
            if isinstance(error, PeerRefused):
                raise PeerRefused(f"{where} {error}", peer_id=peer_id) from error
            if isinstance(error, PeerError | OSError):
                raise PeerUnreachable(f"{where}: {self._reason(error)}", peer_id=peer_id) from error
            raise

    def _check_certificate(self, process: bytes, peer_id: str | None) -> None:
        """Whether it is who we want; that TLS has checked the chain is not said twice."""
        found = peer_id_in(process)
        if peer_id is not None and found != peer_id:  # it may be us: every machine calls itself 127.0.0.1
            raise PeerError(f"another peer is there, {found}")
        if found == peer_id_in(self._gate.passport.process):
            raise ReachedOurselves

    def _judge(self, greeting: OutgoingGreeting, answer: Welcome | Refused) -> Dialled:
        """What the listener's answer means.

        Raises:
            AccessDenied: it proves that we are out.
            PeerError: everything else is its own affair, or it is out itself.
        """
        now = time.time()
        if isinstance(answer, Refused):
            if answer.statement:
                self._learn(decode_revocations(answer.statement))
                self._gate.check_ourselves(now)
            raise PeerRefused(f"refuses us: {error_from_wire(answer.error, peer_id=None)}")
        try:
            proven = self._gate.admit(Passport(process=greeting.process, invitation=answer.invitation), now)
        except AccessDenied as error:
            raise PeerError(f"a peer of which can be said: {error}") from error
        if not proven.member.role.may_announce:
            raise PeerMisbehaved(f"{proven.member} serves, though a client may not")
        return Dialled(greeting=greeting, proven=proven, welcome=answer)

    def _reason(self, error: PeerError | OSError) -> str:
        swarm = self._gate.credentials.swarm
        if isinstance(error, ssl.SSLCertVerificationError):
            return f"no member of our swarm {swarm} ({error.verify_message})"
        if isinstance(error, ssl.SSLError):
            return f"no peer of a private swarm ({error.reason or error})"
        return str(error.strerror or error) if isinstance(error, OSError) else str(error)


def _drop(attempt: asyncio.Future[Dialled]) -> None:
    """Close a connection that is not needed, because another one was quicker."""
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().greeting.transport.abort()


async def is_private(endpoint: Endpoint, timeout_s: float) -> bool:
    """Whether a peer of a private swarm listens there: all that it tells a stranger."""
    context = trusting_context()
    context.set_alpn_protocols([PRIVATE_PROTOCOL])
    try:
        async with asyncio.timeout(timeout_s):
            transport, _ = await asyncio.get_running_loop().create_connection(
                asyncio.Protocol, *endpoint, ssl=context, server_hostname="swarm"
            )
    except (OSError, ssl.SSLError):
        return False
    found = transport.get_extra_info("ssl_object").selected_alpn_protocol()
    transport.abort()
    return bool(found == PRIVATE_PROTOCOL)
