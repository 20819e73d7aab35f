"""Members of a private swarm that nobody can connect to: reached through members that know nothing; real nodes."""

import asyncio
import os
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytest_asyncio

from swarm.errors import InvitationRevoked, PeerBusy, PeerError, PeerUnreachable, RelaysBusy
from swarm.identity import Identity
from swarm.network import Node, NodeConfig
from swarm.network.daemon import claim_port
from swarm.network.greeter import OutgoingGreeting
from swarm.network.greeting import VERSION, Hello
from swarm.network.tasks import TaskSet
from swarm.network.tls import member_contexts
from swarm.private.certificates import Role
from swarm.private.credentials import Credentials
from swarm.private.gate import Gate
from swarm.private.revocations import revoke
from swarm.protocol import DIAL_BACK_SERVICE, RELAY_SERVICE, CircuitOpened, DialBack, DialedBack, OpenCircuit, Reserve
from swarm.transport import Stream, Transport
from swarm.transport.circuit_ends import MemberEnds
from swarm.transport.circuits import Pipe
from swarm.transport.dial_back import DialBackDesk, ask_around
from swarm.transport.relay import RelayDesk, RelayLimits
from swarm.transport.standing import Verdict
from swarm.transport.ways import MUX_STREAM
from tests.swarm.private.labs import Lab, lab_now
from tests.transport.test_relay import SECRET, carry, changed, echo, echoed, held, kept_reservations, learn, through

pytestmark = pytest.mark.asyncio


@dataclass
class House:
    """Starts members that keep what they know of revocations to themselves."""

    lab: Lab
    home: Path
    stack: AsyncExitStack
    peers: tuple[str, ...] = ()
    num_started: int = 0

    async def member(self, credentials: Credentials, *, listens: bool = True) -> Transport:
        """A process of a member."""
        self.num_started += 1
        config = NodeConfig(
            host="127.0.0.1",
            initial_peers=self.peers,
            credentials=credentials,
            client_mode=not listens,
            state_dir=self.home / str(self.num_started),
        )
        node = await self.stack.enter_async_context(await Node.start(config))
        self.peers += node.addresses
        return await self.stack.enter_async_context(Transport(node))

    async def revoke(self, credentials: Credentials, at: Transport) -> None:
        """Tell one member that another is out."""
        await at.node.revoke([revoke(credentials.member, self.lab.der, self.lab.key, time.time())])


@pytest_asyncio.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    """An empty swarm."""
    async with AsyncExitStack() as stack:
        yield House(lab_now(), tmp_path, stack)


@pytest_asyncio.fixture
async def swarm(house: House) -> AsyncIterator[SimpleNamespace]:
    """Two relays; a server that is relayed by both, and serves an echo; a client."""
    invited = [house.lab.invite(name) for name in ("gpu1", "gpu2", "gpu3")]
    ana = house.lab.invite("ana", Role.CLIENT)
    relays = [await house.member(credentials) for credentials in invited[:2]]
    desks = [RelayDesk(RelayLimits()) for _ in relays]
    for relay, desk in zip(relays, desks, strict=True):
        relay.serve(RELAY_SERVICE, desk.serve)
    target = await house.member(invited[2], listens=False)
    dialler = await house.member(ana, listens=False)
    found, seen = [relay.peer_id for relay in relays], list[str]()

    async def noted(stream: Stream) -> None:
        seen.append(stream.peer_id)
        await echo(stream)

    target.serve("echo", noted)
    learn([it.node for it in (*relays, target, dialler)], target.peer_id, tuple(found))
    async with kept_reservations(target, found) as reservations:
        yield SimpleNamespace(
            relays=relays,
            desks=desks,
            target=target,
            server=invited[2],
            dialler=dialler,
            ana=ana,
            reservations=reservations,
            found=found,
            seen=seen,
        )


