"""Adapters on their way: from the client, from other servers, in pieces; bad ones are refused to their own sessions."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import torch

from swarm.adapters.delta import BlockDelta, LinearDelta
from swarm.adapters.format import encode_shard, shard_info
from swarm.adapters.notes import MAX_NOTES
from swarm.adapters.transfer import send_parts
from swarm.errors import AdapterError, InvalidRequest, PeerBusy, PeerMisbehaved, PeerTimeout
from swarm.protocol import ADAPTER_SERVICE, AdapterLoading, AdapterOffer, AdapterPart, AdapterRequest
from swarm.server import adapter_desk, adapter_intake, adapter_loader
from swarm.server.adapter_intake import Base
from swarm.transport import EndOfStream
from swarm.types import BlockRange
from tests.adapters import MadeAdapter, make_adapter, shape
from tests.server.conftest import chain_of
from tests.server.fakes import HIDDEN, Chain, eventually, failure_of, run_blocks, tokens

pytestmark = pytest.mark.asyncio(loop_scope="module")

BLOCKS = BlockRange(0, 8)
BASE = Base(blocks=BLOCKS, shapes={block: shape() for block in BLOCKS}, num_blocks=8, hidden_size=HIDDEN, name="fake")
ADAPTER, OTHER = make_adapter(3, blocks=range(8)), make_adapter(7, blocks=(1, 4))


@asynccontextmanager
async def serving(nodes, num_servers: int = 1, *, limit_bytes: int = 1 << 20, **options) -> AsyncIterator[Chain]:
    """Servers that take adapters."""
    async with chain_of(nodes, num_servers, **options) as chain:
        for transport, handler in zip(chain.transports, chain.handlers, strict=True):
            handler.take_adapters(BASE, limit_bytes)
            transport.serve(ADAPTER_SERVICE, handler.adapter)
        yield chain


@pytest.fixture(autouse=True)
def says_nothing_of_progress(monkeypatch):
    """But for the test of that."""
    monkeypatch.setattr(adapter_desk, "TELL_PERIOD_S", 60.0)


def loader(chain, index=0):
    return chain.handlers[index].adapters.loader


async def open_with(chain, *adapters, index=0, **fields):
    """A session with a row for each of these."""
    found = {adapter.digest: None for adapter in adapters if adapter is not None}
    digests = list(found)
    of_row = tuple(-1 if adapter is None else digests.index(adapter.digest) for adapter in adapters)
    return await chain.open(
        index, is_last=True, rows=len(adapters), adapters=tuple(digests), adapter_of=of_row, **fields
    )


async def upload(chain, adapter, request, *, index=0, shards=None, manifest=None):
    """Send what was asked for; returns the stream, which the server ends."""
    stream = await chain.client.open(chain.peer_id(index), ADAPTER_SERVICE, timeout_s=10)
    await stream.send(AdapterOffer(digest=adapter.digest))
    await send_parts(
        stream, request, manifest or adapter.manifest.encode(), adapter.shards if shards is None else shards
    )
    return stream


async def finish(stream):
    """Wait for the server's word on an upload."""
    with pytest.raises(EndOfStream):
        await stream.receive(10)


async def load(chain, adapter, index=0, **fields):
    """A session with an adapter that the client has sent."""
    hop = await open_with(chain, adapter, index=index, **fields)
    await finish(await upload(chain, adapter, await hop.expect(AdapterRequest), index=index))
    return hop


def expected(chain, rows, values, index=0):
    return [run_blocks(row, chain.executors[index].constant + value) for row, value in zip(rows, values, strict=True)]


async def check_step(chain, hop, rows, values, index=0):
    """A first step gives what these adapters make of it."""
    await hop.step(0, rows, positions=[0] * len(rows))
    found = await hop.results(0, [len(row) for row in rows])
    for output, right in zip(found, expected(chain, rows, values, index), strict=True):
        assert torch.equal(output, right)


async def test_a_client_sends_what_nobody_has(nodes):
    """The server asks for the manifest and its own blocks; rows then use their own adapters, or none."""
    async with serving(nodes) as chain:
        hop = await open_with(chain, ADAPTER, None, OTHER)
        requests = {request.digest: request for request in [await hop.expect(AdapterRequest) for _ in range(2)]}
        assert requests[ADAPTER.digest].with_manifest and requests[ADAPTER.digest].blocks == tuple(range(8))
        for adapter in (ADAPTER, OTHER):
            await finish(await upload(chain, adapter, requests[adapter.digest]))
        await check_step(chain, hop, [tokens(3), tokens(3), tokens(2, seed=1)], [8 * 3, 0, 2 * 7])
        again = await open_with(chain, OTHER)
        await check_step(chain, again, [tokens(4)], [2 * 7])
        total = sum(adapter.manifest.num_bytes + len(adapter.manifest.encode()) for adapter in (ADAPTER, OTHER))
        assert loader(chain).num_uploaded_bytes == loader(chain).store.used_bytes == total


