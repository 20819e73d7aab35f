"""Private swarms on loopback: members find and call each other; strangers, expired and revoked ones get nothing."""

import asyncio
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest
from hivemind.utils.timed_storage import ValueWithExpiration

from swarm.errors import (
    AccessDenied,
    ConfigError,
    InvalidRequest,
    InvitationExpired,
    InvitationRevoked,
    PeerBusy,
    PeerDisconnected,
    PeerError,
    PeerMisbehaved,
    PeerUnreachable,
    SwarmError,
    SwarmIsPrivate,
)
from swarm.identity import Identity
from swarm.network import Node, NodeConfig, calls, members, news, node
from swarm.network.addresses import Card
from swarm.network.calls import CallLink
from swarm.network.greeter import OutgoingGreeting
from swarm.network.greeting import CALLS, VERSION, Hello, Refused, Welcome, encode_greeting
from swarm.network.hive import DHTID, DHTRecord, PeerID
from swarm.network.members import MemberNetwork
from swarm.network.records import MemberRecords, SignedRecords
from swarm.network.tls import PRIVATE_PROTOCOL, member_contexts, trusting_context
from swarm.network.whereabouts import HERE
from swarm.private.certificates import Role, to_der
from swarm.private.credentials import Credentials
from swarm.private.gate import Gate
from swarm.private.revocations import encode_revocations, revoke
from swarm.private.store import RevocationStore
from tests.network.test_node import ask_echo, echo, until
from tests.swarm.private.labs import Lab, lab_now


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Awaitable[Node]]:
    """Starts nodes on loopback that keep what they know of revocations to themselves."""
    counter = iter(range(100))

    def start(credentials: Credentials | None, *initial_peers: str, **options: Any) -> Awaitable[Node]:
        state = tmp_path / str(next(counter))
        config = {"host": "127.0.0.1", "state_dir": state, "initial_peers": initial_peers, **options}
        return Node.start(NodeConfig(credentials=credentials, **config))

    return start


Start = Callable[..., Awaitable[Node]]


def port_of(peer: Node) -> int:
    """Where it listens."""
    return int(peer.addresses[0].split("/")[4])


def members_of(peer: Node) -> MemberNetwork:
    """The network below a node."""
    assert isinstance(peer._underlay, MemberNetwork)
    return peer._underlay


async def test_members_store_find_and_stream(start: Start):
    """As in an open swarm: records of all are found by all, streams name the peer, ids are enough to dial."""
    lab = lab_now()
    async with (
        await start(lab.invite("gpu1")) as a,
        await start(lab.invite("gpu2"), *a.addresses) as b,
        await start(lab.invite("ana", Role.CLIENT), *a.addresses, client_mode=True) as c,
    ):
        expires_at = time.time() + 60
        for peer in (a, b):
            assert await peer.dht_store("key", peer.peer_id, b"hello", expires_at)
        for peer in (a, b, c):
            assert await peer.dht_get("key") == {a.peer_id: b"hello", b.peer_id: b"hello"}
        await b.add_stream_handler("/test/echo", echo)
        assert await ask_echo(c, b.peer_id) == c.peer_id  # c was told of a only
        assert repr(c) == f"<Node {c.peer_id} | 2 peers | private>"


async def test_a_host_and_a_port_are_address_enough(start: Start):
    """Whoever is there has to prove membership; the invitation may name the address, also that of ourselves."""
    lab = lab_now()
    async with await start(lab.invite("gpu1")) as a:
        for address in (f"127.0.0.1:{port_of(a)}", f"/ip4/127.0.0.1/tcp/{port_of(a)}"):
            async with await start(lab.invite(), address) as b:
                assert b.num_peers == 1
        named = lab.invite("gpu3", peers=(f"127.0.0.1:{port_of(a)}",))
        async with await start(named) as c:
            assert c.num_peers == 1
        port = port_of(a)
    own = lab.invite("gpu1", peers=(f"127.0.0.1:{port}",))
    async with await start(own, port=port) as first:
        assert first.num_peers == 0 and port_of(first) == port


async def test_one_file_serves_many_processes(start: Start):
    """Each has its own peer id, all are one account."""
    lab = lab_now()
    credentials = lab.invite("ana", Role.CLIENT)
    async with (
        await start(lab.invite()) as a,
        await start(credentials, *a.addresses, client_mode=True) as b,
        await start(credentials, *a.addresses, client_mode=True) as c,
    ):
        await until(lambda: len(members_of(a)._links) == 2)
        assert b.peer_id != c.peer_id
        assert a.account_of(b.peer_id) == a.account_of(c.peer_id) == credentials.member.id


