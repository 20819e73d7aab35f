"""Records of clients in the DHT: bounded, checked, and only those of the same run count."""

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import PeerMisbehaved
from swarm.federated.agreement import MAX_CLIENTS
from swarm.federated.roll import MAX_RECORD_BYTES, ClientRecord, Roll

RUN = "a" * 64


class FakeNode:
    """A DHT with one key."""

    peer_id = "me"

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    async def dht_get(self, key: str) -> dict[str, bytes]:
        return self.values

    async def dht_store(self, key: str, subkey: str, value: bytes, expires_at: float) -> bool:
        self.values[subkey] = value
        return True


def record(run: str = RUN, *, is_leaving: bool = False) -> bytes:
    return msgspec.msgpack.encode(ClientRecord(1, run, is_leaving))


async def test_those_of_the_same_run_are_found(caplog):
    """Not ourselves, nor those who leave; other settings are told of once, garbage is not."""
    node = FakeNode()
    roll = Roll(node, name="run", model="m", run=RUN, members=None)
    assert await roll.announce()
    node.values |= {"b": record(), "c": record(is_leaving=True), "d": record("f" * 64), "e": b"\xff"}
    assert await roll.peers() == await roll.peers() == ["b"]
    assert caplog.text.count("d has a run of this name with other settings") == 1
    await roll.announce(is_leaving=True)
    assert ClientRecord.decode(node.values["me"], peer_id="me").is_leaving


async def test_members_only_where_there_is_a_list():
    """Others may announce what they like."""
    node = FakeNode()
    node.values = {"b": record(), "c": record()}
    assert await Roll(node, name="run", model="m", run=RUN, members=["c", "me"]).peers() == ["c"]


async def test_a_crowd_is_cut():
    """As many as a round has room for, the same for all who see the same."""
    node = FakeNode()
    node.values = {f"peer{number:04}": record() for number in range(500)}
    assert len(await Roll(node, name="run", model="m", run=RUN, members=None).peers()) == MAX_CLIENTS - 1


@given(st.binary(max_size=2 * MAX_RECORD_BYTES))
def test_any_bytes_are_a_record_or_refused(data: bytes):
    """Never another exception."""
    with contextlib.suppress(PeerMisbehaved):
        assert ClientRecord.decode(data, peer_id="p").version == 1


def test_a_large_record_is_not_parsed():
    """The limit is in the message."""
    with pytest.raises(PeerMisbehaved, match=f"limit {MAX_RECORD_BYTES}"):
        ClientRecord.decode(bytes(MAX_RECORD_BYTES + 1), peer_id="p")
