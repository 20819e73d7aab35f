"""What a client remembers of servers beside their records."""

import logging
from typing import Any, cast

import pytest

from swarm.client import peers as peers_module
from swarm.client.peers import PUSH_RETRY_S, Peers


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
