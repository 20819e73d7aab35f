"""A live session goes where it is much quicker: beside its steps, without losing or repeating a token."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from swarm.client import betterment, moves, rerouting
from swarm.client.betterment import MoveCosts
from swarm.client.config import SessionConfig
from swarm.client.prospects import Outlook, Prospect
from swarm.client.session import RemoteSession
from swarm.server.session_moves import SessionMoves
from swarm.types import BlockRange, Hop
from tests.server.conftest import chain_of
from tests.server.fakes import eventually, tokens

from .test_moves import Swarm, expected, nodes  # noqa: F401

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch):
    """Looks follow each other at once, nobody waits for others, and steps need not be slow."""
    monkeypatch.setattr(rerouting, "LOOK_S", 0.01)
    monkeypatch.setattr(betterment, "DOUBLING_S", 0.0)
    monkeypatch.setattr(betterment, "PAYBACK", 0.0)
    monkeypatch.setattr(betterment, "GAIN_FLOOR_S", 0.0)


class Records:
    """What a client expects of its chain: new records at each look, and of one server only good."""

    def __init__(self, swarm: Swarm, good: int):
        self.swarm, self.good, self.num_looks = swarm, good, 0
        swarm.peers.on_outlook = self.outlook

    def outlook(self, chain: tuple[Hop, ...]) -> Outlook:
        self.num_looks += 1
        hop = chain[self.good % 3]
        target = Hop(peer_id=self.swarm.chain.peer_id(self.good), blocks=hop.blocks)
        prospects = (Prospect(hop=hop, target=target, predicted_s=0.0),) if target != hop else ()
        return Outlook(version=self.num_looks, predicted_s=1.0, prospects=prospects)


class Talk:
    """A session that goes on, token by token, and checks each."""

    def __init__(self, session: RemoteSession):
        self.session, self.row = session, torch.zeros(0, 4)

    async def step(self, count: int = 1) -> None:
        new = tokens(count, len(self.row))
        self.row = torch.cat([self.row, new])
        start = len(self.row) - count
        outputs = await self.session.step(new, positions=[start], num_tokens=[count], num_outputs=[1])
        assert torch.equal(outputs, expected(self.row)[-1:])

    async def until(self, condition, max_steps: int = 500) -> None:
        """Go on until this is so, and then a little further."""
        for _ in range(max_steps):
            if condition():
                break
            await self.step()
            await asyncio.sleep(0.002)
        assert condition()
        for _ in range(3):
            await self.step()


async def num_looks_go_on(talk: Talk, records: Records, count: int) -> None:
    """So many more looks, while the session goes on."""
    upto = records.num_looks + count
    await talk.until(lambda: records.num_looks >= upto)


@pytest.mark.parametrize("push", [True, False], ids=["push", "star"])
@pytest.mark.parametrize("index", range(3))
async def test_a_session_goes_where_it_is_quicker_and_stays(nodes, index, push):  # noqa: F811
    """One hop moves, once; nobody computes anything again, and every output is right."""
    async with chain_of(nodes, 6) as chain:
        swarm = Swarm(chain)
        records = Records(swarm, good=index + 3)
        session = swarm.session(push=push)
        talk = Talk(session)
        await talk.step(40)
        await talk.until(lambda: session.moves.num_moves == 1)
        records.good = index  # never back
        await num_looks_go_on(talk, records, 10)
        assert swarm.on(session) == [hop + 3 if hop == index else hop for hop in range(3)]
        assert session.moves.num_moves == 1 and session.machine.num_replays == 0 and swarm.peers.failures == []
        run = swarm.num_run()
        assert [a + b for a, b in zip(run[:3], run[3:], strict=True)] == [len(talk.row)] * 3
        hop = session.route[index]
        assert swarm.peers.move_costs.expected_s(hop, 1000) != MoveCosts().expected_s(hop, 1000)  # it was measured
        await session.close()
        await eventually(lambda: chain.pages == 0, "freed pages")


async def test_a_session_that_may_not_stays_where_it_is(nodes):  # noqa: F811
    """The switch is off: nobody even looks."""
    async with chain_of(nodes, 6) as chain:
        swarm = Swarm(chain)
        records = Records(swarm, good=4)
        session = swarm.session(reroute=False)
        talk = Talk(session)
        for _ in range(50):
            await talk.step()
            await asyncio.sleep(0.002)
        assert not records.num_looks and swarm.on(session) == [0, 1, 2]
        await session.close()


async def test_nobody_looks_for_an_idle_session(nodes):  # noqa: F811
    """The timer ends when no step has come for as long as it runs, and begins again with the next."""
    async with chain_of(nodes, 6) as chain:
        swarm = Swarm(chain)
        records = Records(swarm, good=1)  # where it is
        session = swarm.session()
        talk = Talk(session)
        await talk.step()
        timer = session._rerouting._timer
        assert timer is not None
        await asyncio.wait([timer])
        seen = records.num_looks
        await talk.step()
        await eventually(lambda: records.num_looks > seen, "another look")
        await session.close()


async def test_a_server_without_room_costs_nothing(nodes, monkeypatch):  # noqa: F811
    """It refuses, the old server goes on, it isn't asked again, and that moves fail is learnt."""
    monkeypatch.setattr(betterment, "RETRY_S", 0.0)
    async with chain_of(nodes, 6) as chain:
        swarm = Swarm(chain)
        records = Records(swarm, good=4)
        chain.executors[4].num_pages = 1
        session = swarm.session()
        talk = Talk(session)
        await talk.step(40)
        await num_looks_go_on(talk, records, 20)
        assert swarm.on(session) == [0, 1, 2] and session.moves._num_tries == 1
        assert session.moves.num_moves == session.machine.num_replays == 0
        assert chain.executors[1].num_tokens_run == len(talk.row)
        costs, hop = swarm.peers.move_costs, session.route[1]
        assert costs.price_s(hop, 1000) > costs.expected_s(hop, 1000)  # the next one must earn more
        await session.close()
        await eventually(lambda: chain.pages == 0, "freed pages")