async def test_a_member_that_is_elsewhere_is_found_there(start: Start):
    """It tells those that it has a link with, and they tell others; calls that are under way go on."""
    lab = lab_now()
    async with (
        await start(lab.invite("gpu1")) as a,
        await start(lab.invite("gpu2"), *a.addresses, host="0.0.0.0", announce=("127.0.0.77",)) as b,
        await start(lab.invite("ana", Role.CLIENT), *a.addresses, client_mode=True) as c,
    ):
        await b.add_stream_handler("/test/echo", echo)
        links = set(members_of(a)._links)
        await b.present(("127.0.0.1",))
        assert b.addresses == b.listening == (f"/ip4/127.0.0.1/tcp/{port_of(b)}/p2p/{b.peer_id}",)
        assert await a.known_addresses() == b.addresses and set(members_of(a)._links) >= links
        assert await ask_echo(c, b.peer_id) == c.peer_id


async def test_a_member_that_is_hidden_is_asked_by_nobody(start: Start):
    """It leaves the tables, announces no address, and stores and reads records through others; neighbours find it."""
    lab = lab_now()
    async with (
        await start(lab.invite("gpu1")) as a,
        await start(lab.invite("gpu2"), *a.addresses) as b,
        await start(lab.invite("gpu3"), *a.addresses) as c,
    ):
        await b.present(is_hidden=True)
        assert b.addresses == () and len(b.listening) == 1
        assert await b.dht_store("key", b.peer_id, b"hello", time.time() + 60)
        assert await c.dht_get("key") == await b.dht_get("key") == {b.peer_id: b"hello"}
        for peer in (a, c):
            await peer.dht_get("anything")  # whoever asks it learns that it is gone
        await until(lambda: not a.knows(b.peer_id) and not c.knows(b.peer_id))
        await b.add_stream_handler("/test/echo", echo)
        assert await ask_echo(c, b.peer_id) == c.peer_id
        await b.present()
        assert b.addresses == b.listening
        await b.dht_get("anything")
        await until(lambda: a.knows(b.peer_id))


async def test_a_member_says_only_where_itself_is(start: Start):
    """Another's card, and what is none, are refused."""
    lab = lab_now()
    async with await start(lab.invite("gpu1")) as a, await start(lab.invite("gpu2"), *a.addresses) as b:
        link = members_of(b)._links.live(a.peer_id)
        assert link is not None
        stranger = Identity.generate()
        for card in (msgspec.msgpack.encode(Card.make(stranger, [("127.0.0.1", 9)], time.time())), b"nonsense"):
            with pytest.raises(PeerError, match="address card"):
                await link.call(HERE, card)
        assert members_of(a)._whereabouts.known(stranger.peer_id) is None


async def test_another_peer_at_the_address_is_noticed(start: Start):
    """A full address pins the peer id; the right one is named."""
    lab = lab_now()
    async with await start(lab.invite()) as a:
        wrong = f"/ip4/127.0.0.1/tcp/{port_of(a)}/p2p/{Identity.generate().peer_id}"
        with pytest.raises(PeerUnreachable, match=f"another peer is there, {a.peer_id}"):
            await start(lab.invite(), wrong)


# --- strangers ---


async def test_a_peer_without_credentials_is_told_that_the_swarm_is_private(start: Start):
    """The error names the option that is missing."""
    async with await start(lab_now().invite()) as a:
        with pytest.raises(SwarmIsPrivate, match="--credentials"):
            await start(None, *a.addresses, client_mode=True)


async def test_an_invitation_into_another_swarm_opens_nothing(start: Start):
    """Not even one of an authority with the same name; both sides notice."""
    async with await start(lab_now().invite()) as a:
        with pytest.raises(PeerUnreachable, match="no member of our swarm my-lab"):
            await start(lab_now().invite(), *a.addresses)


async def test_members_do_not_join_open_swarms(start: Start):
    """A peer of an open swarm is no member."""
    async with await start(None) as a:
        with pytest.raises(PeerUnreachable, match=r"no peer of a private swarm|Connection"):
            await start(lab_now().invite(), *a.addresses)