async def test_members_reach_each_other_through_members(swarm: SimpleNamespace):
    """Small and large messages over one connection, which counts as the member's whose process made it."""
    for size in (0, 1000, 3_000_000):
        assert await echoed(swarm.dialler, swarm.target.peer_id, os.urandom(size)) == "relay"
    assert swarm.seen == [swarm.dialler.peer_id] * 3
    assert sum(desk.num_circuits for desk in swarm.desks) == 1
    assert sum(desk.num_bytes for desk in swarm.desks) > 6_000_000
    taken = swarm.target.live(swarm.dialler.peer_id, "relay")
    assert taken.account == swarm.ana.member.id and taken.remote_host is None


async def test_a_lost_relay_is_replaced_by_the_other(swarm: SimpleNamespace):
    """The server says so; the client goes on through the one that is left."""
    while len(swarm.reservations.relays) < 2:
        await changed(swarm.reservations)
    swarm.found.pop(0)
    telling = asyncio.ensure_future(changed(swarm.reservations))
    await swarm.relays[0].stop_serving(RELAY_SERVICE, PeerUnreachable("gone"))
    await telling
    assert swarm.reservations.relays == (swarm.relays[1].peer_id,)
    assert await echoed(swarm.dialler, swarm.target.peer_id) == "relay"


async def test_who_can_be_reached_is_connected_to_in_place_of_a_relay(swarm: SimpleNamespace):
    """The relay only asks the server to."""
    await held(swarm)
    asking = swarm.relays[1]
    learn([asking.node], swarm.target.peer_id, (swarm.relays[0].peer_id,))
    for connection in list(asking._by_peer.get(swarm.target.peer_id, ())):
        connection.close(PeerUnreachable("nobody needs it"))
    asking.is_reachable = True
    assert await echoed(asking, swarm.target.peer_id) == "direct"
    assert swarm.desks[0].num_bytes == 0 and swarm.seen == [asking.peer_id]


async def test_neighbours_find_each_other_behind_a_relay(swarm: SimpleNamespace, house: House):
    """Over the relayed connection the client gets the server's card, and tries where that says it listens."""
    neighbour = await house.member(house.lab.invite("gpu4"))
    neighbour.serve("echo", echo)
    async with kept_reservations(neighbour, swarm.found):
        learn([swarm.dialler.node], neighbour.peer_id, tuple(swarm.found))
        assert await echoed(swarm.dialler, neighbour.peer_id) == "relay"
        while swarm.dialler.live(neighbour.peer_id, "direct") is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert await echoed(swarm.dialler, neighbour.peer_id) == "direct"


# -- relays that lie ------------------------------------------------------------------------------------------------


async def opened(near: Stream, far: Stream, dialler: str) -> None:
    """Do what a relay does, in whose name it likes."""
    await far.send(CircuitOpened(peer_id=dialler, is_call_back=False))
    await carry(near, far)


async def test_a_relay_sees_nothing_of_what_it_carries(swarm: SimpleNamespace):
    """Though it is a member, and carries it faithfully."""
    await held(swarm)
    carried: list[bytes] = []

    async def watch(near: Stream, far: Stream) -> None:
        await far.send(CircuitOpened(peer_id=near.peer_id, is_call_back=False))
        with pytest.raises(BaseExceptionGroup):
            await carry(near, far, lambda message, body: carried.append(body) or body)  # type: ignore[func-returns-value]

    assert await through(swarm, watch) == "relay"
    seen = b"".join(carried)
    assert len(seen) > 2 * len(SECRET) and SECRET[:16] not in seen
    assert swarm.server.member.name.encode() not in seen, "not even the certificates can be read"


async def test_a_relay_can_not_answer_for_the_server(swarm: SimpleNamespace):
    """It has a certificate of this swarm, too, but it is another one: the client refuses."""
    await held(swarm)

    async def answer_itself(near: Stream, far: Stream) -> None:
        pipe = Pipe(near, TaskSet())
        await MemberEnds(swarm.relays[0].node, MUX_STREAM, nobody, 5.0).take(pipe, near.peer_id)
        await pipe.wait_over()

    with pytest.raises(PeerUnreachable, match=f"another peer is there, {swarm.relays[0].peer_id}"):
        await through(swarm, answer_itself)
    assert swarm.seen == []


