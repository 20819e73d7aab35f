"""Everything that reads bytes of strangers, as functions that can be given any bytes.

A target gets bytes and returns, or raises what its caller expects of it (`expected`); everything else is a bug, and so
is a result that breaks an invariant. `seeds` are valid inputs: what mutation starts from. What mutations have found
worth keeping lies in corpus/TARGET/, one input per file. All keys are fixed, so signatures in the corpus stay good.
Adapters, training, federated rounds and HTTP have files of their own.

    TARGETS ──► test_decoders.py (corpus, and hypothesis)      campaign.py (atheris, coverage-guided, for hours)
"""

import atexit
import ssl
import struct
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.message import DecodeError

from swarm import catalog, codec, protocol, registry
from swarm.checkpoint import content, hub
from swarm.errors import SwarmError
from swarm.identity import Identity
from swarm.intake import Intake
from swarm.leases import Claim
from swarm.link import Link
from swarm.network import roll
from swarm.network.addresses import AddressBook, Card
from swarm.network.calls import Answer, Call, Cancel, Failure, Known, Statements, decode_link_message
from swarm.network.greeting import CALLS, VERSION, FrameReader, Hello, Refused, Welcome, decode_greeting
from swarm.network.hive import DHTRecord, P2PDaemonError, p2pd_pb2
from swarm.network.records import MemberRecords, SignedRecords
from swarm.network.wire import DelimitedReader, varint
from swarm.private.certificates import Passport, Role, read_invitation, read_passport, to_der
from swarm.private.credentials import Credentials
from swarm.private.gate import Gate
from swarm.private.revocations import Revocations, decode_revocations, encode_revocations, revoke
from swarm.server.pages import PAGE_SIZE
from swarm.server.session_state import Arrival, pack
from swarm.step_chunk import StepChunk
from swarm.transport.direct import Certificate, Offer, _check_offer
from swarm.transport.frames import HELLO_PREFIX, FrameDecoder, Kind, encode_frame
from swarm.transport.limits import Limits
from swarm.transport.mux import Mux
from swarm.transport.offers import decode_offer
from swarm.types import BlockRange, ServerState
from tests.fuzz.adapter_targets import ADAPTER_TARGETS
from tests.fuzz.dht import DhtHandlers
from tests.fuzz.federated_targets import FEDERATED_TARGETS
from tests.fuzz.http_targets import HTTP_TARGETS
from tests.fuzz.target import MSGPACK, Target, framed, pieces
from tests.server.test_session_state import HIDDEN, LAYOUT, MAX_LENGTH, OPENED, saved_session
from tests.swarm.private.labs import Lab
from tests.swarm.test_protocol import MESSAGES, STEP

PEER = Identity(Ed25519PrivateKey.from_private_bytes(b"\1" * 32))
NOW = time.time()


# --- the transport ---


def frames(data: bytes) -> None:
    """Any split; what waits is never more than one frame."""
    decoder, cut = FrameDecoder(), 1 + (data[0] if data else 0)
    for start in range(0, len(data), cut):
        decoder.feed(data[start : start + cut])
        assert decoder.num_waiting <= 16 + 2 * (1 << 18)


def frame_seeds() -> list[bytes]:
    hello = encode_frame(Kind.HELLO, 0, HELLO_PREFIX + protocol.PROTOCOL_VERSION.to_bytes(2, "big") + bytes(32))
    opening = encode_frame(Kind.OPEN, 1, b"session")
    message = protocol.encode(STEP)
    data = encode_frame(Kind.DATA, 1, message, num_body_bytes=8) + bytes(8)
    piece = encode_frame(Kind.DATA, 1, message, flags=1, num_body_bytes=4) + bytes(4)
    rest = encode_frame(Kind.DATA, 1, num_body_bytes=4) + bytes(4)
    end = encode_frame(Kind.FIN, 1)
    error = encode_frame(Kind.ERR, 1, protocol.error_to_wire(SwarmError("x")))
    credit = encode_frame(Kind.CREDIT, 1, bytes(4))
    pings = encode_frame(Kind.PING, 0, bytes(8)) + encode_frame(Kind.PONG, 0, bytes(8))
    return [
        hello,
        hello + opening + data + end,
        hello + opening + piece + rest + credit,
        hello + opening + error + pings,
    ]


