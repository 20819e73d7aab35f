"""Peers that nobody can connect to: through relays that know nothing, or by connecting to who asks; real nodes."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio

from swarm.errors import (
    InvalidRequest,
    PeerBusy,
    PeerDisconnected,
    PeerError,
    PeerTimeout,
    PeerUnreachable,
    RelaysBusy,
)
from swarm.network import Node, NodeConfig
from swarm.network.daemon import claim_port
from swarm.network.relay_book import RelayBook
from swarm.protocol import (
    CIRCUIT_SERVICE,
    DIAL_BACK_SERVICE,
    RELAY_SERVICE,
    CircuitBytes,
    CircuitOpened,
    DialBack,
    DialedBack,
    InfoRequest,
    Message,
    OpenCircuit,
    Reserve,
    Reserved,
)
from swarm.rates import Rate, Rates
from swarm.transport import EndOfStream, Stream, Transport
from swarm.transport.connection import Connection
from swarm.transport.dial_back import DIALS, DialBackDesk, ask_around
from swarm.transport.reachability import Reachability
from swarm.transport.relay import RelayDesk, RelayLimits
from swarm.transport.reservations import PAUSE_S, Reservations
from swarm.transport.standing import Verdict

pytestmark = pytest.mark.asyncio(loop_scope="module")
SECRET = b"what nobody else is to see" * 8


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def nodes() -> AsyncIterator[list[Node]]:
    """Two that can be reached, and two that can't and know both."""
    async with AsyncExitStack() as stack:
        start: Callable[..., Awaitable[Node]] = lambda **options: Node.start(NodeConfig(host="127.0.0.1", **options))  # noqa: E731
        first = await stack.enter_async_context(await start())
        second = await stack.enter_async_context(await start(initial_peers=first.addresses))
        peers = first.addresses + second.addresses
        hidden = [await stack.enter_async_context(await start(client_mode=True, initial_peers=peers)) for _ in "ab"]
        yield [first, second, *hidden]


@pytest_asyncio.fixture(loop_scope="module")
async def swarm(nodes: list[Node]) -> AsyncIterator[SimpleNamespace]:
    """Two relays; a target that is relayed by both, and serves an echo; a dialler that nobody can connect to either."""
    async with AsyncExitStack() as stack:
        relays = [await stack.enter_async_context(Transport(node, listen=("127.0.0.1", 0))) for node in nodes[:2]]
        target, dialler = [await stack.enter_async_context(Transport(node)) for node in nodes[2:]]
        desks = [RelayDesk(RelayLimits()) for _ in relays]
        for relay, desk in zip(relays, desks, strict=True):
            relay.serve(RELAY_SERVICE, desk.serve)
        found: list[str] = [relay.peer_id for relay in relays]

        async def candidates() -> list[str]:
            return found

        seen: list[str] = []

        async def echo(stream: Stream) -> None:
            seen.append(stream.peer_id)
            while True:
                message, body = await stream.receive()
                await stream.send(message, body)

        target.serve("echo", echo)
        reservations = Reservations(target, candidates)
        stack.push_async_callback(reservations.close)
        assert await reservations.start(10.0)
        learn(nodes, target.peer_id, tuple(found))
        yield SimpleNamespace(
            relays=relays,
            desks=desks,
            target=target,
            dialler=dialler,
            reservations=reservations,
            seen=seen,
            found=found,
        )
    for node in nodes:
        node.relays = RelayBook()


def learn(nodes: list[Node], peer_id: str, relays: tuple[str, ...]) -> None:
    """All have read the record."""
    for node in nodes:
        node.relays.learn(peer_id, relays)


async def echoed(transport: Transport, peer_id: str, body: bytes = SECRET, carrier: Any = "auto") -> str:
    """Send something to the echo and get it back; over which carrier."""
    async with await transport.open(peer_id, "echo", timeout_s=10, carrier=carrier) as stream:
        await stream.send(InfoRequest(), body)
        assert (await stream.receive(10))[1] == body
        return stream.carrier


