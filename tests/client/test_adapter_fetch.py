"""An adapter by its digest alone: who is asked in which order, and what is made of bad answers."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from swarm.adapters.delta import BlockDelta, LinearDelta
from swarm.adapters.format import encode_shard, shard_info
from swarm.adapters.layout import ModelLayout
from swarm.adapters.notes import AdapterNote
from swarm.adapters.transfer import send_parts
from swarm.client.adapter_fetch import fetch_adapter
from swarm.errors import AdapterError, PeerUnreachable
from swarm.protocol import AdapterRequest
from swarm.transport import EndOfStream
from swarm.types import BlockRange
from tests.adapters import HIDDEN, MadeAdapter, make_adapter, shape

NUM_BLOCKS = 8
LAYOUT = ModelLayout(blocks_path="model.layers", blocks=tuple(shape() for _ in range(NUM_BLOCKS)))
ADAPTER = make_adapter(3, blocks=range(1, 7))


class Server:
    """Has some shards of an adapter, and remembers what it was asked for."""

    def __init__(self, peer_id: str, blocks: str, adapter: MadeAdapter | None, *, says_so: bool = False, **spoiled):
        self.peer_id, self.adapter, self.spoiled = peer_id, adapter, spoiled
        self.span = BlockRange.parse(blocks)
        notes = (AdapterNote.of(adapter.digest, 2, on_device=False),) if says_so and adapter is not None else ()
        self.record = SimpleNamespace(peer_id=peer_id, blocks=self.span, adapters=notes)
        self.requests: list[AdapterRequest] = []
        self.parts: list = []

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    async def send(self, message, body=b"", *, timeout_s=None):
        if not isinstance(message, AdapterRequest):
            self.parts.append((message, bytes(body)))
            return
        self.requests.append(message)
        if self.adapter is None:
            raise AdapterError("is not here")
        shards = {block: data for block, data in self.adapter.shards.items() if block in self.span}
        manifest = self.spoiled.get("manifest", self.adapter.manifest.encode())
        await send_parts(self, message, manifest, shards | self.spoiled.get("shards", {}))

    async def receive(self, timeout_s=None):
        if not self.parts:
            raise EndOfStream
        await self.spoiled.get("before_part", nothing)()
        return self.parts.pop(0)


async def nothing():
    """Is done before a part is sent."""


async def fetch(*servers: Server, adapter: MadeAdapter = ADAPTER, **options):
    """What comes of asking these."""
    by_id = {server.peer_id: server for server in servers}

    async def open_stream(peer_id):
        if by_id[peer_id].spoiled.get("is_gone"):
            raise PeerUnreachable("gone", peer_id=peer_id)
        return by_id[peer_id]

    return await fetch_adapter(adapter.digest, [it.record for it in servers], open_stream, LAYOUT, **options)


async def test_each_server_gives_what_its_blocks_have():
    """Those who announce it first; nobody is asked for what has come, nor at all when nothing is missing."""
    silent, first, second = Server("a", "0:8", ADAPTER), Server("b", "0:4", ADAPTER, says_so=True), None
    second = Server("c", "3:8", ADAPTER, says_so=True)
    found = await fetch(silent, first, second)
    assert found.digest == ADAPTER.digest and found.shards == ADAPTER.shards and found.embeddings_PH is None
    assert [(it.with_manifest, it.blocks) for it in first.requests] == [(True, (0, 1, 2, 3))]
    assert [(it.with_manifest, it.blocks) for it in second.requests] == [(False, (4, 5, 6))] and not silent.requests


async def test_servers_without_it_out_of_reach_or_with_other_bytes_are_passed_over():
    """What came whole and right before is kept."""
    wrong = {2: bytes(len(ADAPTER.shards[2]))}
    servers = [
        Server("a", "0:8", None),
        Server("b", "0:8", ADAPTER, is_gone=True),
        Server("c", "0:8", ADAPTER, manifest=make_adapter(4).manifest.encode()),
        Server("d", "0:8", ADAPTER, shards=wrong),
        Server("e", "0:8", ADAPTER),
    ]
    found = await fetch(*servers)
    assert found.shards == ADAPTER.shards
    assert [(it.with_manifest, it.blocks) for it in servers[4].requests] == [(False, (2, 3, 4, 5, 6))]


async def test_what_nobody_has_is_said():
    """All of it, or some blocks."""
    with pytest.raises(AdapterError, match=r"no server has adapter sha256:.{12}…; 1 were asked"):
        await fetch(Server("a", "0:8", None))
    with pytest.raises(AdapterError, match="no server has what adapter .* does to blocks 4:7"):
        await fetch(Server("a", "0:4", ADAPTER), Server("b", "4:8", None))


class Clock:
    """Time that passes with every part."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    async def wait(self) -> None:
        self.now += 9.0