def mux(data: bytes) -> None:
    """One side of a connection: whatever comes, its books are right, and closing frees everything."""
    limits = Limits(max_buffered_bytes=1 << 16, window_bytes=1 << 12, max_message_bytes=1 << 14)
    side = Mux(is_dialler=False, limits=limits, now=0.0)
    try:
        for event in side.receive(data, 0.1):
            cost = getattr(event, "cost", None)
            if cost is not None and len(data) % 2:
                side.consume(event.stream_id, cost)  # type: ignore[attr-defined]
        side.take_output()
        side.tick(0.2)
    finally:
        assert side.num_buffered >= 0
        side.close()
        assert side.num_buffered == 0


def tensor(data: bytes) -> None:
    """A description and a body: as many bytes as were declared, or a refusal."""
    size = int.from_bytes(data[:2], "big")
    try:
        spec = msgspec.msgpack.decode(data[2 : 2 + size], type=protocol.TensorSpec)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return
    decoded = codec.decode_tensor(spec, data[2 + size :])
    assert decoded.shape == spec.shape


def tensor_seeds() -> list[bytes]:
    seeds = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for encoding in protocol.Encoding:
            spec, body = codec.encode_tensor(torch.ones(2, 4, dtype=dtype), encoding)
            head = msgspec.msgpack.encode(spec)
            seeds.append(len(head).to_bytes(2, "big") + head + bytes(body))
    return seeds


def message(data: bytes) -> None:
    """What was read can be written, and read again."""
    found = protocol.decode(data)
    assert protocol.encode(protocol.decode(protocol.encode(found))) == protocol.encode(found)


def error(data: bytes) -> None:
    """Every bytes are some error."""
    found = protocol.error_from_wire(data, peer_id="p")
    assert isinstance(found, SwarmError)
    protocol.error_to_wire(found)


def error_seeds() -> list[bytes]:
    return [msgspec.msgpack.encode([code, "text", 1.5]) for code in (0, 1, 6, 16, 19, 32, 36, 255)]


def offer(data: bytes) -> None:
    """An offer is usable or refused."""
    _check_offer(decode_offer(data, peer_id="p"), "p")


def offer_seeds() -> list[bytes]:
    whole = Offer(version=2, hosts=("127.0.0.1", "::1"), port=1, fingerprint=bytes(32), ticket=bytes(32))
    return [msgspec.msgpack.encode(it) for it in (whole, Offer(version=2))]


@cache
def _certificate() -> Certificate:
    return Certificate.generate()