async def test_messages_pass_a_relay_unchanged_and_both_ends_know_each_other(swarm: SimpleNamespace):
    """Small and large ones, both ways, over one connection; the target knows who asks though a relay asked it."""
    for size in (0, 1000, 3_000_000):
        assert await echoed(swarm.dialler, swarm.target.peer_id, os.urandom(size)) == "relay"
    assert swarm.seen == [swarm.dialler.peer_id] * 3
    assert sum(desk.num_circuits for desk in swarm.desks) == 1
    assert sum(desk.num_bytes for desk in swarm.desks) > 6_000_000
    assert swarm.dialler.rtt_s(swarm.target.peer_id) is None or swarm.dialler.rtt_s(swarm.target.peer_id) > 0


async def test_both_relays_are_kept_and_a_lost_one_is_replaced_by_the_other(swarm: SimpleNamespace):
    """The target says so when one ends; the dialler goes on through the one that is left."""
    while len(swarm.reservations.relays) < 2:
        await changed(swarm.reservations)
    swarm.found.pop(0)
    lost = swarm.relays[0]
    telling = asyncio.ensure_future(changed(swarm.reservations))
    await lost.stop_serving(RELAY_SERVICE, PeerUnreachable("gone"))
    await telling
    assert swarm.reservations.relays == (swarm.relays[1].peer_id,)
    assert await echoed(swarm.dialler, swarm.target.peer_id) == "relay"


async def changed(reservations: Reservations) -> None:
    """Wait until relays have changed."""
    event = asyncio.Event()
    reservations.on_change = event.set
    await asyncio.wait_for(event.wait(), 10)


async def test_the_peer_behind_a_relay_may_be_silent_for_longer(swarm: SimpleNamespace):
    """Its answers wait behind those of others there; the relay itself is given up as early as any peer."""
    assert await echoed(swarm.dialler, swarm.target.peer_id) == "relay"
    ends = [
        swarm.dialler.live(swarm.target.peer_id, "relay"),
        swarm.target.live(swarm.dialler.peer_id, "relay"),
        swarm.target.live(swarm.reservations.relays[0], "direct"),
    ]
    assert [silence_s(end) for end in ends] == [20, 20, 4]


def silence_s(connection: Connection) -> int:
    """After how many seconds without a byte, counted as they pass, a peer is taken for dead."""
    last = connection._mux._last_received
    for second in range(60):
        try:
            connection._mux.tick(last + second + 0.5)
        except PeerTimeout:
            return second
    return 60


async def test_a_circuit_whose_handshake_is_cancelled_ends(swarm: SimpleNamespace):
    """The target leaves while TLS is on its way: nothing is left that would go on carrying bytes."""
    relay_id, target = swarm.reservations.relays[0], swarm.target
    stream = await swarm.dialler.open(relay_id, RELAY_SERVICE, timeout_s=5)
    await stream.send(OpenCircuit(peer_id=target.peer_id, is_call_back=False))
    await stream.receive(5)  # the greeting, after which TLS would come
    circuits = target._circuits
    assert [task.get_name() for task in circuits._tasks._tasks] == [f"circuit through {relay_id}"]
    pumps = list(circuits._tasks._tasks)
    await target.stop_serving(CIRCUIT_SERVICE, PeerUnreachable("leaves"))
    assert all(pump.cancelling() for pump in pumps)
    await asyncio.wait(pumps)
    with pytest.raises(PeerUnreachable, match="leaves"):
        await stream.receive(5)


async def test_whoever_waits_at_a_relayed_peer_that_leaves_learns_it(swarm: SimpleNamespace):
    """The answer will not come; and nobody is let through once the reservation is over."""
    async with await swarm.dialler.open(swarm.target.peer_id, "echo", timeout_s=10) as stream:
        await stream.send(InfoRequest())
        await stream.receive(10)
        await swarm.reservations.close()
        await swarm.target.stop_serving(CIRCUIT_SERVICE, PeerUnreachable("leaves"))
        with pytest.raises(PeerError):
            await stream.receive(10)
    assert sum(desk.num_reservations for desk in swarm.desks) == 0
    with pytest.raises(PeerUnreachable, match="not relayed here"):
        await echoed(swarm.dialler, swarm.target.peer_id)


