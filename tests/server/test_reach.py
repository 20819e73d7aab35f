"""How a server finds out how it is reached; real peers on loopback (behind routers: tests/integration).

In an open swarm, and in a private one.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytest_asyncio

from swarm.errors import AccessDenied, InvalidRequest, PeerUnreachable
from swarm.network import Node, NodeConfig
from swarm.private.certificates import Role
from swarm.protocol import DIAL_BACK_SERVICE, RELAY_SERVICE, Reserve
from swarm.server import reach as reach_module
from swarm.server.config import ServerConfig
from swarm.server.reach import Reach
from swarm.transport import Transport, standing
from swarm.transport.public import help_others
from swarm.transport.standing import Verdict
from tests.swarm.private.labs import lab_now

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module", params=["open", "private"])
async def bootstrap(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[SimpleNamespace]:
    """A peer that can be reached; it helps nobody until it is told to."""
    home, lab = tmp_path_factory.mktemp("home"), lab_now() if request.param == "private" else None
    config = NodeConfig(host="127.0.0.1", credentials=lab and lab.invite("head"), state_dir=home)
    async with (
        await Node.start(config) as node,
        Transport(node, listen=("127.0.0.1", 0)) as transport,
    ):
        yield SimpleNamespace(node=node, transport=transport, credentials=lab and lab.invite("gpu1"))


@pytest_asyncio.fixture(loop_scope="module")
async def helpful(bootstrap: SimpleNamespace) -> AsyncIterator[SimpleNamespace]:
    """It relays and dials back."""
    help_others(bootstrap.transport, relayed_bytes_per_s=1e6)
    yield bootstrap
    for service in (RELAY_SERVICE, DIAL_BACK_SERVICE):
        await bootstrap.transport.stop_serving(service, InvalidRequest("no more"))


@asynccontextmanager
async def entered(bootstrap: SimpleNamespace, **settings: object) -> AsyncIterator[Reach]:
    """A server's network, up."""
    config = ServerConfig(
        model="tiny",
        host="127.0.0.1",
        initial_peers=bootstrap.node.addresses,
        credentials=bootstrap.credentials,
        **settings,  # type: ignore[arg-type]
    )
    reach = Reach(config)
    try:
        await reach.enter()
        yield reach
    finally:
        await reach.close()


async def test_a_server_that_can_be_reached_helps_others(helpful: SimpleNamespace):
    """It knows that it can be, relays, and asks hidden peers to connect to it."""
    async with entered(helpful) as reach:
        assert not reach.is_relayed and reach.relays == () and reach.transport.is_reachable
        assert reach.relay_desk is not None
        stream = await helpful.transport.open(reach.node.peer_id, RELAY_SERVICE, timeout_s=5)
        await stream.send(Reserve())
        await stream.receive(5)
        assert reach.relay_desk.num_reservations == 1


async def test_a_server_that_is_to_relay_nothing_only_dials_back(helpful: SimpleNamespace):
    """Its owner has said so."""
    async with entered(helpful, relayed_bytes_per_s=0) as reach:
        assert reach.relay_desk is None
        stream = await helpful.transport.open(reach.node.peer_id, RELAY_SERVICE, timeout_s=5)
        await stream.send(Reserve())
        with pytest.raises(InvalidRequest, match="does not serve"):
            await stream.receive(5)


async def test_where_nobody_can_tell_a_server_takes_itself_for_reachable(bootstrap: SimpleNamespace):
    """As in a swarm of peers that don't know the question; but it doesn't have others try in vain."""
    async with entered(bootstrap) as reach:
        assert not reach.is_relayed and not reach.transport.is_reachable


async def test_a_server_that_nobody_reaches_takes_relays_and_keeps_its_identity(
    helpful: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
):
    """It leaves the DHT's tables, says at which peers it can be found, and listens for neighbours still."""
    asked = []

    async def nobody(transport: Transport, port: int, peers: object) -> Verdict:
        asked.append((transport.peer_id, port))
        return Verdict(is_reachable=False, host="192.0.2.1", num_answers=3)

    monkeypatch.setattr(reach_module, "ask_around", nobody)
    async with entered(helpful) as reach:
        assert reach.is_relayed and reach.relays == (helpful.node.peer_id,)
        assert reach.node.addresses == () and reach.transport.entrance is not None
        assert asked == [(reach.node.peer_id, asked[0][1])] and asked[0][1] > 0
        assert reach.relay_desk is None


async def test_without_any_relay_the_error_says_what_to_do(bootstrap: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    """Open ports, or a peer that relays; and why those who were asked don't."""
    monkeypatch.setattr(reach_module, "RELAY_TIMEOUT_S", 1.0)
    with pytest.raises(PeerUnreachable, match=r"name (it|them) with --port.* relay \(12D3KooW.*: "):
        async with entered(bootstrap, relay="always"):
            pass


@pytest.mark.parametrize("settings", [{"relay": "never"}, {"announce": ("127.0.0.1",)}])
async def test_a_server_that_is_told_where_it_is_does_not_ask(
    helpful: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object]
):
    """--relay never, and --announce."""

    async def ask(*args: object) -> Verdict:
        raise AssertionError("asked")

    monkeypatch.setattr(reach_module, "ask_around", ask)
    async with entered(helpful, **settings) as reach:
        assert not reach.is_relayed


@pytest.mark.parametrize("relay", ["auto", "always", "never"])
async def test_a_member_that_may_not_serve_is_told_so_at_once(tmp_path: Path, relay: str):
    """However it would be reached."""
    lab = lab_now()
    async with await Node.start(NodeConfig(host="127.0.0.1", credentials=lab.invite(), state_dir=tmp_path)) as node:
        ana = SimpleNamespace(node=node, credentials=lab.invite("ana", Role.CLIENT))
        with pytest.raises(AccessDenied, match="not for serving"):
            async with entered(ana, relay=relay):
                pass


