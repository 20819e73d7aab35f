"""Parts of adapters: what was sent comes whole, and nothing that was not expected takes memory."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.adapters import transfer
from swarm.adapters.transfer import Assembly, send_parts
from swarm.errors import PeerMisbehaved
from swarm.protocol import AdapterPart, AdapterRequest


class Wire:
    """A stream that keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[AdapterPart, bytes]] = []

    async def send(self, message, body=b"", *, timeout_s=None) -> None:
        self.sent.append((message, bytes(body)))


@given(
    manifest=st.binary(min_size=1, max_size=50),
    shards=st.dictionaries(st.integers(0, 9), st.binary(min_size=1, max_size=60), max_size=5),
    blocks=st.lists(st.integers(0, 9), unique=True),
    with_manifest=st.booleans(),
    part_bytes=st.integers(1, 40),
)
def test_what_is_asked_for_comes_whole(manifest, shards, blocks, with_manifest, part_bytes):
    """The manifest first, then the blocks that are there, in the order of the request, however the parts are cut."""
    wire, sizes = Wire(), []
    request = AdapterRequest(digest="d" * 64, with_manifest=with_manifest, blocks=tuple(blocks))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "PART_BYTES", part_bytes)
        asyncio.run(send_parts(wire, request, manifest, shards, on_sent=sizes.append))
    assembly, found = Assembly(with_manifest=with_manifest), []
    for block in blocks:
        if block in shards:
            assembly.expect(block, len(shards[block]))
    for part, body in wire.sent:
        assert len(body) <= part_bytes
        if (whole := assembly.take(part, body)) is not None:
            found.append((whole[0], bytes(whole[1])))
    expected = [(None, manifest)] * with_manifest + [(block, shards[block]) for block in blocks if block in shards]
    assert found == expected and assembly.is_done
    assert sum(sizes) == assembly.num_bytes == sum(len(data) for _, data in expected)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([(3, 0, 10, 10)], "expected None"),
        ([(1, 0, 11, 11)], "expected 10"),
        ([(1, 5, 10, 5)], "expected 10"),
        ([(1, 0, 10, 4), (1, 5, 10, 5)], "at 4/10"),
        ([(1, 0, 10, 4), (2, 0, 10, 4)], "expected 1 at 4"),
        ([(1, 0, 10, 0)], "0 bytes"),
        ([(1, 0, 10, 4), (1, 4, 10, 7)], "7 bytes at 4"),
        ([(None, 0, 1 << 30, 10)], "None of 1073741824 bytes"),
        ([(1, 0, 10, 10), (1, 0, 10, 10)], "expected None"),
    ],
)
def test_anything_else_is_refused(parts, reason):
    """Unknown blocks, other sizes, gaps, another shard in the middle of one, nothing, too much, and twice."""
    assembly = Assembly(with_manifest=True)
    assembly.expect(1, 10)
    assembly.expect(2, 10)

    def send() -> None:
        for block, offset, num_bytes, count in parts:
            assembly.take(AdapterPart(block=block, offset=offset, num_bytes=num_bytes), bytes(count))

    with pytest.raises(PeerMisbehaved, match=reason):
        send()