async def test_who_can_be_reached_is_connected_to_in_place_of_a_relay(swarm: SimpleNamespace):
    """The relay only asks the target to; so all bytes go directly."""
    asking = swarm.relays[1]
    await held(swarm)
    swarm.found.remove(asking.peer_id)
    await asking.stop_serving(RELAY_SERVICE, PeerUnreachable("no relay any more"))
    for connection in list(asking._by_peer.get(swarm.target.peer_id, ())):
        connection.close(PeerDisconnected("nobody needs it"))
    asking.is_reachable = True
    assert await echoed(asking, swarm.target.peer_id) == "direct"
    assert swarm.desks[0].num_bytes == 0 and swarm.seen == [asking.peer_id]
    asking.is_reachable = False
    for connection in list(asking._by_peer[swarm.target.peer_id]):
        connection.close(PeerDisconnected("nobody needs it"))
    assert await echoed(asking, swarm.target.peer_id) == "relay"


async def test_neighbours_find_each_other_behind_a_relay(swarm: SimpleNamespace, nodes: list[Node]):
    """The first stream passes the relay; over its connection they learn of a direct way, which all later ones take."""
    async with Transport(nodes[2], listen=("127.0.0.1", 0)) as neighbour:
        neighbour.serve("echo", echo)
        async with kept_reservations(neighbour, swarm.found):
            swarm.dialler._ways._reachability = Reachability()
            learn([swarm.dialler.node], neighbour.peer_id, tuple(swarm.found))
            assert await echoed(swarm.dialler, neighbour.peer_id) == "relay"  # meanwhile it asks
            while (found := swarm.dialler.live(neighbour.peer_id, "direct")) is None:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            assert found.is_greeted
            assert await echoed(swarm.dialler, neighbour.peer_id) == "direct"


async def test_a_relay_that_refuses_is_no_reason_not_to_try_another(swarm: SimpleNamespace):
    """It serves no relay any more, or it is ourselves; the second one works."""
    first, second = swarm.relays
    await held(swarm)
    await first.stop_serving(RELAY_SERVICE, InvalidRequest("does not relay"))
    relays = (swarm.dialler.peer_id, first.peer_id, second.peer_id)
    learn([swarm.dialler.node], swarm.target.peer_id, relays)
    while second.peer_id not in swarm.reservations.relays:
        await changed(swarm.reservations)
    assert await echoed(swarm.dialler, swarm.target.peer_id) == "relay"


async def test_relays_without_room_say_nothing_of_the_peer_behind_them(swarm: SimpleNamespace):
    """Another one is tried; where all are busy there is no way for now, and the peer's relays are not forgotten."""
    await held(swarm)

    async def full(stream: Stream) -> None:
        await stream.receive()
        raise PeerBusy("no room", retry_after_s=7.0)

    swarm.relays[0].serve(RELAY_SERVICE, full)
    while swarm.relays[1].peer_id not in swarm.reservations.relays:
        await changed(swarm.reservations)
    assert await echoed(swarm.dialler, swarm.target.peer_id) == "relay"
    for connection in list(swarm.dialler._by_peer[swarm.target.peer_id]):
        connection.close(PeerDisconnected("another one is made"))
    swarm.relays[1].serve(RELAY_SERVICE, full)
    with pytest.raises(RelaysBusy, match="no room") as caught:
        await swarm.dialler.open(swarm.target.peer_id, "echo", timeout_s=5)
    assert caught.value.retry_after_s == 7.0 and caught.value.peer_id == swarm.target.peer_id
    assert swarm.dialler.node.relays.of(swarm.target.peer_id)


async def test_a_peer_that_may_not_be_asked_to_connect_is_reached_through_its_relay(swarm: SimpleNamespace):
    """It was asked too often: that must not keep anybody away from it."""
    await held(swarm)
    asking = swarm.relays[1]
    swarm.target._circuits._call_backs = Rates(Rate(burst=0, per_s=1e-9))
    for connection in list(asking._by_peer.get(swarm.target.peer_id, ())):
        connection.close(PeerDisconnected("nobody needs it"))
    learn([asking.node], swarm.target.peer_id, (swarm.relays[0].peer_id,))
    asking.is_reachable = True
    try:
        assert await echoed(asking, swarm.target.peer_id) == "relay"
    finally:
        asking.is_reachable = False


