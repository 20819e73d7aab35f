"""Records are read shard by shard, whole in a small swarm, within a budget of bytes in a large one."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm import directory as directory_module
from swarm.directory import COPY_BYTES, NUM_COPIES, READ_BYTES_PER_S, REMEMBERED_S, Directory, shards_due
from swarm.errors import PeerTimeout
from swarm.registry import NUM_SHARDS, ServerRecord
from swarm.types import BlockRange, ServerState


def record(peer_id: str, **fields) -> ServerRecord:
    """A record that is valid for a minute."""
    usual = {
        "peer_id": peer_id,
        "model": "0" * 64,
        "blocks": BlockRange(0, 2),
        "state": ServerState.ONLINE,
        "decode_tps": 100.0,
        "load": 0.0,
        "kv_free_tokens": 0,
        "quantization": "none",
        "dtype": "float32",
        "public_name": "",
        "version": "0",
        "expires_at": time.time() + 60.0,
    }
    return ServerRecord(**{**usual, **fields})


class FakeRegistry:
    """Shards as a dictionary; notes which were read."""

    def __init__(self, shards):
        self.shards, self.reads, self.error = shards, [], None

    async def lookup_shards(self, model, shards, *, num_blocks):
        if self.error is not None:
            raise self.error
        self.reads.append(list(shards))
        return [self.shards.get(shard, []) for shard in shards]


def full_registry(per_shard) -> FakeRegistry:
    """So many servers in each shard."""
    names = [record(f"p{index}") for index in range(per_shard)]
    return FakeRegistry(dict.fromkeys(range(NUM_SHARDS), names))


def test_a_small_swarm_is_read_whole_each_time():
    """All shards are due as soon as they may be read at all."""
    assert shards_due([85.0] * 16, 100.0, 15.0, 100) == list(range(16))
    assert shards_due([100.0] * 16, 100.0, 0.0, 0) == list(range(16))


@given(st.integers(0, 30_000), st.floats(1.0, 60.0))
def test_reading_keeps_within_its_budget_and_comes_round_to_every_shard(num_records, max_age_s):
    """Over an hour no more bytes are read than the budget allows, but for one shard a time; none is forgotten."""
    read_at, now, num_bytes = [0.0] * NUM_SHARDS, 0.0, 0.0
    round_s = max(max_age_s, num_records * COPY_BYTES * NUM_COPIES / READ_BYTES_PER_S)
    num_reads = 0
    while now < 3600.0:
        now += max_age_s
        due = shards_due(read_at, now, max_age_s, num_records)
        rest = [at for shard, at in enumerate(read_at) if shard not in due]
        assert not rest or max(read_at[shard] for shard in due) <= min(rest)
        for shard in due:
            read_at[shard] = now
            num_bytes += num_records / NUM_SHARDS * COPY_BYTES * NUM_COPIES
        num_reads += 1
    shard_bytes = num_records / NUM_SHARDS * COPY_BYTES * NUM_COPIES
    assert num_bytes <= READ_BYTES_PER_S * now + num_reads * shard_bytes
    assert now - min(read_at) <= 2 * round_s + max_age_s


@pytest.mark.parametrize(
    ("per_shard", "num_searches", "num_shards"), [(0, 2, 16), (10, 2, 16), (125, 2, 8), (625, 1, 2)]
)
async def test_a_newcomer_reads_what_gives_it_a_choice(per_shard, num_searches, num_shards):
    """A small swarm whole, of a large one a thousand servers or more, in at most two searches."""
    registry = full_registry(per_shard)
    directory = Directory(registry, model="0" * 64, num_blocks=2)
    await directory.refresh(max_age_s=10.0)
    read = [shard for shards in registry.reads for shard in shards]
    assert (len(registry.reads), len(read), len(set(read))) == (num_searches, num_shards, num_shards)


async def test_newcomers_begin_with_different_shards():
    """Else the servers of the first ones would be known to all, and chosen by all."""
    begun = set()
    for _ in range(20):
        registry = FakeRegistry({})
        await Directory(registry, model="0" * 64, num_blocks=2).refresh(max_age_s=10.0)
        begun.add(tuple(registry.reads[0]))
    assert len(begun) > 1


async def test_what_a_newcomer_left_out_comes_next(monkeypatch):
    """Within its budget it reads the shards that it has never read, before any other again."""
    now = 1000.0
    monkeypatch.setattr(directory_module.time, "monotonic", lambda: now)
    registry = full_registry(625)
    directory = Directory(registry, model="0" * 64, num_blocks=2)
    while len([shard for shards in registry.reads for shard in shards]) < NUM_SHARDS:
        await directory.refresh(max_age_s=15.0)
        now += 15.0
    assert sorted(shard for shards in registry.reads for shard in shards) == list(range(NUM_SHARDS))
    assert all(len(shards) <= 2 for shards in registry.reads)


@pytest.mark.parametrize(
    ("per_shard", "sizes"), [(0, [2, 14]), (10, [2, 14]), (100, [2, 10, 4]), (625, [2] + [1] * 14)]
)
async def test_everything_is_read_in_searches_that_bring_about_a_thousand_records(per_shard, sizes):
    """As a server does that joins: one search for all would take longer than it may, in a large swarm."""
    registry = full_registry(per_shard)
    directory = Directory(registry, model="0" * 64, num_blocks=2)
    await directory.refresh(max_age_s=0.0, everything=True)
    assert [len(shards) for shards in registry.reads] == sizes
    assert sorted(shard for shards in registry.reads for shard in shards) == list(range(NUM_SHARDS))


async def test_a_search_that_fails_loses_nothing_of_those_before_it(monkeypatch):
    """The next try reads the rest."""
    clock = 1000.0
    monkeypatch.setattr(directory_module.time, "monotonic", lambda: clock)
    registry = full_registry(625)
    directory, num_left = Directory(registry, model="0" * 64, num_blocks=2), 5
    lookup_shards = registry.lookup_shards

    async def failing(*args, **kwargs):
        nonlocal num_left
        num_left -= 1
        if num_left == 0:
            raise PeerTimeout("no answer")
        return await lookup_shards(*args, **kwargs)

    registry.lookup_shards = failing
    with pytest.raises(PeerTimeout):
        await directory.refresh(max_age_s=5.0, everything=True)
    assert sum(map(len, registry.reads)) == 5 and len(directory.records) == 5 * 625
    await directory.refresh(max_age_s=5.0, everything=True)
    assert sorted(shard for shards in registry.reads for shard in shards) == list(range(NUM_SHARDS))


@pytest.mark.parametrize(("per_shard", "num_confirmed"), [(1, 10), (625, 1)])
async def test_what_is_seen_is_confirmed_within_the_budget(per_shard, num_confirmed, monkeypatch):
    """A small swarm as often as it is asked; one of 10,000 servers every three minutes."""
    now = 1000.0
    monkeypatch.setattr(directory_module.time, "monotonic", lambda: now)
    registry = full_registry(per_shard)
    directory = Directory(registry, model="0" * 64, num_blocks=2)
    await directory.refresh(max_age_s=0.0, everything=True)
    results = []
    for _ in range(10):
        now += 20.0
        results.append(await directory.confirm(max_age_s=20.0))
        if per_shard > 1:
            assert await directory.confirm(max_age_s=20.0) == results[-1]
    assert results == [True] * num_confirmed + [False] * (10 - num_confirmed)
    assert sum(map(len, registry.reads)) == NUM_SHARDS * (1 + num_confirmed)


async def test_what_has_expired_is_not_used():
    """A record that was valid when it was read is left out once it is not; that it was there is known still."""
    registry = FakeRegistry({0: [record("lives"), record("ends", expires_at=time.time() + 0.05)]})
    directory = Directory(registry, model="0" * 64, num_blocks=2)
    await directory.refresh(max_age_s=10.0)
    while time.time() < registry.shards[0][1].expires_at:
        pass
    assert [it.peer_id for it in directory.records] == ["lives"]
    assert [it.record.peer_id for it in directory.seen] == ["lives", "ends"]


async def test_servers_of_a_large_swarm_are_used_though_their_record_is_old(monkeypatch):
    """It is not read again for minutes; who had not renewed it by then is not expected to have done so since."""
    start = now = time.time()
    monkeypatch.setattr(directory_module.time, "time", lambda: now)
    fresh, old = start + 60.0, start + 20.0
    found = [record("lives", expires_at=fresh), record("late", expires_at=old)]
    found.append(record("joins", expires_at=fresh, state=ServerState.JOINING))
    directory = Directory(FakeRegistry({0: found}), model="0" * 64, num_blocks=2)
    await directory.refresh(max_age_s=10.0)
    assert [it.peer_id for it in directory.online] == ["lives", "late"]
    now = start + REMEMBERED_S
    assert [it.peer_id for it in directory.online] == ["lives"] and not directory.records
    now += 1.0
    assert not directory.online


async def test_nothing_is_read_again_before_it_is_old(monkeypatch):
    """Unless everything is asked for, and then only what is older than that."""
    now = 1000.0
    monkeypatch.setattr(directory_module.time, "monotonic", lambda: now)
    registry = FakeRegistry({3: [record("a"), record("joins", state=ServerState.JOINING)]})
    directory = Directory(registry, model="0" * 64, num_blocks=2)
    for _ in range(3):
        await directory.refresh(max_age_s=10.0)
    assert len(registry.reads) == 2 and directory.version == 2
    assert [it.peer_id for it in directory.online] == ["a"] and len(directory.records) == 2
    now += 10.0
    await directory.refresh(max_age_s=10.0)
    assert len(registry.reads) == 3


async def test_everything_is_read_though_a_part_was_just_now(monkeypatch):
    """A newcomer in a large swarm knows a sample: what is missing there may be in the rest."""
    monkeypatch.setattr(directory_module, "ENOUGH_RECORDS", 1)
    shards = {shard: [record(f"{shard}")] for shard in range(NUM_SHARDS)}
    registry = FakeRegistry(shards)
    directory = Directory(registry, model="0" * 64, num_blocks=2)
    await directory.refresh(max_age_s=10.0)
    assert len(directory.records) < NUM_SHARDS
    num_read = sum(map(len, registry.reads))
    await directory.refresh(max_age_s=10.0, everything=True)
    assert len(directory.records) == NUM_SHARDS
    assert sum(map(len, registry.reads)) == NUM_SHARDS > num_read, "what was read just now is not read again"
    num_reads = len(registry.reads)
    await directory.refresh(max_age_s=10.0, everything=True)
    assert len(registry.reads) == num_reads


async def test_a_failed_search_leaves_what_is_known(monkeypatch):
    """The next one is not held up by it."""
    registry = FakeRegistry({0: [record("a")]})
    directory = Directory(registry, model="0" * 64, num_blocks=2)
    await directory.refresh(max_age_s=0.0)
    registry.error = PeerTimeout("no answer")
    with pytest.raises(PeerTimeout):
        await directory.refresh(max_age_s=0.0)
    assert [it.peer_id for it in directory.records] == ["a"]


async def test_what_was_read_is_kept_when_others_could_not_be(monkeypatch):
    """Nobody begins again from nothing: the next time those are read that are missing."""
    registry = full_registry(1)
    lookup_shards = registry.lookup_shards

    async def half(model, shards, *, num_blocks):
        found = await lookup_shards(model, shards, num_blocks=num_blocks)
        return [records if shard % 2 else None for shard, records in zip(shards, found, strict=True)]

    directory = Directory(registry, model="0" * 64, num_blocks=2)
    await directory.refresh(max_age_s=0.0)
    registry.lookup_shards = half
    now = time.monotonic() + 100.0
    monkeypatch.setattr(directory_module.time, "monotonic", lambda: now)
    with pytest.raises(PeerTimeout, match="8 of 16 shards"):
        await directory.refresh(max_age_s=50.0, everything=True)
    assert len(directory.records) == NUM_SHARDS
    registry.lookup_shards = lookup_shards
    await directory.refresh(max_age_s=50.0, everything=True)
    assert registry.reads[-1] == list(range(0, NUM_SHARDS, 2))