async def attempt(port: int, context: ssl.SSLContext, data: bytes) -> bytes:
    """Shake hands with a private swarm's peer, say something, and return all that it answers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="swarm")
    try:
        writer.write(data)
        async with asyncio.timeout(10):
            return await reader.read()
    except OSError:
        return b""
    finally:
        writer.close()


def hello(gate: Gate, service: str = CALLS, **changes: Any) -> bytes:
    """A greeting of a member."""
    fields = {"version": VERSION, "service": service, "invitation": gate.passport.invitation, "card": None, **changes}
    return encode_greeting(Hello(**fields))


def self_signed() -> ssl.SSLContext:
    """A stranger that is its own authority, and believes everybody."""
    identity = Identity.generate()
    context = member_contexts(Gate(lab_now().invite(), identity), identity)[1]
    context.verify_mode = ssl.CERT_NONE
    return context


async def test_strangers_hear_nothing_whatever_certificate_they_show(start: Start):
    """None, their own, an expired one: the TLS handshake fails, so no protocol is spoken, and nothing is answered."""
    lab, identity = lab_now(), Identity.generate()
    old = Lab(now=lab.now.replace(year=lab.now.year - 1), key=lab.key).invite(days=1)
    expired = Gate(Credentials(lab.certificate, old.invitation, old.key), identity)
    member = Gate(lab.invite(), identity)
    named = trusting_context()
    named.set_alpn_protocols([PRIVATE_PROTOCOL])
    late = member_contexts(expired, identity)[1]
    async with await start(lab.invite()) as a:
        for context in (named, trusting_context(), self_signed(), late):
            assert await attempt(port_of(a), context, hello(member)) == b""
        assert not members_of(a)._connections
        assert await attempt(port_of(a), member_contexts(member, identity)[1], hello(member, "/none")) != b""


async def test_a_member_can_not_pass_for_another(start: Start):
    """The certificate of TLS and the invitation of the greeting must belong together, and so must the address card."""
    lab = lab_now()
    identity = Identity.generate()
    gate, other = Gate(lab.invite("a"), identity), Gate(lab.invite("admin", Role.ADMIN), Identity.generate())
    foreign = Card.make(Identity.generate(), [("127.0.0.1", 1)], time.time())
    async with await start(lab.invite()) as a:
        for changes in (
            {"invitation": other.passport.invitation},
            {"invitation": b"nonsense"},
            {"card": foreign},
            {"card": replace_owner(foreign, identity.peer_id)},
            {"version": VERSION + 1},
            {"service": "/no/such/service"},
        ):
            answer = await attempt(port_of(a), member_contexts(gate, identity)[1], hello(gate, **changes))
            assert answer[4] == 0x93 and answer[5] == 3, changes  # an array of three, tagged as Refused
        await until(lambda: not any(not t.is_closing() for t in members_of(a)._connections))


def replace_owner(card: Card, peer_id: str) -> Card:
    """Somebody else's card with our name on it."""
    return msgspec.structs.replace(card, peer_id=peer_id)


@pytest.mark.parametrize(
    "data", [b"", b"\0\0\0\0", b"\xff\xff\xff\xff", b"GET / HTTP/1.1\r\n\r\n", encode_greeting(Refused(b""))]
)
async def test_a_member_that_greets_with_garbage_is_refused(start: Start, data: bytes, monkeypatch: pytest.MonkeyPatch):
    """Or that says nothing in time; others are served."""
    monkeypatch.setattr("swarm.network.greeter.GREETING_TIMEOUT_S", 0.3)
    lab = lab_now()
    identity = Identity.generate()
    gate = Gate(lab.invite(), identity)
    async with await start(lab.invite()) as a:
        assert await attempt(port_of(a), member_contexts(gate, identity)[1], data)
        assert not members_of(a)._greetings
        async with await start(lab.invite(), *a.addresses) as b:
            assert b.num_peers == 1


async def test_silent_connections_keep_nobody_out(start: Start, monkeypatch: pytest.MonkeyPatch):
    """A member's TLS connections that don't greet have all places; of them the oldest of that host makes room."""
    monkeypatch.setattr(members, "MAX_GREETINGS", 4)
    lab, identity = lab_now(), Identity.generate()
    context = member_contexts(Gate(lab.invite(), identity), identity)[1]
    async with await start(lab.invite("gpu1")) as a:
        silent = []
        for count in range(1, 5):
            silent.append(
                await asyncio.open_connection(
                    "127.0.0.1", port_of(a), ssl=context, server_hostname="swarm", local_addr=("127.0.0.2", 0)
                )
            )
            await until(lambda count=count: len(members_of(a)._greetings) == count)
        first, *others = members_of(a)._greetings
        async with await start(lab.invite("gpu2"), *a.addresses) as b:
            assert b.num_peers == 1
            assert b"no room" in await silent[0][0].read(), "the oldest one is told"
            assert list(members_of(a)._greetings)[:3] == others and first not in members_of(a)._greetings
        for _, writer in silent:
            writer.transport.abort()


