"""Adapters in host memory: what is used stays, the rest goes by age, and nobody has more than its part."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from swarm.errors import PeerBusy
from swarm.server.adapter_store import OWNER, AdapterStore, HeldShard
from swarm.types import BlockRange
from tests.adapters import make_adapter

BLOCKS = BlockRange(0, 2)
ADAPTERS = [make_adapter(number + 1, rank=1) for number in range(6)]
SIZE = ADAPTERS[0].manifest.num_bytes + len(ADAPTERS[0].manifest.encode())


def fill(store, adapter, client):
    """All of an adapter, for the sake of a client."""
    held = store.find(adapter.digest) or store.add(adapter.manifest, adapter.manifest.encode(), client=client)
    missing = held.missing(BLOCKS)
    store.reserve(held, sum(info.num_bytes for info in missing) - held.reserved_bytes, client=client)
    for info in missing:
        shard = HeldShard(data=adapter.shards[info.block], delta=adapter.deltas[info.block])
        store.put(held, info.block, shard)
    return held


def digests(store):
    return [held.digest for held in store]


def test_the_least_recently_used_goes_first():
    """What was looked at is younger than what came after it."""
    gone = []
    store = AdapterStore(3 * SIZE, client_share=1.0, on_evicted=gone.append)
    for number in (0, 3, 0, 1, 2):
        fill(store, ADAPTERS[number], "a")
    assert gone == [ADAPTERS[3].digest] and store.num_evicted == 1
    assert digests(store)[-1] == ADAPTERS[0].digest
    assert store.used_bytes == sum(held.num_bytes for held in store) == store.bytes_of("a")


def test_what_sessions_use_stays_and_the_newcomer_is_told_both_numbers():
    """A pinned adapter is never evicted; the refusal says what is needed and what is free."""
    store = AdapterStore(2 * SIZE, client_share=1.0)
    for number in (0, 3):
        store.pin(ADAPTERS[number].digest, "a")
        fill(store, ADAPTERS[number], "a")
    with pytest.raises(PeerBusy, match=r"need \d+ bytes, \d+ free"):
        fill(store, ADAPTERS[1], "b")
    store.unpin(ADAPTERS[0].digest, "a")
    fill(store, ADAPTERS[1], "b")
    assert set(digests(store)) == {ADAPTERS[3].digest, ADAPTERS[1].digest}


def test_a_client_has_no_more_than_its_part():
    """Its own unused adapters go for its new ones, and none of others; what it uses counts to the end."""
    store = AdapterStore(8 * SIZE, client_share=0.25)
    fill(store, ADAPTERS[3], "b")
    fill(store, ADAPTERS[0], "a")
    store.pin(ADAPTERS[0].digest, "a")
    fill(store, ADAPTERS[1], "a")
    fill(store, ADAPTERS[2], "a")
    assert set(digests(store)) == {ADAPTERS[number].digest for number in (0, 2, 3)}
    store.pin(ADAPTERS[2].digest, "a")
    with pytest.raises(PeerBusy, match="your sessions have adapters of"):
        fill(store, ADAPTERS[4], "a")
    assert store.bytes_of("a") <= 2 * SIZE and ADAPTERS[3].digest in digests(store)


def test_an_adapter_beyond_any_part_is_refused_for_good():
    """Whatever goes, it would not fit; the server's own may have everything."""
    store = AdapterStore(SIZE + 10, client_share=0.5)
    with pytest.raises(PeerBusy, match="takes") as caught:
        fill(store, ADAPTERS[0], "a")
    assert caught.value.retry_after_s > 600
    fill(store, ADAPTERS[0], OWNER)


def test_who_alone_uses_an_adapter_pays_for_it():
    """When the client who brought it has left, it counts as another user's; unused, it stays where it is."""
    store = AdapterStore(8 * SIZE)
    for client in "ab":
        store.pin(ADAPTERS[0].digest, client)
    fill(store, ADAPTERS[0], "a")
    store.unpin(ADAPTERS[0].digest, "a")
    assert store.bytes_of("a") == 0 and store.bytes_of("b") == store.used_bytes
    store.unpin(ADAPTERS[0].digest, "b")
    assert store.bytes_of("b") == store.used_bytes


def test_what_does_not_come_gives_its_memory_back():
    """Reserved memory is free again after a transfer that was given up, and a shard that comes late finds room anew."""
    store = AdapterStore(4 * SIZE)
    adapter = ADAPTERS[1]
    held = store.add(adapter.manifest, adapter.manifest.encode(), client="a")
    store.reserve(held, adapter.manifest.num_bytes, client="a")
    store.give_up(held)
    assert store.used_bytes == len(adapter.manifest.encode())
    store.put(held, 0, HeldShard(data=adapter.shards[0], delta=adapter.deltas[0]))
    store.put(held, 0, HeldShard(data=adapter.shards[0], delta=adapter.deltas[0]))
    assert store.used_bytes == held.num_bytes == len(adapter.manifest.encode()) + len(adapter.shards[0])
    assert [info.block for info in held.missing(BLOCKS)] == [1]


class StoreMachine(RuleBasedStateMachine):
    """Clients bring, use and leave adapters, some of which never come whole."""

    def __init__(self):
        super().__init__()
        self.store = AdapterStore(4 * SIZE, client_share=0.6, on_evicted=self.evicted)
        self.pins = []

    def evicted(self, digest):
        assert all(digest != pinned for pinned, _ in self.pins)

    @rule(adapter=st.sampled_from(ADAPTERS), client=st.sampled_from("abc"))
    def use(self, adapter, client):
        self.store.pin(adapter.digest, client)
        self.pins.append((adapter.digest, client))
        try:
            fill(self.store, adapter, client)
        except PeerBusy:
            self.leave(len(self.pins) - 1)

    @rule(adapter=st.sampled_from(ADAPTERS), client=st.sampled_from("abc"))
    def begin(self, adapter, client):
        """A transfer that breaks after the first shard."""
        if self.store.find(adapter.digest) is not None:
            return
        try:
            held = self.store.add(adapter.manifest, adapter.manifest.encode(), client=client)
            self.store.reserve(held, adapter.manifest.num_bytes, client=client)
        except PeerBusy:
            return
        self.store.put(held, 0, HeldShard(data=adapter.shards[0], delta=adapter.deltas[0]))
        self.store.give_up(held)

    @rule(index=st.integers(0, 20))
    def leave(self, index):
        if self.pins:
            self.store.unpin(*self.pins.pop(index % len(self.pins)))

    @invariant()
    def bytes_are_counted(self):
        held = list(self.store)
        assert self.store.used_bytes == sum(it.num_bytes for it in held) <= self.store.limit_bytes
        assert self.store.used_bytes == sum(self.store.bytes_of(client) for client in "abc")
        here = {it.digest for it in held}
        for digest, _ in self.pins:
            assert digest in here


StoreMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestStore = StoreMachine.TestCase