def handshake(data: bytes) -> None:
    """The first bytes that a stranger says on the port of direct connections."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    side = _certificate().context.wrap_bio(incoming, outgoing, server_side=True)
    incoming.write(data)
    side.do_handshake()
    assert outgoing.pending < 1 << 16


def handshake_seeds() -> list[bytes]:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname="swarm").do_handshake()
    return [outgoing.read(), b"GET / HTTP/1.1\r\n\r\n"]


# --- sessions ---


def session(data: bytes) -> None:
    """A series of messages to one session: both ends of its link keep their books, or refuse."""
    intake, link = Intake(2, max_length=64), Link(2, to_client=False)
    for piece in pieces(data):
        found = protocol.decode(piece)
        if isinstance(found, protocol.Forward):
            link.connect(held=found.held, as_of=found.as_of, max_step_tokens=found.max_step_tokens)
        if not isinstance(found, protocol.Step) or sum(found.num_tokens) > 256:
            continue
        chunk = StepChunk.of(found, torch.zeros(sum(found.num_tokens), 2))
        accepted = intake.accept(chunk)
        assert all(0 <= length <= 64 for length in intake.lengths)
        if accepted is None:
            continue
        if accepted.is_new_step:
            assert accepted.base is not None
            link.begin(accepted.step_id, order=accepted.order, base=accepted.base, outputs_from=accepted.outputs_from)
        for row, count in enumerate(accepted.num_tokens):
            link.append(row, intake.lengths[row] - count, torch.zeros(count, 2))
        while (sent := link.next_chunk()) is not None:
            assert len(sent.hidden_states) == sum(sent.num_tokens) > 0


def session_seeds() -> list[bytes]:
    def step(step_id: int, positions: tuple[int, int], counts: tuple[int, int], **fields: Any) -> protocol.Step:
        spec = protocol.TensorSpec(protocol.DType.FLOAT32, (sum(counts), 2))
        values = {"order": None, "base": positions, "outputs_from": positions, **fields}
        return protocol.Step(step_id=step_id, positions=positions, num_tokens=counts, hidden_states=spec, **values)

    forward = protocol.Forward(epoch=0, peer_id="p", push_key=bytes(16), held=(0, 0), as_of=-1, max_step_tokens=4)
    prompt, decode = step(0, (0, 0), (5, 3)), step(1, (5, 3), (1, 1))
    beam = step(2, (4, 4), (1, 1), order=(1, 1), base=(4, 4))
    again = msgspec.structs.replace(forward, held=(2, 2), as_of=1)
    sequences: list[list[protocol.Message]] = [[prompt, decode], [forward, prompt, decode, beam, again], [decode]]
    return [framed(protocol.encode(it) for it in sequence) for sequence in sequences]


def state(data: bytes) -> None:
    """A session that another server hands over: its books are those of the rows, its pages are pages that there are."""
    arrival: Arrival | None = None
    for piece in pieces(data):
        if arrival is None:
            found = protocol.decode(piece)
            if not isinstance(found, protocol.SessionState):
                return
            arrival = Arrival(found, OPENED, LAYOUT, HIDDEN)
            if arrival.num_bytes > 1 << 16:
                return
            arrival.allocate()
        else:
            arrival.take(protocol.StatePart(offset=int.from_bytes(piece[:4], "big")), memoryview(piece[4:]))
    if arrival is None or not arrival.is_whole:
        return
    saved = arrival.finish()
    intake, link = Intake(2, max_length=MAX_LENGTH), Link(2, to_client=False)
    intake.resume(saved.intake)
    assert all(0 <= length <= MAX_LENGTH for length in (*intake.lengths, *saved.image.lengths))
    for length, pages in zip(saved.image.lengths, saved.image.layouts, strict=True):
        assert len(pages) == -(-length // PAGE_SIZE) and all(0 <= page < saved.image.num_pages for page in pages)
    if saved.sent is not None:
        link.resume(saved.sent.link)
        link.connect(held=link.lengths, as_of=link.step_id)
        assert link.history_bytes <= 1 << 16


def state_seeds() -> list[bytes]:
    seeds = []
    for saved in (
        saved_session(),
        saved_session((3, 0), order=(0, 0), base=(3, 1)),
        replace(saved_session(), sent=None),
    ):
        message, body = pack(saved, OPENED, LAYOUT)
        cut = len(body) // 2
        parts = [(0).to_bytes(4, "big") + body[:cut], cut.to_bytes(4, "big") + body[cut:]]
        seeds.append(framed([protocol.encode(message), *parts]))
    return seeds


# --- records and the DHT ---


def record(data: bytes) -> None:
    """What may be stored: never raises, and what is stripped of its proof is one small byte string."""
    size, expiry = data[0] if data else 0, struct.unpack(">d", data[1:9])[0] if len(data) >= 9 else 0.0
    found = DHTRecord(bytes(20), data[9 : 9 + size], data[9 + size :], expiry)
    for validator in _validators():
        if validator.validate(found):
            payload = msgpack.unpackb(validator.strip_value(found))
            assert isinstance(payload, bytes) and len(payload) <= 1024


@cache
def _validators() -> tuple[SignedRecords, SignedRecords]:
    return SignedRecords(PEER), MemberRecords(PEER, Gate(_lab().invite(), PEER))


@cache
def _lab() -> Lab:
    return Lab(now=datetime.now(UTC).replace(microsecond=0), key=Ed25519PrivateKey.from_private_bytes(b"\2" * 32))


def record_seeds() -> list[bytes]:
    subkey, seeds = msgpack.packb(PEER.peer_id), []
    for validator in _validators():
        found = DHTRecord(bytes(20), subkey, msgpack.packb(b"payload"), NOW + 60)
        value = replace(found, value=validator.sign_value(found)).value
        seeds.append(bytes([len(subkey)]) + struct.pack(">d", NOW + 60) + subkey + value)
    return seeds


def server_record(data: bytes) -> None:
    """A record that was read can be written again."""
    found = registry.ServerRecord.decode(data, peer_id=PEER.peer_id, model="ab" * 32)
    assert registry.ServerRecord.decode(found.encode(), peer_id=PEER.peer_id, model="ab" * 32).blocks == found.blocks


def server_record_seeds() -> list[bytes]:
    found = registry.ServerRecord(
        peer_id=PEER.peer_id,
        model="ab" * 32,
        blocks=BlockRange(0, 4),
        state=ServerState.ONLINE,
        decode_tps=10.0,
        load=0.5,
        kv_free_tokens=7,
        quantization="int8",
        dtype="float32",
        public_name="näme",
        version="1",
        expires_at=NOW,
    )
    return [found.encode()]


def claim(data: bytes) -> None:
    """A claim to move: what was read is written as it was."""
    assert Claim.decode(data, peer_id=PEER.peer_id).encode() == data


def claim_seeds() -> list[bytes]:
    return [Claim(peer_id=PEER.peer_id, leaves=BlockRange(0, 4), takes=BlockRange(2, 6), expires_at=NOW).encode()]


def model_entry(data: bytes) -> None:
    """A name in the catalog."""
    catalog._decoder.decode(data)


def model_entry_seeds() -> list[bytes]:
    return [msgspec.msgpack.encode(catalog.ModelEntry(digest="ab" * 32, name="tiny", num_blocks=4))]


def dht_request(data: bytes) -> None:
    """A call to one of the DHT's handlers: answered, or an error of that call."""
    _handlers().call(data[0] if data else 0, data[1:])