async def test_who_was_refused_is_not_heard_any_more(start: Start):
    """A Hello that comes too late opens nothing, and fills no memory."""
    lab, identity = lab_now(), Identity.generate()
    gate = Gate(lab.invite(), identity)
    context = member_contexts(gate, identity)[1]
    async with await start(lab.invite()) as a:
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(a), ssl=context, server_hostname="swarm")
        await until(lambda: bool(members_of(a)._greetings))
        (greeting,) = members_of(a)._greetings
        greeting.fail(PeerBusy("no room"))
        greeting.data_received(hello(gate))
        assert not greeting._reader.buffer and not members_of(a)._connections
        assert b"no room" in await reader.read()
        writer.transport.abort()


@pytest.mark.parametrize("per_peer", [True, False])
async def test_a_member_has_so_many_links(start: Start, monkeypatch: pytest.MonkeyPatch, per_peer: bool):
    """One more takes the place of the one that has idled longest, of this peer or of all the member's; others stay."""
    monkeypatch.setattr(members, "MAX_LINKS_PER_PEER" if per_peer else "MAX_LINKS_PER_MEMBER", 2)
    lab = lab_now()
    credentials, same = lab.invite("gpu2"), Identity.generate()
    async with await start(lab.invite("gpu1")) as a, await start(lab.invite("gpu3"), *a.addresses):
        opened = []
        for count in range(1, 5):
            identity = same if per_peer else Identity.generate()
            gate = Gate(credentials, identity)
            context = member_contexts(gate, identity)[1]
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", port_of(a), ssl=context, server_hostname="swarm"
            )
            writer.write(hello(gate))
            await reader.readexactly(4)
            opened.append((reader, writer))
            await until(lambda count=count: len(members_of(a)._links) == min(count, 2) + 1)
        for reader, _ in opened[:2]:
            async with asyncio.timeout(5):
                await reader.read()
        assert not opened[3][0].at_eof()
        for _, writer in opened:
            writer.transport.abort()


async def test_a_message_that_takes_for_ever_ends_the_link(start: Start, monkeypatch: pytest.MonkeyPatch):
    """However lively the peer is: what has come of it waits in memory."""
    monkeypatch.setattr(calls, "FRAME_TIMEOUT_S", 0.3)
    monkeypatch.setattr(calls, "PERIOD_S", 0.05)
    lab, identity = lab_now(), Identity.generate()
    gate = Gate(lab.invite("gpu2"), identity)
    context = member_contexts(gate, identity)[1]
    async with await start(lab.invite("gpu1")) as a:
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(a), ssl=context, server_hostname="swarm")
        writer.write(hello(gate) + (1 << 20).to_bytes(4, "big"))
        await reader.readexactly(4)
        await until(lambda: len(members_of(a)._links) == 1)
        async with asyncio.timeout(10):
            while len(members_of(a)._links):
                writer.write(b"x")
                await asyncio.sleep(0.02)
        writer.transport.abort()


# --- roles ---


async def test_a_client_may_neither_announce_nor_listen(start: Start):
    """It is told so by its own process, before anything is sent."""
    lab = lab_now()
    ana = lab.invite("ana", Role.CLIENT)
    async with await start(lab.invite()) as a:
        with pytest.raises(AccessDenied, match="ask for one with --role server"):
            await start(ana, *a.addresses)
        async with await start(ana, *a.addresses, client_mode=True) as c:
            with pytest.raises(AccessDenied, match=r"your invitation ana \(client\)"):
                await c.dht_store("key", c.peer_id, b"x", time.time() + 60)


async def test_what_a_client_announces_all_the_same_is_not_stored(start: Start, monkeypatch: pytest.MonkeyPatch):
    """Others check for themselves: a client whose own checks are gone gains nothing, nor does it enter the DHT."""
    lab = lab_now()
    async with (
        await start(lab.invite()) as a,
        await start(lab.invite("ana", Role.CLIENT), *a.addresses, client_mode=True) as c,
    ):
        monkeypatch.setattr(MemberNetwork, "check_may_announce", lambda self: None)
        assert not await c.dht_store("key", c.peer_id, b"x", time.time() + 60)
        c._dht._node.protocol.node_info.node_id = DHTID.generate(source=b"c").to_bytes()
        assert await c._dht.ping(PeerID.from_base58(a.peer_id))
        assert a.num_peers == 0 and await a.dht_get("key") == {}