async def test_a_relay_that_takes_too_long_says_nothing_of_the_peer_behind_it(swarm: SimpleNamespace):
    """It may be there: it is not taken for gone, and its relays are not forgotten."""
    await held(swarm)

    async def hangs(stream: Stream) -> None:
        await asyncio.Event().wait()

    for relay in swarm.relays:
        relay.serve(RELAY_SERVICE, hangs)
    with pytest.raises(PeerTimeout):
        await swarm.dialler.open(swarm.target.peer_id, "echo", timeout_s=1.0)
    assert swarm.dialler.node.relays.of(swarm.target.peer_id)


async def test_a_peer_that_none_of_its_relays_knows_is_forgotten(swarm: SimpleNamespace):
    """What was heard of it is wrong; the next one who asks looks it up again."""
    await swarm.reservations.close()
    for desk in swarm.desks:
        desk._reservations.clear()
    with pytest.raises(PeerUnreachable, match="not relayed here"):
        await swarm.dialler.open(swarm.target.peer_id, "echo", timeout_s=5.0)
    assert not swarm.dialler.node.relays.knows(swarm.target.peer_id)


async def test_who_is_called_back_in_vain_learns_nothing_of_the_network_there(swarm: SimpleNamespace):
    """Not which of the addresses that it named exist behind the router."""
    await held(swarm)
    asking = swarm.relays[1]

    async def nowhere(peer_id: str, timeout_s: float) -> None:
        raise PeerUnreachable("192.168.1.1: Connection refused", peer_id=peer_id)

    swarm.target._ways._makers["direct"] = nowhere
    for connection in list(asking._by_peer.get(swarm.target.peer_id, ())):
        connection.close(PeerDisconnected("nobody needs it"))
    with pytest.raises(PeerUnreachable, match="no connection to you") as caught:
        await asking._ways.dial(swarm.target.peer_id, "call-back", 5.0)
    assert "192.168" not in str(caught.value)


async def test_a_relay_that_hangs_up_is_not_asked_again_at_once(swarm: SimpleNamespace, nodes: list[Node]):
    """It would have us knock at all others, and tell the swarm, in an endless loop."""
    asked: list[str] = []

    async def hangs_up(stream: Stream) -> None:
        asked.append(stream.peer_id)
        await stream.receive()
        await stream.send(Reserved(max_circuits=1))

    for relay in swarm.relays:
        relay.serve(RELAY_SERVICE, hangs_up)
    found = [relay.peer_id for relay in swarm.relays]
    async with Transport(nodes[3]) as other, kept_reservations(other, found) as reservations:
        while reservations.relays:
            await changed(reservations)
        await asyncio.sleep(2.5 * PAUSE_S)
    assert len(asked) == 2


@asynccontextmanager
async def kept_reservations(transport: Transport, found: list[str]) -> AsyncIterator[Reservations]:
    """Reservations of a peer with any of these."""

    async def candidates() -> list[str]:
        return found

    reservations = Reservations(transport, candidates)
    try:
        assert await reservations.start(10.0)
        yield reservations
    finally:
        await reservations.close()


async def echo(stream: Stream) -> None:
    """Send every message back."""
    while True:
        message, body = await stream.receive()
        await stream.send(message, body)


async def test_records_that_lead_in_circles_end_in_an_error(swarm: SimpleNamespace, nodes: list[Node]):
    """A relay has to be reached without another relay."""
    learn(nodes, "12D3KooWBad", (swarm.target.peer_id,))
    learn(nodes, swarm.target.peer_id, ("12D3KooWBad",))
    with pytest.raises(PeerUnreachable, match="no way to"):
        await swarm.dialler.open(swarm.target.peer_id, "echo", timeout_s=5)