async def test_another_server_is_asked_before_the_client(nodes):
    """By hash, long after the client has gone that brought the adapter."""
    async with serving(nodes, 2) as chain:
        hop = await load(chain, ADAPTER)
        await hop.stream.close()
        other = await open_with(chain, ADAPTER, index=1, holders=("nobody", chain.peer_id(1), chain.peer_id(0)))
        await check_step(chain, other, [tokens(5)], [8 * 3], index=1)
        assert loader(chain, 1).num_fetched_bytes and not loader(chain, 1).num_uploaded_bytes


async def test_others_go_on_while_an_adapter_is_awaited(nodes, monkeypatch):
    """Steps of its session are taken and wait; the client is told how far it is; a session beside it runs."""
    monkeypatch.setattr(adapter_desk, "TELL_PERIOD_S", 0.02)
    async with serving(nodes) as chain:
        hop, beside = await open_with(chain, ADAPTER), await chain.open(0, is_last=True)
        await hop.step(0, [tokens(3)], positions=[0])
        request = await hop.expect(AdapterRequest)
        await check_step(chain, beside, [tokens(4)], [0])
        first = AdapterRequest(digest=request.digest, with_manifest=True, blocks=(0,))
        stream = await upload(chain, ADAPTER, first)
        while (told := await hop.expect(AdapterLoading)).num_bytes < len(ADAPTER.shards[0]):
            pass
        assert told.total_bytes == ADAPTER.manifest.num_bytes and not chain.executors[0].sessions[0].rows[0].numel()
        rest = AdapterRequest(digest=request.digest, with_manifest=False, blocks=tuple(range(1, 8)))
        await send_parts(stream, rest, b"", ADAPTER.shards)
        while isinstance((await hop.stream.receive(10))[0], AdapterLoading):
            pass


async def test_after_a_broken_upload_only_the_rest_is_asked_for(nodes):
    """Whole shards stay; the manifest is not sent twice, either."""
    async with serving(nodes) as chain:
        hop = await open_with(chain, ADAPTER)
        request = await hop.expect(AdapterRequest)
        stream = await upload(
            chain, ADAPTER, AdapterRequest(digest=request.digest, with_manifest=True, blocks=(0, 1, 2))
        )
        half = AdapterPart(block=3, offset=0, num_bytes=len(ADAPTER.shards[3]))
        await stream.send(half, ADAPTER.shards[3][:10])
        await stream.abort(PeerTimeout("the way is gone"))
        request = await hop.expect(AdapterRequest)
        assert not request.with_manifest and request.blocks == (3, 4, 5, 6, 7)
        await finish(await upload(chain, ADAPTER, request))
        await check_step(chain, hop, [tokens(2)], [8 * 3])


async def test_sessions_that_wait_for_one_adapter_share_its_transfer(nodes):
    """It is asked for once; when the client that was asked leaves, another one is."""
    async with serving(nodes) as chain:
        first, second = await open_with(chain, OTHER), await open_with(chain, OTHER)
        await first.expect(AdapterRequest)
        await first.stream.close()
        request = await second.expect(AdapterRequest)
        await finish(await upload(chain, OTHER, request))
        await check_step(chain, second, [tokens(2)], [2 * 7])


def named(path: str = "q", **linear) -> MadeAdapter:
    """An adapter of one block with this in it, whatever it is, under its right name."""
    good = make_adapter(1, blocks=(0,))
    delta = BlockDelta(linears={path: LinearDelta(**linear)})
    data = encode_shard(delta)
    manifest = type(good.manifest)(
        method="LORA", base="x", num_blocks=8, hidden_size=HIDDEN, shards=(shard_info(0, delta, data),)
    )
    return MadeAdapter(manifest, {0: data})


def spoiled(value: float) -> MadeAdapter:
    """An adapter with a number in it that is none."""
    return named(bias_O=torch.full((HIDDEN,), value))