def test_records_count_with_the_passport_of_a_server_only():
    """Not with a client's, none, another peer's, a revoked one, or one that has been cut."""
    lab, owner = lab_now(), Identity.generate()
    server, client = lab.invite("gpu7"), lab.invite("ana", Role.CLIENT)
    reader = MemberRecords(Identity.generate(), gate := Gate(lab.invite(), Identity.generate()))

    def record_of(validator: SignedRecords) -> Any:
        packed, subkey = msgpack.packb(b"payload"), msgpack.packb(owner.peer_id)
        record = DHTRecord(DHTID.generate(source="key").to_bytes(), subkey, packed, time.time() + 60)
        return replace(record, value=validator.sign_value(record))

    good = record_of(MemberRecords(owner, Gate(server, owner)))
    assert reader.validate(good) and msgpack.unpackb(reader.strip_value(good)) == b"payload"
    assert not reader.validate(record_of(MemberRecords(owner, Gate(client, owner))))
    assert not reader.validate(record_of(SignedRecords(owner)))
    assert not SignedRecords(owner).validate(good)
    assert not reader.validate(record_of(MemberRecords(owner, Gate(server, Identity.generate()))))
    assert not reader.validate(record_of(MemberRecords(owner, Gate(lab_now().invite(), owner))))
    for cut in range(len(good.value)):
        assert not reader.validate(replace(good, value=good.value[:cut]))
    gate.learn([revoke(server.member, lab.der, lab.key, time.time())], time.time())
    assert not reader.validate(good)


# --- expiry and revocation ---


async def test_an_expired_member_is_dropped_and_told(start: Start, monkeypatch: pytest.MonkeyPatch):
    """Streams and links end when the time is over; the member's own process says since when."""
    lab = lab_now()
    expired: list[tuple[str, SwarmError]] = []
    async with await start(lab.invite()) as a:
        a.on_expelled(lambda peer_id, error: expired.append((peer_id, error)))
        async with await start(lab.invite("ana", Role.CLIENT, days=1), *a.addresses, client_mode=True) as c:
            now = time.time()
            monkeypatch.setattr(time, "time", lambda: now + 2 * 86400)
            await until(lambda: bool(expired))
            assert expired[0][0] == c.peer_id and isinstance(expired[0][1], InvitationExpired)
            await until(lambda: not len(members_of(c)._links))
            with pytest.raises(InvitationExpired, match=r"your invitation ana \(client\) expired on"):
                await c.dht_get("key")


async def test_a_revocation_reaches_everybody_and_ends_everything(start: Start):
    """Told to one peer, it is known to peers two links away; the member's record is gone, its streams break."""
    lab = lab_now()
    gpu2 = lab.invite("gpu2")
    async with (
        await start(lab.invite("gpu1")) as a,
        await start(gpu2, *a.addresses) as b,
        await start(lab.invite("gpu3"), *a.addresses) as c,
        await start(lab.invite("ana", Role.CLIENT), *c.addresses, client_mode=True) as d,
    ):
        await b.dht_store("key", b.peer_id, b"of b", time.time() + 60)
        assert await d.dht_get("key") == {b.peer_id: b"of b"}
        await a.add_stream_handler("/test/echo", echo)
        reader, writer = await b.open_stream(a.peer_id, "/test/echo", 5)
        assert (await reader.readline()).decode().strip() == b.peer_id
        statement = revoke(gpu2.member, lab.der, lab.key, time.time())
        assert await a.revoke([statement]) >= 1
        for peer in (a, b, c, d):
            await until(lambda peer=peer: members_of(peer).gate.revocations.find(gpu2.member) is not None)
        async with asyncio.timeout(10):
            assert await reader.read() == b""
        writer.close()
        assert await d.dht_get("key") == {}
        with pytest.raises(InvitationRevoked, match=r"your invitation gpu2 \(server\) was revoked on"):
            await b.dht_get("key")
        with pytest.raises(InvitationRevoked):
            await b.open_stream(a.peer_id, "/test/echo", 5)
        with pytest.raises(InvitationRevoked):
            await start(gpu2, *c.addresses)
        await until(lambda: not stored_at(a, "key"), 3.0)