@cache
def _handlers() -> DhtHandlers:
    handlers = DhtHandlers(PEER)
    atexit.register(handlers.close)
    return handlers


def dht_seeds() -> list[bytes]:
    return _handlers().seeds(record_seeds()[0])


# --- the daemon's socket ---


def daemon_wire(data: bytes) -> None:
    """What the libp2p daemon passes on: its own framing, then protobuf."""
    reader = DelimitedReader(1 << 16)
    reader.feed(data)
    while (piece := reader.next()) is not None:
        p2pd_pb2.PersistentConnectionResponse.FromString(piece)


def daemon_seeds() -> list[bytes]:
    request = p2pd_pb2.CallUnaryRequest(peer=bytes(38), proto="DHTProtocol.rpc_ping", data=b"x")
    messages = [
        p2pd_pb2.PersistentConnectionResponse(callId=bytes(16), requestHandling=request),
        p2pd_pb2.PersistentConnectionResponse(callId=bytes(16), cancel=p2pd_pb2.Cancel()),
    ]
    return [varint(it.ByteSize()) + it.SerializeToString() for it in messages]


# --- private swarms ---


def greeting(data: bytes) -> None:
    """The first words between members."""
    reader = FrameReader(4096)
    reader.feed(data)
    if (piece := reader.next()) is not None:
        decode_greeting(piece)


def greeting_seeds() -> list[bytes]:
    card = Card.make(PEER, [("127.0.0.1", 1)], NOW)
    greetings = (Hello(VERSION, CALLS, bytes(260), card), Welcome(bytes(260), None), Refused(b"error", b"statement"))
    return [len(it).to_bytes(4, "big") + it for it in map(msgspec.msgpack.encode, greetings)]


def link_message(data: bytes) -> None:
    """A call between members."""
    decode_link_message(data)


def link_seeds() -> list[bytes]:
    messages = (
        Call(1, "name", b"data"),
        Answer(1, b"x"),
        Failure(1, "no"),
        Cancel(1),
        Known(bytes(16)),
        Statements(b""),
    )
    return [msgspec.msgpack.encode(it) for it in messages]


def card(data: bytes) -> None:
    """An address card: believed with its owner's signature only."""
    book = AddressBook()
    found = msgspec.msgpack.decode(data, type=Card)
    book.add(found, NOW)
    assert book.get(found.peer_id) == found


def card_seeds() -> list[bytes]:
    return [msgspec.msgpack.encode(Card.make(PEER, [("10.0.0.1", 31337), ("::1", 1)], NOW))]


def members(data: bytes) -> None:
    """Whom another member says that it has met: invitations that the authority has signed."""
    for invitation in roll._decoder.decode(data):
        assert read_invitation(invitation, _lab().der).name == "gpu1", "a signature was forged"


def members_seeds() -> list[bytes]:
    return [msgspec.msgpack.encode([to_der(_lab().invite().invitation)])]


def passport(data: bytes) -> None:
    """Two certificates."""
    size = int.from_bytes(data[:2], "big")
    found = read_passport(Passport(process=data[2 : 2 + size], invitation=data[2 + size :]), _lab().der)
    assert found.peer_id == PEER.peer_id, "a signature was forged"


def passport_seeds() -> list[bytes]:
    found = _lab().invite().passport_for(PEER)
    return [len(found.process).to_bytes(2, "big") + found.process + found.invitation]