BAD = {
    "not a number": (spoiled(float("nan")), "not finite"),
    "infinite": (spoiled(float("inf")), "not finite"),
    "another model": (make_adapter(1, num_blocks=12), r"\(12, 4\); fake has \(8, 4\)"),
    "another width": (make_adapter(1, hidden=8), r"\(8, 8\); fake has \(8, 4\)"),
    "wrong shape": (named(bias_O=torch.zeros(HIDDEN + 1)), r"q.bias has shape \(5,\), expected \(4,\)"),
    "wrong target": (named("k", bias_O=torch.zeros(HIDDEN)), "has no linear 'k' there"),
    "absurd rank": (
        named(a_rI=torch.zeros(5000, HIDDEN), b_Or=torch.zeros(HIDDEN, 5000)),
        "malformed adapter manifest",
    ),
}


@pytest.mark.parametrize(("adapter", "reason"), BAD.values(), ids=BAD)
async def test_a_bad_adapter_is_refused_to_its_own_session_only(nodes, adapter, reason):
    """Whoever waits for it is told why; a session beside it notices nothing, and nothing of it stays pinned."""
    async with serving(nodes) as chain:
        beside = await load(chain, OTHER)
        hop = await open_with(chain, adapter)
        stream = await upload(chain, adapter, await hop.expect(AdapterRequest))
        for ended in (stream, hop.stream):
            with pytest.raises(AdapterError, match=reason):
                raise await failure_of(ended)
        await check_step(chain, beside, [tokens(3)], [2 * 7])
        store = loader(chain).store
        assert store.used_bytes == sum(held.num_bytes for held in store)
        assert all(not held.reserved_bytes for held in store)


async def test_bytes_of_another_hash_are_the_senders_fault(nodes):
    """The upload is refused, and the client asked again; the right bytes are taken then."""
    async with serving(nodes) as chain:
        hop = await open_with(chain, OTHER)
        request = await hop.expect(AdapterRequest)
        false = {block: bytes(len(data)) for block, data in OTHER.shards.items()}
        stream = await upload(chain, OTHER, request, shards=false)
        with pytest.raises(AdapterError, match="has hash"):
            raise await failure_of(stream)
        request = await hop.expect(AdapterRequest)
        await finish(await upload(chain, OTHER, request))
        await check_step(chain, hop, [tokens(3)], [2 * 7])


async def test_a_server_that_sends_other_bytes_is_left_for_the_client(nodes):
    """What another server has under a name proves nothing until its hash is right."""
    async with serving(nodes, 2) as chain:
        await load(chain, OTHER)
        held = loader(chain).store.find(OTHER.digest)
        held.shards[1] = type(held.shards[1])(data=bytes(len(OTHER.shards[1])), delta=held.shards[1].delta)
        hop = await open_with(chain, OTHER, index=1, holders=(chain.peer_id(0),))
        request = await hop.expect(AdapterRequest)
        assert not request.with_manifest and 1 in request.blocks
        await finish(await upload(chain, OTHER, request, index=1))
        await check_step(chain, hop, [tokens(3)], [2 * 7], index=1)


@pytest.mark.parametrize(
    "part",
    [
        AdapterPart(block=5, offset=0, num_bytes=100),
        AdapterPart(block=1, offset=0, num_bytes=1 << 40),
        AdapterPart(block=1, offset=7, num_bytes=len(OTHER.shards[1])),
    ],
    ids=["not asked for", "absurdly large", "not at its beginning"],
)
async def test_parts_that_nobody_expects_are_refused_before_memory_is_taken(nodes, part):
    """Sizes are the manifest's; anything else ends the upload, not the session."""
    async with serving(nodes) as chain:
        hop = await open_with(chain, OTHER)
        request = await hop.expect(AdapterRequest)
        stream = await upload(chain, OTHER, AdapterRequest(digest=request.digest, with_manifest=True, blocks=()))
        await stream.send(part, bytes(7))
        assert isinstance(await failure_of(stream), PeerMisbehaved)
        assert (await hop.expect(AdapterRequest)).blocks == (1, 4)


async def test_a_client_beyond_its_quota_is_told_so(nodes):
    """With both numbers; a session that needs nothing new is served, and room comes back when a session ends."""
    room = 2 * (ADAPTER.manifest.num_bytes + len(ADAPTER.manifest.encode())) + 100
    async with serving(nodes, limit_bytes=room) as chain:
        first = await load(chain, ADAPTER)
        second = await open_with(chain, OTHER)
        stream = await upload(chain, OTHER, await second.expect(AdapterRequest))
        for ended in (stream, second.stream):
            with pytest.raises(PeerBusy, match=r"adapters of \d+ bytes here, need \d+ more"):
                raise await failure_of(ended)
        await check_step(chain, first, [tokens(2)], [8 * 3])
        await first.stream.close()
        await eventually(lambda: not chain.executors[0].sessions)
        third = await load(chain, OTHER)
        await check_step(chain, third, [tokens(2)], [2 * 7])
        assert list(chain.executors[0].adapters) == [OTHER.digest]


