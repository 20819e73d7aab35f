"""Searches ask a silent node once, end in time, and do not take silence for "nothing there"."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
import pytest_asyncio

from swarm.errors import PeerTimeout
from swarm.network import Node, NodeConfig, dht, silence
from swarm.network import node as node_module
from swarm.network import search as search_module
from swarm.network.hive import DHTID, PeerID
from swarm.network.search import Search, node_id_of
from swarm.registry import NUM_SHARDS

KEYS = [f"key {index}" for index in range(NUM_SHARDS)]
PEERS = [PeerID(bytes([number]) * 32) for number in range(8)]


class Calls:
    """What one node asks others, and which of them do not answer: a call to these hangs, as one to a lost machine."""

    def __init__(self, node: Node) -> None:
        self.silent: set[str] = set()
        self.asked: Counter[str] = Counter()
        caller: Any = node._underlay.caller
        self._call = caller.call_unary_handler
        caller.call_unary_handler = self._called

    async def _called(self, peer_id: Any, name: str, data: bytes) -> bytes:
        if name.rpartition(".")[2] != "rpc_ping":
            self.asked[peer_id.to_base58()] += 1
        if peer_id.to_base58() in self.silent:
            await asyncio.Event().wait()
        reply: bytes = await self._call(peer_id, name, data)
        return reply


@pytest_asyncio.fixture
async def nodes(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[Node]]:
    """Eight, of which three have stored a value under each of some keys; calls fail after half a second."""
    monkeypatch.setattr(dht, "CALL_TIMEOUT_S", 0.5)
    monkeypatch.setattr(silence, "CHECK_S", 0.5)
    monkeypatch.setattr(node_module, "WATCH_PERIOD_S", 0.1)
    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(await Node.start(NodeConfig(host="127.0.0.1")))]
        config = NodeConfig(host="127.0.0.1", initial_peers=nodes[0].addresses)
        others = await asyncio.gather(*(Node.start(config) for _ in range(7)))
        nodes += [await stack.enter_async_context(node) for node in others]
        async with asyncio.timeout(30):
            while any(node.num_peers < 7 for node in nodes):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        expires_at = time.time() + 60
        await asyncio.gather(
            *(node.dht_store(key, node.peer_id, b"value", expires_at) for node in nodes[:3] for key in KEYS[:4])
        )
        yield nodes


async def test_silent_nodes_are_asked_once_by_a_search_and_then_left_out_until_they_answer(nodes: list[Node]):
    """Three of eight: neither the search, nor the next one, nor who stores a value asks them again."""
    seeker, silent = nodes[0], {node.peer_id for node in nodes[-3:]}
    calls = Calls(seeker)
    expected = {key: {node.peer_id: b"value" for node in nodes[:3]} if key in KEYS[:4] else {} for key in KEYS}
    assert await seeker.dht_get_many(KEYS) == expected
    assert set(calls.asked.values()) == {1}, "a small swarm is asked for all keys at once"
    calls.asked.clear()
    calls.silent |= silent
    for _ in range(2):
        assert await seeker.dht_get_many(KEYS) == expected
    assert await seeker.dht_store(KEYS[0], seeker.peer_id, b"news", time.time() + 70)
    assert all(calls.asked[peer_id] == 1 for peer_id in silent)
    assert not any(seeker.knows(peer_id) for peer_id in silent)
    calls.silent.clear()
    async with asyncio.timeout(30):
        while not all(seeker.knows(peer_id) for peer_id in silent):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    calls.asked.clear()
    await seeker.dht_get_many(KEYS)
    assert all(calls.asked[peer_id] for peer_id in silent), "who answers again is asked again"


async def test_silence_is_not_taken_for_nothing_there(nodes: list[Node]):
    """A newcomer that would believe it would take the swarm for empty."""
    seeker = nodes[-1]
    seeker._dht._node.protocol.storage.clear()  # a newcomer keeps nothing for others yet
    calls = Calls(seeker)
    calls.silent |= {node.peer_id for node in nodes[:-1]}
    for _ in range(2):  # the second time nobody is left in its table
        with pytest.raises(PeerTimeout, match="does not answer"):
            await seeker.dht_get_many(KEYS)
    calls.silent.clear()
    async with asyncio.timeout(30):
        while not seeker.num_peers:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert len((await seeker.dht_get_many(KEYS))[KEYS[0]]) == 3


async def answer(peer_id: Any, keys: Any) -> Any:
    return dict.fromkeys(keys, (None, {}))


async def hang(peer_id: Any, keys: Any) -> Any:
    await asyncio.Event().wait()


@pytest.mark.parametrize("is_nearest_silent", [True, False])
async def test_a_key_was_read_if_one_of_those_that_should_keep_it_has_answered(is_nearest_silent: bool):
    """What others say of it means nothing: they have no values of it."""
    key = DHTID.generate("a key")
    near_first = sorted(PEERS, key=lambda peer: key.xor_distance(node_id_of(peer)))
    silent = near_first[:2] if is_nearest_silent else near_first[1:3]
    search = Search([key], asks_for_all=True, num_keepers=2)
    for peer in PEERS:
        if peer not in silent:
            assert await search.ask(peer, [key], answer) == {key: (None, {})}
    assert search.has_answers and not search.open_calls
    assert search.was_read(key, silent) is not is_nearest_silent
    assert search.was_read(key, [])


@pytest.mark.parametrize("num_near", [1, 2])
async def test_who_is_slow_is_waited_for_until_two_of_those_near_the_key_have_answered(monkeypatch, num_near: int):
    """Dead nodes cost a second, not three; while too few have answered, the values may be with those that are slow."""
    monkeypatch.setattr(search_module, "SLOW_S", 0.01)
    key = DHTID.generate("a key")
    near_first = sorted(PEERS, key=lambda peer: key.xor_distance(node_id_of(peer)))
    search = Search([key], asks_for_all=True, num_keepers=4)
    slow = near_first[num_near:4]
    asking = [asyncio.ensure_future(search.ask(peer, [key], hang)) for peer in slow]
    for peer in [*near_first[:num_near], *near_first[4:]]:
        assert await search.ask(peer, [key], answer) == {key: (None, {})}
    done, waiting = await asyncio.wait(asking, timeout=1.0 if num_near == 1 else 20.0)
    assert len(waiting) == (len(slow) if num_near == 1 else 0) and {task.result() for task in done} <= {None}
    assert search.open_calls == slow, "they may answer yet, which says whether they are there"
    search.end()
    assert await asyncio.gather(*asking) == [None] * len(slow)
    for call in search._calls.values():
        call.cancel()


async def test_an_answer_that_leaves_keys_out_says_nothing_of_them():
    """hivemind drops what a stranger sends with an unknown type."""
    keys = [DHTID.generate(name) for name in ("a", "b")]

    async def answer_half(peer_id: Any, asked: Any) -> Any:
        return {keys[0]: (None, {})}

    search = Search(keys, asks_for_all=True, num_keepers=5)
    assert await search.ask(PEERS[0], keys, answer_half) == {keys[0]: (None, {})}
    assert search.was_read(keys[0], [PEERS[1]])
    assert not search.was_read(keys[1], [PEERS[1]])


async def test_reading_ends_though_the_search_breaks(monkeypatch: pytest.MonkeyPatch):
    """A stranger's answer can end hivemind's search with an error that it keeps to itself."""
    monkeypatch.setattr(search_module, "GRACE_S", 0.05)
    monkeypatch.setattr(node_module, "DHT_TIMEOUT_S", 0.05)
    async with await Node.start(NodeConfig(host="127.0.0.1")) as node:
        monkeypatch.setattr(node._dht._node, "get_many", lambda *args, **options: asyncio.Event().wait())
        with pytest.raises(PeerTimeout):
            await node.dht_get_many(KEYS)


async def test_a_search_that_is_over_waits_for_nobody_and_asks_nobody():
    """Who was asked and has not answered may be there."""
    key = DHTID.generate("a key")
    search = Search([key], asks_for_all=False, num_keepers=5)
    asking = asyncio.ensure_future(search.ask(PEERS[0], [key], hang))
    await asyncio.sleep(0)
    search.end()
    assert await asking is None
    assert await search.ask(PEERS[1], [key], answer) is None
    assert search.open_calls == [PEERS[0]] and not search.has_answers
    assert not search.was_read(key, search.open_calls)
    for call in search._calls.values():
        call.cancel()