@cache
def _revoked() -> tuple[Credentials, bytes]:
    member, admin = _lab().invite("x"), _lab().invite("y", Role.ADMIN)
    lab, signer = _lab(), to_der(admin.invitation)
    both = (
        revoke(member.member, lab.der, lab.key, NOW),
        revoke(member.member, lab.der, admin.key, NOW, signer=signer),
    )
    return member, encode_revocations(both)


def revocations(data: bytes) -> None:
    """Statements: nobody is revoked whom nobody has signed away."""
    known = Revocations(_lab().der)
    known.add(decode_revocations(data), NOW)
    assert {entry.member for entry in known} <= {_revoked()[0].member.id}


def credentials(data: bytes) -> None:
    """The file."""
    Credentials.from_bytes(data)


# --- files ---


def identity(data: bytes) -> None:
    """The file of a key."""
    assert Identity.from_bytes(data).to_bytes() == data


def checkpoint(data: bytes) -> None:
    """A directory with a config, and an index or a safetensors file."""
    kind, rest = data[:1], data[1:]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / ("config.json" if kind < b"\x55" else content.INDEX_FILE)).write_bytes(rest)
        if kind > b"\xaa":
            (directory / content.INDEX_FILE).rename(directory / content.SINGLE_FILE)
        found = content.read_config(directory) if kind < b"\x55" else content.read_weight_map(directory)
        if kind < b"\x55":
            content.content_digest(found, {"a": "b"})
        else:
            assert all("/" not in shard and shard.endswith(".safetensors") for shard in found.values())


def checkpoint_seeds() -> list[bytes]:
    header = b'{"a.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"__metadata__":{}}'
    return [
        b'\x00{"model_type":"llama","hidden_size":64,"x":[1.5e3,null,true,"\\u00e4"]}',
        b'\x60{"metadata":{},"weight_map":{"a.weight":"model-00001-of-00002.safetensors"}}',
        b"\xff" + len(header).to_bytes(8, "little") + header + bytes(4),
    ]


def hub_note(data: bytes) -> None:
    """What was remembered of the hub's answer."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "note"
        path.write_bytes(data)
        hub._read_note(path)


def hub_seeds() -> list[bytes]:
    return [b'{"commit":"' + b"a" * 40 + b'","small":["config.json"],"weights":["x.safetensors"],"sha256":{}}']


TARGETS: dict[str, Target] = {
    "frames": Target(run=frames, seeds=frame_seeds),
    "mux": Target(run=mux, seeds=frame_seeds),
    "message": Target(run=message, seeds=lambda: [protocol.encode(it) for it in MESSAGES]),
    "error": Target(run=error, seeds=error_seeds, expected=()),
    "tensor": Target(run=tensor, seeds=tensor_seeds),
    "offer": Target(run=offer, seeds=offer_seeds),
    "handshake": Target(run=handshake, seeds=handshake_seeds, expected=(ssl.SSLError,)),
    "session": Target(run=session, seeds=session_seeds),
    "state": Target(run=state, seeds=state_seeds),
    "record": Target(run=record, seeds=record_seeds, expected=()),
    "server_record": Target(run=server_record, seeds=server_record_seeds),
    "claim": Target(run=claim, seeds=claim_seeds),
    "model_entry": Target(run=model_entry, seeds=model_entry_seeds, expected=MSGPACK),
    "dht_request": Target(run=dht_request, seeds=dht_seeds, expected=()),
    "daemon_wire": Target(run=daemon_wire, seeds=daemon_seeds, expected=(P2PDaemonError, DecodeError)),
    "greeting": Target(run=greeting, seeds=greeting_seeds),
    "link_message": Target(run=link_message, seeds=link_seeds),
    "card": Target(run=card, seeds=card_seeds, expected=(SwarmError, *MSGPACK)),
    "members": Target(run=members, seeds=members_seeds, expected=(SwarmError, *MSGPACK)),
    "passport": Target(run=passport, seeds=passport_seeds),
    "revocations": Target(run=revocations, seeds=lambda: [_revoked()[1]]),
    "credentials": Target(run=credentials, seeds=lambda: [_lab().invite(peers=("10.0.0.1:1",)).to_bytes()]),
    "identity": Target(run=identity, seeds=lambda: [PEER.to_bytes()]),
    "checkpoint": Target(run=checkpoint, seeds=checkpoint_seeds),
    "hub_note": Target(run=hub_note, seeds=hub_seeds, expected=()),
    **ADAPTER_TARGETS,
    **FEDERATED_TARGETS,
    **HTTP_TARGETS,
}