async def test_one_bad_record_hides_no_others(start: Start):
    """A revoked member's, and one that nobody has signed, are left out of an answer that holds both."""
    lab = lab_now()
    gpu2 = lab.invite("gpu2")
    async with (
        await start(lab.invite("gpu1")) as a,
        await start(gpu2, *a.addresses) as b,
        await start(lab.invite("ana", Role.CLIENT), *a.addresses, client_mode=True) as c,
    ):
        for peer in (a, b):
            assert await peer.dht_store("key", peer.peer_id, b"hello", time.time() + 60)
        stored_at(a, "key")["12D3KooW" + "x" * 44] = ValueWithExpiration(b"unsigned", time.time() + 60)
        assert set(await c.dht_get("key")) == {a.peer_id, b.peer_id}
        members_of(c).gate.learn([revoke(gpu2.member, lab.der, lab.key, time.time())], time.time())
        assert await c.dht_get("key") == {a.peer_id: b"hello"}


def stored_at(peer: Node, key: str) -> dict[str, Any]:
    """The records of a key that a node holds for others."""
    found = peer._dht._node.protocol.storage.get(DHTID.generate(source=key))
    return {} if found is None else found.value.data


async def test_a_peer_that_was_off_hears_of_revocations_when_it_comes_back(start: Start, tmp_path: Path):
    """From whoever it joins; and one that was told remembers it over a restart of everybody."""
    lab = lab_now()
    gpu2 = lab.invite("gpu2")
    async with await start(lab.invite("gpu1"), state_dir=tmp_path / "one") as a:
        await a.revoke([revoke(gpu2.member, lab.der, lab.key, time.time())], 0.1)
        async with await start(lab.invite("gpu3"), *a.addresses) as b:
            await until(lambda: members_of(b).gate.revocations.find(gpu2.member) is not None)
    async with await start(lab.invite("gpu1"), state_dir=tmp_path / "one") as a:
        assert members_of(a).gate.revocations.find(gpu2.member) is not None
        with pytest.raises(InvitationRevoked):
            await start(gpu2, *a.addresses)


async def test_a_refusal_is_believed_with_proof_only(start: Start, monkeypatch: pytest.MonkeyPatch):
    """A member that says that we are revoked, and can't show it, is the one to blame."""
    lab = lab_now()

    def refuse(self: MemberNetwork, process: bytes, hello: Hello) -> None:
        raise InvitationRevoked("you are out")

    async with await start(lab.invite()) as a:
        monkeypatch.setattr(MemberNetwork, "on_hello", refuse)
        with pytest.raises(PeerUnreachable, match="refuses us: you are out"):
            await start(lab.invite(), *a.addresses)


async def test_peers_that_can_not_agree_tell_each_other_once(start: Start, monkeypatch: pytest.MonkeyPatch):
    """One that has no room for a statement says so with every answer, and is not told it again each time."""
    lab, told = lab_now(), 0
    tell = CallLink.tell

    def count(self: CallLink, statements: bytes) -> None:
        nonlocal told
        told += 1
        tell(self, statements)

    monkeypatch.setattr(CallLink, "tell", count)
    monkeypatch.setattr(calls, "PERIOD_S", 0.05)
    gpu9 = lab.invite("gpu9")
    async with await start(lab.invite("gpu1")) as a, await start(lab.invite("gpu2"), *a.addresses) as b:
        monkeypatch.setattr(members_of(a).gate, "learn", lambda statements, now: [])
        assert await b.revoke([revoke(gpu9.member, lab.der, lab.key, time.time())], 1.0) == 0
        assert told <= 3
        (link,) = members_of(b)._links
        link.told_at -= news.RETELL_S
        before = told
        await until(lambda: told > before)


async def test_only_who_may_revoke_is_believed(start: Start):
    """A server's statement ends its link, and revokes nobody."""
    lab = lab_now()
    gpu2, ana = lab.invite("gpu2"), lab.invite("ana", Role.CLIENT)
    async with await start(lab.invite()) as a, await start(gpu2, *a.addresses) as b:
        forged = revoke(ana.member, lab.der, gpu2.key, time.time(), signer=to_der(gpu2.invitation))
        with pytest.raises(PeerMisbehaved, match="who may not"):
            await b.revoke([forged])
        link = members_of(b)._links.live(a.peer_id)
        assert link is not None
        link.tell(encode_revocations([forged]))
        await until(lambda: link.is_lost)
        assert members_of(a).gate.revocations.find(ana.member) is None


