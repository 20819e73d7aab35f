"""Searches for those who shall keep a value: they find the nodes nearest to it, and fetch nothing."""

import time
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from swarm.network import Node, NodeConfig
from swarm.network.hive import DHTID
from swarm.network.store_search import beside

IDS = st.integers(0, 2**160 - 1)


@given(key=IDS, nodes=st.sets(IDS, min_size=1, max_size=20))
def test_who_is_nearest_to_the_id_beside_a_key_is_nearest_to_the_key(key, nodes):
    """Unless two nodes differ in nothing but the last bit, which does not happen to hashes."""
    nodes = {node & ~1 for node in nodes}
    key_id = DHTID(key)
    assert beside(beside(key_id)) == key_id != beside(key_id)
    assert sorted(nodes, key=key_id.xor_distance) == sorted(nodes, key=beside(key_id).xor_distance)


async def test_who_stores_a_value_is_not_sent_those_of_others():
    """Another peer has stored a large one under the same key; both are found by a third that looks for them."""
    config = NodeConfig(host="127.0.0.1")
    async with await Node.start(config) as a:
        config = NodeConfig(host="127.0.0.1", initial_peers=a.addresses)
        async with await Node.start(config) as b, await Node.start(config) as c:
            large, expires_at = b"x" * 1000, time.time() + 60
            assert await b.dht_store("key", b.peer_id, large, expires_at)
            answers = count_answers(c)
            assert await c.dht_store("key", c.peer_id, b"small", expires_at)
            assert answers and not any(large in answer for answer in answers)
            assert await a.dht_get("key") == {b.peer_id: large, c.peer_id: b"small"}
            assert await c.dht_get("key") == {b.peer_id: large, c.peer_id: b"small"}


def count_answers(node: Node) -> list[bytes]:
    """What others answer to a node's searches from now on."""
    answers: list[bytes] = []
    caller: Any = node._underlay.caller  # type: ignore[union-attr]
    call = caller.call_unary_handler

    async def noted(peer_id: Any, name: str, data: bytes) -> bytes:
        reply: bytes = await call(peer_id, name, data)
        if name.endswith(".rpc_find"):
            answers.append(reply)
        return reply

    caller.call_unary_handler = noted
    return answers