async def test_a_client_that_sends_nothing_is_given_up(nodes, monkeypatch):
    """After it was asked a few times."""
    for module in (adapter_intake, adapter_loader):
        monkeypatch.setattr(module, "PART_TIMEOUT_S", 0.02)
    async with serving(nodes) as chain:
        hop = await open_with(chain, OTHER)
        with pytest.raises(PeerTimeout, match="asked 3 times"):
            raise await failure_of(hop.stream)


async def test_what_nobody_asked_for_is_not_taken(nodes):
    """Neither an adapter of no session, nor one that another client was asked for; and what is not here is said."""
    async with serving(nodes) as chain:
        request = AdapterRequest(digest=OTHER.digest, with_manifest=True, blocks=(1,))
        stream = await upload(chain, OTHER, request)
        assert isinstance(await failure_of(stream), InvalidRequest)
        stream = await chain.client.open(chain.peer_id(0), ADAPTER_SERVICE, timeout_s=10)
        await stream.send(request)
        with pytest.raises(AdapterError, match="is not here"):
            raise await failure_of(stream)


async def test_rows_and_adapters_must_belong_to_each_other(nodes):
    """An adapter of no row, a row with an adapter that isn't named, one named twice."""
    async with serving(nodes) as chain:
        for adapters, of_row in (
            ((OTHER.digest,), (-1,)),
            ((), (0,)),
            ((OTHER.digest,), ()),
            ((OTHER.digest,) * 2, (0, 1)),
        ):
            with pytest.raises(InvalidRequest, match="adapters"):
                await chain.open(0, rows=max(1, len(of_row)), adapters=adapters, adapter_of=of_row)


async def test_rows_may_not_change_places_across_adapters(nodes):
    """What a row holds was computed with its own adapter: beams stay among rows of the same one."""
    async with serving(nodes) as chain:
        hop = await load(chain, OTHER)
        hop = await open_with(chain, OTHER, OTHER, None)
        await hop.step(0, [tokens(2)] * 3, positions=[0] * 3)
        await hop.results(0, [2] * 3)
        await hop.step(1, [tokens(1)] * 3, positions=[2] * 3, order=[1, 1, 2])
        await hop.results(1, [3] * 3)
        await hop.step(2, [tokens(1)] * 3, positions=[3] * 3, order=[0, 2, 2])
        with pytest.raises(InvalidRequest, match="row 1 with adapter 0 can't continue row 2 with adapter -1"):
            raise await failure_of(hop.stream)


async def test_a_server_without_memory_for_adapters_says_so(nodes):
    """It is no fault of the request: another server may take it."""
    async with chain_of(nodes, 1) as chain:
        with pytest.raises(PeerBusy, match="takes no adapters"):
            await open_with(chain, OTHER)


async def test_what_is_announced_is_whole_bounded_and_the_devices_own_first(nodes):
    """Then the most recently used; a half of an adapter is none."""
    many = [make_adapter(number, blocks=(0,)) for number in range(1, MAX_NOTES + 3)]
    async with serving(nodes) as chain:
        desk, executor = chain.handlers[0].adapters, chain.executors[0]
        for adapter in many:
            await desk.keep(adapter.manifest, adapter.shards)
        desk.store.add(OTHER.manifest, OTHER.manifest.encode(), client="somebody")
        for adapter in many[1:]:
            executor.forget_adapter(adapter.digest)
        notes = desk.notes()
        assert len(notes) == MAX_NOTES and not any(note.is_about(OTHER.digest) for note in notes)
        assert notes[0].is_about(many[0].digest) and [note.on_device for note in notes] == [True] + [False] * 31
        assert notes[1].is_about(many[-1].digest) and notes[0].max_rank == 8


async def test_the_work_of_taking_an_adapter_in_is_charged_to_who_brought_it(nodes):
    """To nobody where the server itself did."""
    async with serving(nodes) as chain:
        await chain.handlers[0].adapters.keep(OTHER.manifest, OTHER.shards)
        assert chain.executors[0].charged == {}
        await load(chain, ADAPTER)
        assert chain.executors[0].charged[chain.client.node.peer_id] > 0