async def test_what_there_is_no_room_for_is_not_said_to_be_revoked(start: Start, monkeypatch: pytest.MonkeyPatch):
    """An admin that has said too much hears that, and that nobody was told."""
    monkeypatch.setattr("swarm.private.revocations.MAX_BY_ADMIN", 1)
    lab = lab_now()
    root = lab.invite("root", Role.ADMIN)
    one, two = (
        revoke(lab.invite(name).member, lab.der, root.key, time.time(), signer=to_der(root.invitation))
        for name in ("gpu7", "gpu8")
    )
    async with await start(lab.invite("gpu1")) as a, await start(root, *a.addresses, client_mode=True) as admin:
        assert await admin.revoke([one]) == 1
        with pytest.raises(InvalidRequest, match="no room for 1 of 1 revocations"):
            await admin.revoke([two])


async def test_a_refusal_with_proof_is_kept_and_passed_on(start: Start, tmp_path: Path):
    """As if it had come over a link: on disk, told to others, and we know that we are out."""
    lab = lab_now()
    gpu2 = lab.invite("gpu2")
    async with (
        await start(lab.invite("gpu1")) as a,
        await start(gpu2, state_dir=tmp_path / "two") as b,
        await start(lab.invite("gpu3"), *b.addresses) as c,
    ):
        await a.revoke([revoke(gpu2.member, lab.der, lab.key, time.time())], 0.1)
        with pytest.raises(InvitationRevoked):
            await b.connect(a.addresses[0])
        assert b.denied.is_set()
        await until(lambda: members_of(c).gate.revocations.find(gpu2.member) is not None)
    (statement,) = RevocationStore(tmp_path / "two", lab.der).load()
    assert statement.member == gpu2.member.id


