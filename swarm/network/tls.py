"""TLS 1.3 contexts, from keys and certificates that live in memory.

pinned(...)       one side shows a certificate that the other knows by its fingerprint (swarm.transport.direct)
between members   both sides show chains that end at the authority of a private swarm (swarm.network.members)
"""

import os
import ssl

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509 import load_der_x509_certificate

from swarm.identity import Identity
from swarm.private.gate import Gate

PRIVATE_PROTOCOL = "swarm-private/1"
"""Protocol name by which a listener of a private swarm tells strangers what it is."""


def member_contexts(gate: Gate, identity: Identity) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The contexts of a member: as a server, as a client. Either demands the other side's chain."""
    chain = [load_der_x509_certificate(data) for data in (gate.passport.process, gate.passport.invitation)]
    key = identity.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    pem = key + b"".join(certificate.public_bytes(Encoding.PEM) for certificate in chain)
    server, client = server_context(pem), _context(ssl.PROTOCOL_TLS_CLIENT)
    load_chain(client, pem)
    for context in (server, client):
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=gate.authority)
        context.set_alpn_protocols([PRIVATE_PROTOCOL])
    return server, client


def server_context(pem: bytes) -> ssl.SSLContext:
    """A server that shows what is in `pem`, and demands nothing of its clients."""
    context = _context(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0  # connections are not resumed
    load_chain(context, pem)
    return context


def trusting_context() -> ssl.SSLContext:
    """A client that takes any certificate: the caller looks at it before it says anything."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT)
    context.verify_mode = ssl.CERT_NONE
    return context


def load_chain(context: ssl.SSLContext, pem: bytes) -> None:
    """Load key and certificates, which the ssl module takes from a file only: one that no disk ever sees."""
    with os.fdopen(os.memfd_create("swarm"), "wb") as file:
        file.write(pem)
        file.flush()
        context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")


def _context(purpose: int) -> ssl.SSLContext:
    context = ssl.SSLContext(purpose)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    return context