def nobody(peer_id: str) -> asyncio.Protocol:
    raise AssertionError(f"{peer_id} was let in")


async def test_a_relay_can_not_have_one_member_pass_for_another(swarm: SimpleNamespace):
    """It says that somebody else comes: the server refuses who comes, with words."""
    await held(swarm)
    victim = swarm.relays[1].peer_id
    with pytest.raises(PeerUnreachable, match=f"{swarm.dialler.peer_id} comes in the name of {victim}"):
        await through(swarm, lambda near, far: opened(near, far, victim))
    assert swarm.seen == []


async def test_a_relay_can_not_change_a_byte(swarm: SimpleNamespace):
    """The connection is lost."""
    await held(swarm)

    async def change(near: Stream, far: Stream) -> None:
        await far.send(CircuitOpened(peer_id=near.peer_id, is_call_back=False))
        await carry(near, far, lambda message, body: body[:-1] + bytes([body[-1] ^ 1]) if len(body) > 200 else body)

    with pytest.raises(PeerError):
        await through(swarm, change)
    assert swarm.seen == []


async def test_a_relay_can_not_let_a_stranger_in(swarm: SimpleNamespace):
    """Who was invited into another swarm of the same name gets no further than TLS: at a relay, and on its circuit."""
    await held(swarm)
    foreign = lab_now().invite("mallory")
    with pytest.raises(PeerUnreachable, match="no member of our swarm"):
        await Node.start(NodeConfig(initial_peers=swarm.relays[0].node.addresses, credentials=foreign))
    identity = Identity.generate()
    gate = Gate(foreign, identity)
    _, context = member_contexts(gate, identity)
    context.verify_mode = ssl.CERT_NONE
    async with swarm.desks[0]._reservations[swarm.target.peer_id].open_back("circuit") as stream:
        await stream.send(CircuitOpened(peer_id=identity.peer_id, is_call_back=False))
        pipe = Pipe(stream, TaskSet())
        _, greeting = await asyncio.get_running_loop().create_unix_connection(
            OutgoingGreeting, sock=await pipe.open(), ssl=context, server_hostname="swarm"
        )
        greeting.send(Hello(VERSION, MUX_STREAM, gate.passport.invitation, None))
        with pytest.raises(PeerError, match="without a word"):
            await greeting.answer
        pipe.stop()
    assert swarm.target.live(identity.peer_id, "relay") is None and swarm.seen == []


async def test_only_streams_pass_a_relay(swarm: SimpleNamespace):
    """No calls, and no other raw streams: nobody needs them there."""
    await held(swarm)
    stream = await swarm.dialler.open(swarm.relays[0].peer_id, RELAY_SERVICE, timeout_s=5)
    await stream.send(OpenCircuit(peer_id=swarm.target.peer_id, is_call_back=False))
    ends = MemberEnds(swarm.dialler.node, "", nobody, 5.0)
    pipe = Pipe(stream, TaskSet())
    with pytest.raises(PeerUnreachable, match="'' is not served through relays"):
        await ends.dial(pipe, swarm.target.peer_id, lambda ticket: asyncio.Protocol())
    pipe.abandon()


# -- who is out -------------------------------------------------------------------------------------------------------


async def test_a_client_that_is_revoked_is_cut_off_and_gets_no_other_circuit(swarm: SimpleNamespace, house: House):
    """At relay and server: whoever hears of it first."""
    async with await swarm.dialler.open(swarm.target.peer_id, "echo", timeout_s=10) as stream:
        await house.revoke(swarm.ana, at=swarm.relays[0])
        with pytest.raises((InvitationRevoked, PeerError)):
            await stream.receive(10)
    with pytest.raises(InvitationRevoked, match=r"your invitation ana \(client\) was revoked"):
        await ended(lambda: swarm.dialler.open(swarm.target.peer_id, "echo", timeout_s=5))