# -- relays that lie ------------------------------------------------------------------------------------------------


async def through(swarm: SimpleNamespace, handler: Callable[[Stream, Stream], Awaitable[None]]) -> str:
    """Ask for the echo through a relay that does this with the streams of dialler and target."""
    desk = swarm.desks[0]

    async def serve(stream: Stream) -> None:
        message, _ = await stream.receive(5)
        assert isinstance(message, OpenCircuit)
        async with desk._reservations[swarm.target.peer_id].open_back(CIRCUIT_SERVICE) as other:
            await handler(stream, other)

    swarm.relays[0].serve(RELAY_SERVICE, serve)
    learn([swarm.dialler.node], swarm.target.peer_id, (swarm.relays[0].peer_id,))
    return await echoed(swarm.dialler, swarm.target.peer_id)


async def carry(
    near: Stream, far: Stream, change: Callable[[Message, bytes], bytes] = lambda message, body: body
) -> None:
    """Carry pieces both ways."""

    async def one_way(source: Stream, sink: Stream) -> None:
        while True:
            message, body = await source.receive()
            await sink.send(message, change(message, bytes(body)))

    async with asyncio.TaskGroup() as group:
        group.create_task(one_way(near, far))
        group.create_task(one_way(far, near))


async def held(swarm: SimpleNamespace) -> None:
    """Wait until the first relay has the reservation."""
    while swarm.relays[0].peer_id not in swarm.reservations.relays:
        await changed(swarm.reservations)


async def test_a_relay_sees_nothing_of_what_it_carries(swarm: SimpleNamespace):
    """Neither what is asked nor what is answered, though it is carried faithfully."""
    await held(swarm)
    carried: list[bytes] = []

    async def watch(near: Stream, far: Stream) -> None:
        await far.send(CircuitOpened(peer_id=near.peer_id, is_call_back=False))
        with pytest.raises(BaseExceptionGroup):
            await carry(near, far, lambda message, body: carried.append(body) or body)  # type: ignore[func-returns-value]

    assert await through(swarm, watch) == "relay"
    assert carried and SECRET[:16] not in b"".join(carried)


async def test_a_relay_can_be_nobody_else(swarm: SimpleNamespace, nodes: list[Node]):
    """It can't answer for the target, nor ask in the name of a third, nor change a byte."""
    await held(swarm)

    async def answer_itself(near: Stream, far: Stream) -> None:
        await far.send(CircuitOpened(peer_id=nodes[1].peer_id, is_call_back=False))  # a greeting for somebody else
        await carry(near, far)

    with pytest.raises(PeerUnreachable, match="somebody else"):
        await through(swarm, answer_itself)

    async def pretend(near: Stream, far: Stream) -> None:
        await far.send(CircuitOpened(peer_id=near.peer_id, is_call_back=False))
        (greeting, _) = await far.receive(5)
        forged = type(greeting)(
            fingerprint=greeting.fingerprint,
            nonce=bytes(32),
            signature=greeting.signature,  # type: ignore[attr-defined]
        )
        await near.send(forged)
        await carry(near, far)

    with pytest.raises(PeerUnreachable, match="somebody else"):
        await through(swarm, pretend)

    async def change(near: Stream, far: Stream) -> None:
        await far.send(CircuitOpened(peer_id=near.peer_id, is_call_back=False))
        await carry(near, far, lambda message, body: body[:-1] + bytes([body[-1] ^ 1]) if len(body) > 600 else body)

    with pytest.raises(PeerError):
        await through(swarm, change)
    assert swarm.seen == []


