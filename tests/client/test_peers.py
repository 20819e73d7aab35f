"""What a client remembers of servers beside their records."""

import asyncio
import logging
from typing import Any, cast

import pytest

from swarm.client import peers as peers_module
from swarm.client.peers import PUSH_RETRY_S, REFRESH_S, Peers
from swarm.errors import PeerDisconnected
from swarm.registry import ServerRecord
from swarm.types import BlockRange, ServerState


@pytest.fixture
def peers() -> Peers:
    """Nobody is asked for records here."""
    return Peers(cast(Any, None), model="0" * 64, model_name="fake", num_blocks=2)


def test_servers_that_cannot_reach_each_other_are_named_once(peers, caplog):
    """The user learns which two; the pair is known from then on, in this direction only."""
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            peers.cannot_push("sender-12345678", "receiver-87654321")
    assert [record.message for record in caplog.records] == [
        "server …12345678 can't send to server …87654321: what goes from one to the other now passes this client"
    ]
    assert peers.pairs_without_push == {("sender-12345678", "receiver-87654321")}


def test_servers_that_could_not_reach_each_other_get_another_try(peers, monkeypatch):
    """After some minutes the network may be another."""
    now = 1000.0
    monkeypatch.setattr(peers_module.time, "monotonic", lambda: now)
    peers.cannot_push("a", "b")
    now += PUSH_RETRY_S - 1
    assert peers.pairs_without_push
    now += 1
    assert not peers.pairs_without_push


class SlowRegistry:
    """Answers when it is told to."""

    def __init__(self, *records):
        self.records, self.num_lookups = records, 0
        self.may_answer = asyncio.Event()

    async def lookup(self, model):
        self.num_lookups += 1
        await self.may_answer.wait()
        return self.records


def record(peer_id: str) -> ServerRecord:
    return ServerRecord(
        peer_id=peer_id,
        model="0" * 64,
        blocks=BlockRange(0, 2),
        state=ServerState.ONLINE,
        decode_tps=100.0,
        load=0.0,
        kv_free_tokens=1000,
        quantization="none",
        dtype="float32",
        public_name="",
        version="0",
        expires_at=1e12,
    )


async def test_a_route_does_not_wait_for_old_records_to_be_read_again(peers, monkeypatch):
    """A failover in a long session goes on with what is known, and the news comes in the background, once."""
    now = 1000.0
    monkeypatch.setattr(peers_module.time, "monotonic", lambda: now)
    registry = peers._registry = SlowRegistry(record("old"))
    registry.may_answer.set()
    assert [hop.peer_id for hop in await peers.route(BlockRange(0, 2))] == ["old"]
    registry.may_answer.clear()
    registry.records = (record("new"),)
    now += REFRESH_S
    for _ in range(3):
        peers.keep_fresh()
        assert [hop.peer_id for hop in await peers.route(BlockRange(0, 2))] == ["old"]
    registry.may_answer.set()
    await peers._reader
    assert registry.num_lookups == 2
    assert [hop.peer_id for hop in await peers.route(BlockRange(0, 2))] == ["new"]


async def test_a_route_over_a_server_that_failed_is_only_made_with_fresh_records(peers, monkeypatch):
    """Nobody better is known: perhaps there is news."""
    now = 1000.0
    monkeypatch.setattr(peers_module.time, "monotonic", lambda: now)
    registry = peers._registry = SlowRegistry(record("only"))
    registry.may_answer.set()
    await peers.route(BlockRange(0, 2))
    now += 1.0
    peers.failed("only", PeerDisconnected("gone"))
    registry.records = (record("spare"), record("only"))
    assert [hop.peer_id for hop in await peers.route(BlockRange(0, 2))] == ["spare"]