async def test_a_server_that_sends_hardly_anything_is_left_for_another():
    """After ten seconds: nobody is silent for that long, and what came is kept."""
    clock = Clock()
    servers = [Server("a", "0:8", ADAPTER, before_part=clock.wait), Server("b", "0:8", ADAPTER)]
    found = await fetch(*servers, clock=clock)
    assert found.shards == ADAPTER.shards
    assert clock.now == 18.0 and len(servers[0].parts) == 5
    assert [(it.with_manifest, it.blocks) for it in servers[1].requests] == [(False, (2, 3, 4, 5, 6))]


async def test_all_of_it_has_a_deadline():
    """However many servers there are to ask."""
    hanging = Server("a", "0:8", ADAPTER, before_part=asyncio.Event().wait)
    with pytest.raises(AdapterError, match=r"did not come within 0.05 s: 3 of 6 blocks are here"):
        await fetch(Server("b", "0:4", ADAPTER, says_so=True), hanging, timeout_s=0.05)


def nan_adapter() -> MadeAdapter:
    delta = BlockDelta(linears={"q": LinearDelta(bias_O=torch.full((HIDDEN,), float("nan")))})
    data = encode_shard(delta)
    manifest = replace_shards(ADAPTER, (shard_info(0, delta, data),))
    return MadeAdapter(manifest, {0: data})


def replace_shards(adapter: MadeAdapter, shards):
    return type(adapter.manifest)(method="LORA", base="x", num_blocks=NUM_BLOCKS, hidden_size=HIDDEN, shards=shards)


BAD = {
    "not a number": (nan_adapter(), {}, "not finite"),
    "another model": (make_adapter(1, num_blocks=12), {}, r"\(12, 4\); this model has \(8, 4\)"),
    "too large": (ADAPTER, {"max_bytes": ADAPTER.manifest.num_bytes - 1}, r"has \d+ bytes, limit \d+"),
}


@pytest.mark.parametrize(("adapter", "options", "reason"), BAD.values(), ids=BAD)
async def test_an_adapter_that_is_wrong_is_so_whoever_has_it(adapter, options, reason):
    """The first server that proves it is the last one to be asked."""
    servers = [Server(name, "0:8", adapter) for name in "ab"]
    with pytest.raises(AdapterError, match=reason):
        await fetch(*servers, adapter=adapter, **options)
    assert len(servers[0].requests) == 1 and not servers[1].requests


async def test_embeddings_are_what_no_server_has():
    """They never leave the client that has the files."""
    manifest = type(ADAPTER.manifest)(
        method="PROMPT", base="x", num_blocks=NUM_BLOCKS, hidden_size=HIDDEN, num_virtual=2, shards=(),
        embeddings="0" * 64,
    )  # fmt: skip
    adapter = replace(ADAPTER, manifest=manifest, shards={})
    with pytest.raises(AdapterError, match="embeddings, which servers don't keep"):
        await fetch(Server("a", "0:8", adapter), adapter=adapter)