async def test_a_server_that_is_told_to_takes_relays_without_asking(
    helpful: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
):
    """--relay always: it doesn't even listen."""

    async def ask(*args: object) -> Verdict:
        raise AssertionError("asked")

    monkeypatch.setattr(reach_module, "ask_around", ask)
    async with entered(helpful, relay="always") as reach:
        assert reach.is_relayed and reach.relays == (helpful.node.peer_id,)
        assert reach.node.addresses == () and reach.relay_desk is None


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What others say, at once and without end."""
    said = SimpleNamespace(verdict=Verdict(is_reachable=True, host="127.0.0.1", num_answers=3), times=[])

    async def ask_around(*args: object) -> Verdict | None:
        said.times.append(asyncio.get_running_loop().time())
        return said.verdict

    for name in ("CONFIRM_S", "HOLD_S"):
        monkeypatch.setattr(standing, name, 0.01)
    monkeypatch.setattr(reach_module, "ask_around", ask_around)
    return said


async def until(reach: Reach, changed: asyncio.Event, *, is_relayed: bool) -> None:
    """Wait until it is so, and others are told."""
    while reach.is_relayed is not is_relayed or bool(reach.relays) is not is_relayed:
        changed.clear()
        await asyncio.wait_for(changed.wait(), 30)


async def test_a_server_that_is_reached_no_more_takes_relays_and_comes_back(
    helpful: SimpleNamespace, asked: SimpleNamespace
):
    """It gives up those that it relays for, keeps its connections, and helps again when it can be reached again."""
    changed = asyncio.Event()
    async with entered(helpful) as reach:
        reach.follow(tuple, changed.set)
        reservation = await helpful.transport.open(reach.node.peer_id, RELAY_SERVICE, timeout_s=5)
        await reservation.send(Reserve())
        await reservation.receive(5)
        kept, addresses = reservation._connection, reach.node.addresses
        asked.verdict = Verdict(is_reachable=False, host="192.0.2.1", num_answers=3)
        reach.transport.on_silence()
        await until(reach, changed, is_relayed=True)
        assert reach.relays == (helpful.node.peer_id,) and reach.node.addresses == ()
        assert not reach.transport.is_reachable
        with pytest.raises(PeerUnreachable, match="this relay any more"):
            await reservation.receive(5)
        refused = kept.open_stream(RELAY_SERVICE)
        await refused.send(Reserve())
        with pytest.raises(PeerUnreachable, match="at present"):
            await refused.receive(5)
        asked.verdict = Verdict(is_reachable=True, host="127.0.0.1", num_answers=3)
        reach.transport.on_silence()
        await until(reach, changed, is_relayed=False)
        assert reach.node.addresses == addresses and reach.transport.is_reachable
        again = kept.open_stream(RELAY_SERVICE)
        await again.send(Reserve())
        await again.receive(5)


async def test_one_wrong_word_changes_nothing(helpful: SimpleNamespace, asked: SimpleNamespace):
    """Those who are asked next say otherwise."""
    changed = asyncio.Event()
    async with entered(helpful) as reach:
        reach.follow(tuple, changed.set)
        right, num_asked, peer_ids = asked.verdict, len(asked.times), reach.node.connected_peers
        again = asyncio.Event()

        async def connected_peers() -> tuple[str, ...]:
            if len(asked.times) > num_asked:
                asked.verdict = right
                again.set()
            return await peer_ids()

        reach.node.connected_peers = connected_peers  # type: ignore[method-assign]
        asked.verdict = Verdict(is_reachable=False, host="192.0.2.1", num_answers=3)
        reach.transport.on_silence()
        await asyncio.wait_for(again.wait(), 30)
        assert not reach.is_relayed and reach.transport.is_reachable and not changed.is_set()


async def test_a_server_whose_machine_is_at_another_address_asks_again(
    helpful: SimpleNamespace, asked: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
):
    """Its addresses are looked up anew; a machine without any address has not moved."""
    sources, changed = ["192.168.1.2", "", "192.168.1.2"], asyncio.Event()
    monkeypatch.setattr(reach_module, "source_address", lambda: sources.pop() if len(sources) > 1 else sources[0])
    monkeypatch.setattr(reach_module, "LOOK_S", 0.01)
    async with entered(helpful) as reach:
        reach.follow(tuple, changed.set)
        while len(sources) > 1:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert len(asked.times) == 1
        asked.verdict = Verdict(is_reachable=True, host="127.0.0.9", num_answers=3)
        sources[0] = "192.168.7.2"
        while {address.split("/")[2] for address in reach.node.addresses} != {"127.0.0.9", "127.0.0.1"}:
            changed.clear()
            await asyncio.wait_for(changed.wait(), 30)


async def test_who_is_shown_that_it_can_be_reached_need_not_be_told(bootstrap: SimpleNamespace):
    """In a swarm whose peers can't tell, a stranger who connects proves it; then hidden peers are asked to connect."""
    async with entered(bootstrap) as reach:
        assert not reach.transport.is_reachable
        reach.transport.on_reached("127.0.0.1")
        assert not reach.transport.is_reachable
        reach.transport.on_reached("8.8.8.8")
        assert reach.transport.is_reachable


async def test_the_address_of_this_machine_is_found_without_sending_anything():
    """Where it has a way to others; it may have none."""
    assert reach_module.source_address() == "" or reach_module.source_address().count(".") == 3