async def test_a_server_that_is_revoked_loses_its_reservations_and_gets_no_other(swarm: SimpleNamespace, house: House):
    """Nobody is led to it any more."""
    await held(swarm)
    async with await swarm.dialler.open(swarm.target.peer_id, "echo", timeout_s=10) as stream:
        await house.revoke(swarm.server, at=swarm.relays[0])
        with pytest.raises((InvitationRevoked, PeerError)):
            await stream.receive(10)
    while swarm.desks[0].num_reservations:  # noqa: ASYNC110
        await asyncio.sleep(0.01)

    async def reserve() -> object:
        asking = await swarm.target.open(swarm.relays[0].peer_id, RELAY_SERVICE, timeout_s=5)
        await asking.send(Reserve())
        return await asking.receive(5)

    with pytest.raises(InvitationRevoked, match=r"your invitation gpu3 \(server\) was revoked"):
        await ended(reserve)
    assert swarm.desks[0].num_reservations == 0


async def ended(attempt: Callable[[], Awaitable[object]]) -> None:
    """Try until the peer has heard that it is out: what is lost before it has may look like a fault of the way."""
    async with asyncio.timeout(10):
        while True:
            with suppress(PeerError):
                await attempt()


# -- what a relay gives -----------------------------------------------------------------------------------------------


async def test_all_processes_of_a_member_share_what_one_may_have(swarm: SimpleNamespace, house: House):
    """A quarter of the circuits, here one; the error says that it is the relays that are busy, not the server."""
    await held(swarm)
    desk = RelayDesk(RelayLimits(max_circuits=4))
    desk._reservations = swarm.desks[0]._reservations
    swarm.relays[0].serve(RELAY_SERVICE, desk.serve)
    other = await house.member(swarm.ana, listens=False)
    learn([swarm.dialler.node, other.node], swarm.target.peer_id, (swarm.relays[0].peer_id,))
    assert await echoed(swarm.dialler, swarm.target.peer_id, carrier="relay") == "relay"
    with pytest.raises(RelaysBusy, match=r"no room for another circuit, limit 4, 1 of one peer") as caught:
        await other.open(swarm.target.peer_id, "echo", timeout_s=5)
    assert caught.value.retry_after_s == 10.0 and other.node.relays.of(swarm.target.peer_id)


async def test_what_a_relay_says_is_not_lost_in_the_handshake(swarm: SimpleNamespace):
    """It, or the server, may refuse when TLS has begun already."""
    await held(swarm)

    async def full(near: Stream, far: Stream) -> None:
        await near.receive()
        raise PeerBusy("no room", retry_after_s=7.0)

    with pytest.raises(RelaysBusy, match="no room") as caught:
        await through(swarm, full)
    assert caught.value.retry_after_s == 7.0


# -- whether others can connect to us -----------------------------------------------------------------------------


async def test_a_member_learns_whether_it_can_be_reached(swarm: SimpleNamespace):
    """There is one port; who is behind it must have the certificate of who asks."""
    asking, asked = swarm.relays
    asked.serve(DIAL_BACK_SERVICE, DialBackDesk().serve)
    entrance = asking.entrance
    verdict = await ask_around(asking, entrance.port, [asked.peer_id, swarm.target.peer_id])
    assert verdict == Verdict(is_reachable=True, host="127.0.0.1", num_answers=1)
    for port, fingerprint in ((entrance.port, bytes(32)), (claim_port("127.0.0.1", 0), entrance.fingerprint)):
        question = DialBack(port=port, fingerprint=fingerprint, control_port=port)
        answer = await asking.call(asked.peer_id, DIAL_BACK_SERVICE, question, timeout_s=5, carrier="direct")
        assert answer == DialedBack(host="127.0.0.1", is_reachable=False)