async def test_processes_with_one_file_of_revocations_forget_nothing(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """What another one has saved stays there; the log says who is out, and who says so."""
    lab = lab_now()
    gpu7, root = lab.invite("gpu7"), lab.invite("root", Role.ADMIN)
    one = revoke(lab.invite("gpu8").member, lab.der, lab.key, time.time())
    two = revoke(gpu7.member, lab.der, root.key, time.time(), signer=to_der(root.invitation))
    shared = tmp_path / "shared"
    async with await start(lab.invite("gpu1"), state_dir=shared) as a, await start(gpu7, *a.addresses):
        RevocationStore(shared, lab.der).save([one])
        await a.revoke([two], 0.1)
    assert {entry.member for entry in RevocationStore(shared, lab.der).load()} == {one.member, two.member}
    assert "gpu7 (server) was revoked by root (admin)" in caplog.text
    assert f"{one.member} was revoked by the authority" in caplog.text


async def test_a_client_is_not_asked_where_others_are(start: Start):
    """It could name any address for a peer that it has made up, and have us dial it."""
    lab, nobody = lab_now(), Identity.generate()
    async with (
        await start(lab.invite("gpu1")) as a,
        await start(lab.invite("ana", Role.CLIENT), *a.addresses, client_mode=True) as c,
    ):
        members_of(c)._whereabouts._book.add(Card.make(nobody, [("127.0.0.1", 1)], time.time()), time.time())
        with pytest.raises(PeerUnreachable, match="none of 0 peers knows the address"):
            await a.open_stream(nobody.peer_id, "/test/echo", 5)


async def test_an_admin_sees_the_members_and_others_do_not(start: Start):
    """By name and role, those who are there and those who were."""
    lab = lab_now()
    async with await start(lab.invite("gpu1")) as a:
        async with await start(lab.invite("gpu2"), *a.addresses) as b:
            assert {member.name for member in await b.members()} <= {"gpu1"}
        async with await start(lab.invite("root", Role.ADMIN), *a.addresses, client_mode=True) as root:
            assert {str(member) for member in await root.members()} == {
                "gpu1 (server)",
                "gpu2 (server)",
                "root (admin)",
            }
        async with await start(None) as open_one:
            with pytest.raises(InvalidRequest, match="open swarm"):
                await open_one.members()


# --- failures ---


async def test_a_card_with_an_address_of_ours_is_no_obstacle(start: Start):
    """127.0.0.1 and a port that both have is ourselves for each; the other address on the card leads there."""
    lab = lab_now()
    async with await start(lab.invite("gpu1")) as a, await start(lab.invite("gpu2"), host="127.0.0.2") as b:
        await b.add_stream_handler("/test/echo", echo)
        ours, theirs = ("127.0.0.1", port_of(a)), ("127.0.0.2", port_of(b))
        card = Card.make(b.identity, [ours, theirs], time.time() + 1)
        members_of(a)._whereabouts._book.add(card, time.time())
        assert await ask_echo(a, b.peer_id) == a.peer_id
        alone = Card.make(b.identity, [ours], time.time() + 2)
        members_of(a)._whereabouts._book.add(alone, time.time())
        with pytest.raises(PeerUnreachable):
            await a.open_stream(b.peer_id, "/test/echo", 5)


async def test_a_peer_that_restarts_elsewhere_is_found_again(start: Start):
    """Its old address is tried, then others are asked for the new one."""
    lab, identity = lab_now(), Identity.generate()
    async with await start(lab.invite("gpu1")) as a, await start(lab.invite("gpu3"), *a.addresses) as c:
        async with await start(lab.invite("gpu2"), *a.addresses, identity=identity) as b:
            await b.add_stream_handler("/test/echo", echo)
            assert await ask_echo(c, identity.peer_id) == c.peer_id
        await until(lambda: members_of(c)._links.live(identity.peer_id) is None)
        with pytest.raises(PeerError):
            await c.open_stream(identity.peer_id, "/test/echo", 5)
        async with await start(lab.invite("gpu2"), *a.addresses, identity=identity) as b:
            await b.add_stream_handler("/test/echo", echo)
            assert await ask_echo(c, identity.peer_id) == c.peer_id


async def test_what_can_not_be_reached_says_why(start: Start):
    """Unknown peers, clients, services that are not there."""
    lab = lab_now()
    async with (
        await start(lab.invite("gpu1")) as a,
        await start(lab.invite("ana", Role.CLIENT), *a.addresses, client_mode=True) as c,
    ):
        with pytest.raises(PeerUnreachable, match="none of 0 peers knows the address"):
            await a.open_stream(c.peer_id, "/test/echo", 5)
        with pytest.raises(PeerUnreachable, match="'/test/echo' is not served here"):
            await c.open_stream(a.peer_id, "/test/echo", 5)
        with pytest.raises(PeerUnreachable):
            await c.connect("127.0.0.1:1")
    with pytest.raises(PeerUnreachable, match="none of 1 initial peers answered"):
        await start(lab.invite(), "127.0.0.1:1")
    for text in ("127.0.0.1", "127.0.0.1:0", "/ip4/127.0.0.1/udp/7", "host:70000"):
        with pytest.raises(ConfigError, match="malformed"):
            await start(lab.invite(), text)


async def test_peers_come_back_to_an_initial_peer_that_restarts(start: Start, monkeypatch: pytest.MonkeyPatch):
    """With another identity at the same address, since the address names none."""
    monkeypatch.setattr(node, "GREET_PERIOD_S", 0.5)
    monkeypatch.setattr(node, "WATCH_PERIOD_S", 0.2)
    lab = lab_now()
    async with await start(lab.invite("gpu1")) as a:
        port = port_of(a)
        b = await start(lab.invite("gpu2"), f"127.0.0.1:{port}")
    async with b:
        await until(lambda: b.num_peers == 0)
        async with await start(lab.invite("gpu1"), port=port) as again:
            await until(lambda: b.knows(again.peer_id))


async def test_a_lost_link_fails_its_calls_at_once(start: Start):
    """Nobody waits for an answer that can't come."""
    lab = lab_now()
    async with await start(lab.invite("gpu2")) as b:
        async with await start(lab.invite("gpu1"), *b.addresses) as a:

            async def hang(data: bytes, peer_id: Any) -> bytes:
                called.set()
                await asyncio.Event().wait()
                return b""

            called = asyncio.Event()
            await members_of(a).add_unary_handler("hang", hang)
            call = asyncio.ensure_future(members_of(b).call_unary_handler(PeerID.from_base58(a.peer_id), "hang", b""))
            await called.wait()
        with pytest.raises(PeerDisconnected):
            await call


def test_the_greeting_of_a_dialler_is_not_taken_for_an_answer():
    """Two diallers have nothing to say to each other."""

    async def main() -> None:
        greeting = OutgoingGreeting()
        greeting.data_received(encode_greeting(Hello(VERSION, CALLS, b"", None)))
        with pytest.raises(PeerMisbehaved, match="Hello in place of an answer"):
            await greeting.answer
        answered = OutgoingGreeting()
        answered.data_received(encode_greeting(Welcome(b"", None)))
        answered.data_received(rest := b"\0\0\0\2hi")
        assert await answered.answer == Welcome(b"", None)
        assert bytes(answered._reader.buffer) == rest, "what follows is for who takes over"

    asyncio.run(main())