async def test_a_ticket_proves_its_dialler_only(swarm: SimpleNamespace, nodes: list[Node]):
    """A relay that names another peer as the dialler is refused by the target, even where it dials itself."""
    await held(swarm)
    victim, relay = nodes[1].peer_id, swarm.relays[0]
    other = swarm.desks[0]._reservations[swarm.target.peer_id].open_back(CIRCUIT_SERVICE)
    await other.send(CircuitOpened(peer_id=victim, is_call_back=False))
    greeting, _ = await other.receive(5)
    assert greeting.signature  # type: ignore[attr-defined]
    made: list[Any] = []

    class Opened:
        """The stream of a circuit that is open already."""

        peer_id = relay.peer_id
        answers = [greeting]  # noqa: RUF012

        async def send(self, message: Message, body: bytes = b"", timeout_s: float | None = None) -> None:
            if isinstance(message, CircuitBytes):
                await other.send(message, body)

        async def receive(self, timeout_s: float | None = None) -> tuple[Message, Any]:
            return (self.answers.pop(), b"") if self.answers else await other.receive(timeout_s)

        async def close(self) -> None:
            await other.close()

    circuits = relay._circuits
    circuits._ends._answer_to = lambda greeting, target: nodes[0].identity.sign(b"as the victim")  # type: ignore[method-assign]

    def make(ticket: bytes) -> Any:
        made.append(relay.make("relay", swarm.target.peer_id, ticket=ticket))
        return made[-1]

    await circuits.open(Opened(), swarm.target.peer_id, make)  # type: ignore[arg-type]
    connection = await relay.greet(made[0])  # the target says HELLO before it has seen ours
    with pytest.raises(PeerError):
        await connection.open_stream("echo").receive(5)
    assert connection.is_closed and swarm.seen == []


async def test_only_our_relays_open_circuits(swarm: SimpleNamespace):
    """Somebody who is connected to us for another reason can't."""
    stream = swarm.target.live(swarm.relays[0].peer_id, "direct") or swarm.relays[0].live(
        swarm.target.peer_id, "direct"
    )
    assert stream is not None
    await swarm.reservations.close()
    opened = swarm.relays[0].live(swarm.target.peer_id, "direct").open_stream(CIRCUIT_SERVICE)
    await opened.send(CircuitOpened(peer_id=swarm.dialler.peer_id, is_call_back=False))
    with pytest.raises(InvalidRequest, match="no reservation"):
        await opened.receive(5)


# -- what a relay gives -----------------------------------------------------------------------------------------------


async def test_room_for_circuits_and_reservations_is_bounded(swarm: SimpleNamespace):
    """One peer gets a quarter of the circuits; who reserves beyond the limit is told to try later."""
    desk = RelayDesk(RelayLimits(max_circuits=4, max_reservations=0))
    swarm.relays[0].serve(RELAY_SERVICE, desk.serve)
    desk._reservations = swarm.desks[0]._reservations
    learn([swarm.dialler.node], swarm.target.peer_id, (swarm.relays[0].peer_id,))
    await held(swarm)
    assert await echoed(swarm.dialler, swarm.target.peer_id) == "relay"
    stream = await swarm.dialler.open(swarm.relays[0].peer_id, RELAY_SERVICE, timeout_s=5)
    await stream.send(OpenCircuit(peer_id=swarm.target.peer_id, is_call_back=False))
    with pytest.raises(PeerBusy, match="no room for another circuit"):
        await stream.receive(5)
    stream = await swarm.dialler.open(swarm.relays[0].peer_id, RELAY_SERVICE, timeout_s=5)
    await stream.send(Reserve())
    with pytest.raises(PeerBusy, match="limit of 0 peers"):
        await stream.receive(5)


async def test_a_relay_that_is_reached_no_more_carries_what_it_has(swarm: SimpleNamespace):
    """Those who have reserved are told, and look for others; circuits go on."""
    await held(swarm)
    relay, desk = swarm.relays[0], swarm.desks[0]
    learn([swarm.dialler.node], swarm.target.peer_id, (relay.peer_id,))
    assert await echoed(swarm.dialler, swarm.target.peer_id) == "relay"
    swarm.found.remove(relay.peer_id)
    telling = asyncio.ensure_future(changed(swarm.reservations))
    await desk.close()
    await telling
    assert relay.peer_id not in swarm.reservations.relays and desk.num_reservations == 0
    assert desk.num_circuits == 1 and await echoed(swarm.dialler, swarm.target.peer_id) == "relay"
    stream = await swarm.dialler.open(relay.peer_id, RELAY_SERVICE, timeout_s=5)
    await stream.send(Reserve())
    with pytest.raises(PeerUnreachable, match="at present"):
        await stream.receive(5)


