"""The direct carrier: TLS 1.3 over TCP, pinned to a certificate and opened with a ticket.

The client learns host, port, the certificate's fingerprint and a single-use ticket over the peer's authenticated p2p
stream. The fingerprint proves the server to the client, the ticket proves the client to the server; no certificate
authority is involved, and the certificate lives as long as the process. This module knows nothing of streams or
services.

    DirectListener --accept, TLS--> make_protocol()      dial(offer) --TCP, TLS, fingerprint--> (transport, protocol)
"""

import asyncio
import datetime
import hashlib
import ipaddress
import secrets
import socket
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from swarm.errors import PeerMisbehaved, PeerUnreachable
from swarm.network.listener import CONNECTIONS, TlsListener
from swarm.network.tls import server_context, trusting_context
from swarm.rates import Rate

TICKET_BYTES = 32
TICKET_LIFETIME_S = 30.0
MAX_TICKETS = 4096
MAX_TICKETS_PER_PEER = 16
MAX_HOSTS = 8


class Offer(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """Where and how to connect directly. Without hosts there is no direct way."""

    version: Annotated[int, msgspec.Meta(ge=0, le=65535)]
    hosts: Annotated[tuple[Annotated[str, msgspec.Meta(max_length=64)], ...], msgspec.Meta(max_length=MAX_HOSTS)] = ()
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    fingerprint: Annotated[bytes, msgspec.Meta(max_length=32)] = b""
    ticket: Annotated[bytes, msgspec.Meta(max_length=TICKET_BYTES)] = b""


class Tickets:
    """Single-use, short-lived proofs that a peer id asked for a connection. Pure but for the random bytes."""

    def __init__(self, make_random: Callable[[int], bytes] = secrets.token_bytes) -> None:
        self._make_random = make_random
        self._issued: dict[bytes, tuple[str, float]] = {}

    def issue(self, peer_id: str, now: float) -> bytes | None:
        """A new ticket for the peer, or None when too many are out."""
        self._expire(now)
        held = sum(owner == peer_id for owner, _ in self._issued.values())
        if held >= MAX_TICKETS_PER_PEER or len(self._issued) >= MAX_TICKETS:
            return None
        ticket = self._make_random(TICKET_BYTES)
        self._issued[ticket] = (peer_id, now + TICKET_LIFETIME_S)
        return ticket

    def redeem(self, ticket: bytes, now: float) -> str | None:
        """The peer to whom the ticket was given; None when it is unknown, used or expired. It is void afterwards."""
        self._expire(now)
        owner = self._issued.pop(ticket, None)
        return owner[0] if owner is not None else None

    def _expire(self, now: float) -> None:
        while self._issued:
            ticket, (_, deadline) = next(iter(self._issued.items()))  # the oldest
            if deadline > now:
                return
            del self._issued[ticket]


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """A self-signed certificate of this process and its SHA-256 fingerprint."""

    context: ssl.SSLContext
    fingerprint: bytes

    @classmethod
    def generate(cls) -> "Certificate":
        """Make a key (P-256) and a certificate that nobody needs to trust: clients compare the fingerprint."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "swarm")])
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=3650))
            .sign(key, hashes.SHA256())
        )
        encoded = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        context = server_context(encoded + certificate.public_bytes(serialization.Encoding.PEM))
        der = certificate.public_bytes(serialization.Encoding.DER)
        return cls(context=context, fingerprint=hashlib.sha256(der).digest())


class DirectListener(TlsListener):
    """A TlsListener with a certificate of its own.

    Args:
        make_protocol: makes the protocol of one connection.
        may_accept: whether there is room for one more connection.
        handshake_timeout_s: deadline of the TLS handshake.
        max_handshakes: handshakes at a time, of all hosts.
        rate: how often one host may connect.
    """

    def __init__(
        self,
        make_protocol: Callable[[], asyncio.Protocol],
        *,
        may_accept: Callable[[], bool],
        handshake_timeout_s: float,
        max_handshakes: int,
        rate: Rate = CONNECTIONS,
    ) -> None:
        self.certificate = Certificate.generate()
        super().__init__(
            self.certificate.context,
            make_protocol,
            may_accept=may_accept,
            handshake_timeout_s=handshake_timeout_s,
            max_handshakes=max_handshakes,
            rate=rate,
        )


async def dial(
    offer: Offer, make_protocol: Callable[[], asyncio.Protocol], *, peer_id: str, timeout_s: float
) -> tuple[asyncio.Transport, asyncio.Protocol]:
    """Connect to the first of the offer's hosts that answers with the right certificate; all are tried at once.

    Raises:
        PeerUnreachable: when none does. PeerMisbehaved: when the offer is no use.
    """
    hosts = _check_offer(offer, peer_id)
    attempts = {asyncio.ensure_future(_dial_host(host, offer, make_protocol, timeout_s)): host for host in hosts}
    failures: list[str] = []
    pending = set(attempts)
    try:
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for attempt in done:
                if attempt.exception() is None:
                    return attempt.result()
                failures.append(f"{attempts[attempt]}: {attempt.exception() or type(attempt.exception()).__name__}")
    finally:
        for attempt in pending:
            attempt.cancel()
        await asyncio.gather(*pending, return_exceptions=True)  # so that nothing comes to be when nobody wants it
    raise PeerUnreachable(f"no direct way to {peer_id}, port {offer.port}: {'; '.join(failures)}", peer_id=peer_id)


async def _dial_host(
    host: str, offer: Offer, make_protocol: Callable[[], asyncio.Protocol], timeout_s: float
) -> tuple[asyncio.Transport, asyncio.Protocol]:
    async with asyncio.timeout(timeout_s):
        transport, protocol = await asyncio.get_running_loop().create_connection(
            make_protocol,
            host,
            offer.port,
            ssl=trusting_context(),
            server_hostname="swarm",
            ssl_handshake_timeout=timeout_s,
        )
    check_certificate(transport, offer.fingerprint)
    transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return transport, protocol


async def reach(host: str, port: int, *, timeout_s: float, fingerprint: bytes | None = None) -> None:
    """Whether a port of an address takes connections; with a `fingerprint`, whether that certificate is there.

    Raises:
        PeerUnreachable: why not.
    """
    is_tls = fingerprint is not None
    try:
        async with asyncio.timeout(timeout_s):
            transport, _ = await asyncio.get_running_loop().create_connection(
                asyncio.Protocol,
                host,
                port,
                ssl=trusting_context() if is_tls else None,
                server_hostname="swarm" if is_tls else None,
            )
    except (OSError, TimeoutError) as error:
        raise PeerUnreachable(f"no connection to {host} port {port}: {error or type(error).__name__}") from error
    try:
        if fingerprint is not None:
            check_certificate(transport, fingerprint)
    finally:
        transport.abort()


def check_certificate(transport: asyncio.Transport, fingerprint: bytes) -> None:
    """Whether a connection has shown the certificate that it had to; it is ended otherwise.

    Raises:
        PeerUnreachable: it has not.
    """
    presented = transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
    if presented is None or not secrets.compare_digest(hashlib.sha256(presented).digest(), fingerprint):
        transport.abort()
        raise PeerUnreachable("another certificate than the peer's")


def _check_offer(offer: Offer, peer_id: str) -> Sequence[str]:
    """The offer's hosts, if they are addresses and the rest is complete."""
    try:
        hosts = [str(ipaddress.ip_address(host)) for host in offer.hosts]
    except ValueError as error:
        raise PeerMisbehaved(f"{peer_id} offers {offer.hosts!r}, which are not addresses", peer_id=peer_id) from error
    if not offer.port or len(offer.fingerprint) != 32 or len(offer.ticket) != TICKET_BYTES:
        raise PeerMisbehaved(f"{peer_id} makes an incomplete offer of a direct connection", peer_id=peer_id)
    return hosts
