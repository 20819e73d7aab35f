"""A route is handed out over servers that are there, as far as those that are asked say so."""

import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.client.presence import SLOW_S, over_present
from swarm.errors import PeerTimeout, PeerUnreachable, RelaysBusy, RouteNotFound
from swarm.routing import VISIT_S, Offer, Router
from swarm.types import BlockRange

BLOCKS = BlockRange(0, 3)
DEAD, SLOW = PeerUnreachable("refused"), PeerTimeout("3 s")


class FakeSwarm:
    """Servers of one block each, some of which do not answer.

    Args:
        servers: which block each has, and what goes wrong when it is asked.
    """

    def __init__(self, servers):
        self.block_of = {f"p{index}": block for index, (block, _) in enumerate(servers)}
        self.errors = {f"p{index}": error for index, (_, error) in enumerate(servers) if error is not None}
        self.asked = []
        offers = [
            Offer(peer_id=peer_id, blocks=BlockRange(block, block + 1), block_s=0.01 * index, visit_s=VISIT_S)
            for index, (peer_id, block) in enumerate(self.block_of.items())
        ]
        self._router = Router(offers)

    def find(self, silent):
        return self._router.fastest(BLOCKS, penalties=silent)

    async def ask(self, peer_ids):
        self.asked += peer_ids
        return {peer_id: self.errors[peer_id] for peer_id in peer_ids if peer_id in self.errors}

    def servers_of(self, block, *errors):
        """The servers of a block with one of these errors."""
        return {peer_id for peer_id, of in self.block_of.items() if of == block and self.errors.get(peer_id) in errors}


servers = st.lists(st.tuples(st.integers(0, 2), st.sampled_from([None, DEAD, SLOW])), max_size=9)


@given(servers)
def test_routes_go_over_the_living_the_slow_only_where_they_must_and_never_over_the_dead(others):
    """Nobody is asked twice, and what is missing is named."""
    swarm = FakeSwarm([(0, DEAD), (1, SLOW), (2, None), *others])
    lives = [swarm.servers_of(block, None) for block in BLOCKS]
    usable = [swarm.servers_of(block, None, SLOW) for block in BLOCKS]
    try:
        hops = asyncio.run(over_present(swarm.find, swarm.ask))
    except RouteNotFound as error:
        missing = list(error.missing)
        assert missing and not any(usable[block] for block in missing)
    else:
        assert all(usable)
        for block, hop in zip(BLOCKS, hops, strict=True):
            assert hop.peer_id in (lives[block] or usable[block])
    assert len(swarm.asked) == len(set(swarm.asked))


async def test_blocks_of_which_all_servers_are_gone_are_missing():
    """As if they had no record."""
    swarm = FakeSwarm([(0, None), (1, DEAD), (1, DEAD), (2, None)])
    with pytest.raises(RouteNotFound, match="1:2 are gone") as caught:
        await over_present(swarm.find, swarm.ask)
    assert list(caught.value.missing) == [1] and set(swarm.asked) == {"p0", "p1", "p2", "p3"}


def test_a_server_whose_relays_are_busy_is_not_gone():
    """It is handed out where it is the only one, and not where another is there."""
    busy = RelaysBusy("no room", retry_after_s=7.0)
    alone = FakeSwarm([(0, None), (1, busy), (2, None)])
    assert len(asyncio.run(over_present(alone.find, alone.ask))) == 3
    swarm = FakeSwarm([(0, None), (1, busy), (2, None), (1, None)])
    assert [hop.peer_id for hop in asyncio.run(over_present(swarm.find, swarm.ask))] == ["p0", "p3", "p2"]


def test_asking_ends_in_time_however_many_are_silent():
    """Made-up servers, each better than the last, hold nobody up; who was not asked is handed out in the end."""
    swarm = FakeSwarm([(0, None), (1, None), (2, None)] + [(0, SLOW)] * 50)

    async def find() -> int:
        hops = await over_present(swarm.find, swarm.ask, ask_s=-1.0)
        return len(hops)

    assert asyncio.run(find()) == 3 and not swarm.asked


def test_who_did_not_answer_just_now_is_not_asked_again():
    """A second search goes on where the first one ended."""
    swarm = FakeSwarm([(0, SLOW), (1, None), (2, None)])
    silent: dict[str, float] = {}
    asyncio.run(over_present(swarm.find, swarm.ask, silent))
    assert list(silent) == ["p0"]
    asyncio.run(over_present(swarm.find, swarm.ask, silent))
    assert swarm.asked.count("p0") == 1


def test_a_live_server_without_free_capacity_comes_before_a_silent_one():
    """In training, where chains are drawn at random."""
    block = BlockRange(0, 8)
    router = Router([Offer(peer_id=name, blocks=block, block_s=0.01, visit_s=VISIT_S, free_tps=0.0) for name in "ab"])
    generator = np.random.default_rng(0)
    for _ in range(100):
        (hop,) = router.spread(block, generator, num_tokens=1024, penalties={"a": SLOW_S}).hops
        assert hop.peer_id == "b"