async def test_a_server_that_dies_when_it_is_to_take_a_session_costs_nothing(nodes, monkeypatch):  # noqa: F811
    """Half of the state has come; the old server goes on."""
    async with chain_of(nodes, 6) as chain:
        swarm = Swarm(chain)
        records = Records(swarm, good=4)
        session = swarm.session()
        talk = Talk(session)
        dying = asyncio.Event()

        async def stop(cache):
            dying.set()
            await asyncio.sleep(3600)

        monkeypatch.setattr(chain.executors[4], "layout", stop)
        await talk.step(40)
        await num_looks_go_on(talk, records, 1)
        await dying.wait()
        await chain.transports[4].close()
        for _ in range(5):
            await talk.step()
        assert swarm.on(session) == [0, 1, 2] and session.machine.num_replays == 0
        assert chain.executors[1].num_tokens_run == len(talk.row)
        assert session.moves.num_moves == 0
        await session.close()


async def test_a_server_that_must_leave_meanwhile_is_left_by_another_way(nodes):  # noqa: F811
    """The quick server refuses; the old one was told to stop in that moment: the session goes to somebody else."""
    async with chain_of(nodes, 6) as chain:
        swarm = Swarm(chain)
        chain.executors[4].num_pages = 1
        chain.executors[3].constant = chain.executors[1].constant
        session = swarm.session()
        talk = Talk(session)
        await talk.step(40)
        (hop,) = [it for it in session._hops if it.hop == session.route[1]]
        spare = chain.peer_id(3)
        swarm.peers.servers.insert(0, type(swarm.peers.servers[0])(peer_id=spare, blocks=hop.hop.blocks))
        target = Hop(peer_id=chain.peer_id(4), blocks=hop.hop.blocks)
        moving = asyncio.create_task(session.moves.better(hop.hop, target))
        await eventually(lambda: hop.move is not None, "a move")
        session.moves.start(hop, 10.0)
        assert not await moving
        await talk.step()
        assert swarm.on(session) == [0, 3, 2] and session.machine.num_replays == 0
        await session.close()


async def test_who_gives_a_session_away_too_late_is_replaced_at_once(nodes, monkeypatch):  # noqa: F811
    """We had given the heir up, and nobody has the session: no need to wait until that shows."""
    monkeypatch.setattr(moves, "OWN_TIMEOUT_S", 0.05)
    may_answer, answer = asyncio.Event(), SessionMoves._answer

    def answer_later(own, message, why_not=""):
        asyncio.get_running_loop().create_task(wait_and_answer(own, message))

    async def wait_and_answer(own, message):
        await may_answer.wait()
        answer(own, message)

    monkeypatch.setattr(SessionMoves, "_answer", answer_later)
    async with chain_of(nodes, 6) as chain:
        swarm = Swarm(chain)
        session = swarm.session()
        talk = Talk(session)
        await talk.step(40)
        hop = session.route[1]
        assert not await session.moves.better(hop, Hop(peer_id=chain.peer_id(4), blocks=hop.blocks))
        may_answer.set()
        await eventually(lambda: session.machine.num_replays == 1, "the loss")
        await talk.step()
        await session.close()


async def test_a_session_with_a_gap_is_not_looked_at(nodes):  # noqa: F811
    """Somebody is lost: that is to be healed first."""
    async with chain_of(nodes, 6) as chain:
        swarm = Swarm(chain)
        records = Records(swarm, good=5)
        session = swarm.session()
        await Talk(session).step(10)
        session.machine.failed(list(session.machine.hops)[1])
        await session._rerouting._look()
        assert not records.num_looks
        await session.close()


async def test_moves_for_a_server_count_as_moves(nodes):  # noqa: F811
    """Who was sent away a moment ago stays where it is now."""
    async with chain_of(nodes, 6) as chain:
        swarm = Swarm(chain)
        records = Records(swarm, good=4)
        session = swarm.session()
        talk = Talk(session)
        await talk.step(10)
        await swarm.drain(0)
        await num_looks_go_on(talk, records, 10)
        assert swarm.on(session) == [3, 1, 2]
        await session.close()


async def test_two_hops_of_one_server_are_measured_apart():
    """As where one server has taken over the blocks of another: the chain is looked at all the same."""
    own = rerouting.Rerouting(*[cast(Any, None)] * 4, SessionConfig(reroute=False))
    hops = [Hop(peer_id="a", blocks=BlockRange(0, 4)), Hop(peer_id="a", blocks=BlockRange(4, 8))]
    own.measured([timing_of(hop, seconds) for hop, seconds in zip(hops, (0.1, 0.3), strict=True)])
    assert own._hop_s == {hops[0]: pytest.approx(0.1), hops[1]: pytest.approx(0.3)}


def timing_of(hop: Hop, seconds: float) -> Any:
    """A step took so long there."""
    return SimpleNamespace(peer_id=hop.peer_id, blocks=hop.blocks, round_trip_s=seconds)