# -- whether others can connect to us -----------------------------------------------------------------------------


async def asking(swarm: SimpleNamespace) -> tuple[Transport, int]:
    """A peer that listens, its libp2p port, and another that tries to connect to it."""
    swarm.relays[1].serve(DIAL_BACK_SERVICE, DialBackDesk().serve)
    return swarm.relays[0], int(swarm.relays[0].node.addresses[0].split("/")[4])


async def test_a_peer_learns_that_it_can_be_reached(swarm: SimpleNamespace):
    """And under which address."""
    transport, port = await asking(swarm)
    verdict = await ask_around(transport, port, [swarm.relays[1].peer_id])
    assert verdict == Verdict(is_reachable=True, host="127.0.0.1", num_answers=1)


@pytest.mark.parametrize("fault", ["control port", "port", "certificate"])
async def test_a_peer_learns_that_it_cannot_be_reached(swarm: SimpleNamespace, fault: str):
    """Either port may be closed, or somebody else be behind it."""
    transport, port = await asking(swarm)
    free_port = claim_port("127.0.0.1", 0)
    question = DialBack(
        port=free_port if fault == "port" else transport.entrance.port,
        fingerprint=bytes(32) if fault == "certificate" else transport.entrance.fingerprint,
        control_port=free_port if fault == "control port" else port,
    )
    call = transport.call(swarm.relays[1].peer_id, DIAL_BACK_SERVICE, question, timeout_s=5, carrier="direct")
    assert await call == DialedBack(host="127.0.0.1", is_reachable=False)


async def test_who_connects_to_us_and_falls_silent_is_told_to_whom_it_concerns(swarm: SimpleNamespace):
    """From which address it came; a peer that says goodbye is not silent."""
    (reached, other), heard = swarm.relays, list[str]()
    reached.serve("echo", echo)
    reached.on_reached, reached.on_silence = heard.append, lambda: heard.append("silence")
    for error in (PeerDisconnected("goodbye"), PeerTimeout("silent for 4.1 s")):
        assert await echoed(other, reached.peer_id) == "direct"
        made = other.live(reached.peer_id, "direct")
        (accepted,) = [it for it in reached._by_peer[other.peer_id] if not it.is_ours]
        accepted.close(error)
        assert made is not None
        await made.wait_gone()
    assert heard == ["127.0.0.1", "127.0.0.1", "silence"]


async def test_who_cannot_tell_says_nothing(swarm: SimpleNamespace, nodes: list[Node]):
    """Peers that don't know the question, that are not there, and that can't see an address."""
    transport, port = await asking(swarm)
    assert await ask_around(transport, port, []) is None
    assert await ask_around(transport, port, [nodes[2].peer_id]) is None
    question = DialBack(port=1, fingerprint=bytes(32), control_port=1)
    with pytest.raises(InvalidRequest, match="can't see"):
        await transport.call(swarm.relays[1].peer_id, DIAL_BACK_SERVICE, question, timeout_s=5, carrier="p2p")
    ask = partial(transport.call, swarm.relays[1].peer_id, DIAL_BACK_SERVICE, question, timeout_s=5, carrier="direct")
    for _ in range(int(DIALS.burst)):
        await ask()
    with pytest.raises(PeerBusy, match="too often"):
        await ask()


async def test_a_stream_that_ends_early_is_an_error_not_a_hang(swarm: SimpleNamespace):
    """A relay that closes the circuit at once, and one that talks nonsense."""
    await held(swarm)

    async def nothing(near: Stream, far: Stream) -> None:
        await near.close()

    with pytest.raises(PeerUnreachable, match="ended the circuit"):
        await through(swarm, nothing)

    async def nonsense(near: Stream, far: Stream) -> None:
        await near.send(InfoRequest())
        with pytest.raises(EndOfStream):
            await near.receive(5)

    with pytest.raises(PeerUnreachable, match="in place of CircuitGreeting"):
        await through(swarm, nonsense)
