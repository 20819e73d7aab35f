"""A session's state survives the wire, and nothing that can't be this session's is taken."""

from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import InvalidRequest
from swarm.intake import IntakeState
from swarm.link import LinkState
from swarm.protocol import DType, Encoding, OpenSession, SessionState, StatePart, decode, encode
from swarm.server.blocks.parcel import Layout
from swarm.server.cache_image import CacheImage
from swarm.server.pages import PAGE_SIZE
from swarm.server.session_state import Arrival, SavedSession, Sent, pack

HIDDEN = 4
MAX_LENGTH = 100
LAYOUT = Layout(dtype=torch.float32, kv_shapes=((1, 2, 1),), states=(((3,), torch.float32),))
OPENED = OpenSession(
    session_id=bytes(16),
    push_key=bytes(16),
    model="a" * 64,
    start=0,
    end=2,
    batch_size=2,
    max_length=MAX_LENGTH,
    is_last=False,
)


def saved_session(
    lengths: tuple[int, ...] = (20, 17),
    *,
    starts: tuple[int, ...] | None = None,
    order: tuple[int, ...] | None = None,
    base: tuple[int, ...] | None = None,
    dtype: DType = DType.FLOAT32,
) -> SavedSession:
    """A session whose rows have pages of their own."""
    counts = [-(-length // PAGE_SIZE) for length in lengths]
    firsts = [sum(counts[:row]) for row in range(len(counts))]
    num_states = sum(length > 0 for length in lengths)
    content = bytearray(np.random.default_rng(0).bytes(LAYOUT.num_bytes(sum(counts), num_states)))
    intake = IntakeState(step_id=3, lengths=(), outputs_from=tuple(lengths), order=order, base=base)
    begins = starts or (0,) * len(lengths)
    torch_dtype = {DType.FLOAT32: torch.float32, DType.BFLOAT16: torch.bfloat16}[dtype]
    kept = tuple(
        (torch.randn(end - start, HIDDEN).to(torch_dtype),) if end > start else ()
        for start, end in zip(begins, lengths, strict=True)
    )
    link = LinkState(step_id=3, order=None, base=lengths, outputs_from=lengths, starts=begins, kept=kept)
    return SavedSession(
        intake=replace(intake, lengths=intake.lengths_after(lengths)),
        image=CacheImage(
            lengths=lengths,
            num_pages=sum(counts),
            layouts=tuple(tuple(range(first, first + count)) for first, count in zip(firsts, counts, strict=True)),
            content=content,
        ),
        sent=Sent(link=link, dtype=dtype, encoding=Encoding.RAW),
    )


def arrive(state: SessionState, body: bytes, opened: OpenSession = OPENED, part_bytes: int = 100) -> SavedSession:
    arrival = Arrival(state, opened, LAYOUT, HIDDEN)
    arrival.allocate()
    for at in range(0, len(body), part_bytes):
        arrival.take(StatePart(offset=at), memoryview(body[at : at + part_bytes]))
    assert arrival.is_whole and arrival.num_bytes == len(body)
    return arrival.finish()


lengths = st.tuples(st.integers(0, 60), st.integers(0, 60))


@given(lengths, st.booleans(), st.sampled_from([DType.FLOAT32, DType.BFLOAT16]), st.integers(1, 5000), st.data())
def test_what_was_saved_arrives(
    lengths: tuple[int, int], has_begun: bool, dtype: DType, part_bytes: int, data: st.DataObject
) -> None:
    """Rows of any length, with a step begun or not, cut into parts of any size."""
    begun = {"order": (1, 1), "base": (data.draw(st.integers(0, 60)), 3)} if has_begun else {}
    starts = tuple(data.draw(st.integers(0, length)) for length in lengths)
    saved = saved_session(lengths, starts=starts, dtype=dtype, **begun)
    state, body = pack(saved, OPENED, LAYOUT)
    found = arrive(decode(encode(state)), bytes(body), part_bytes=part_bytes)  # type: ignore[arg-type]
    assert found.intake == saved.intake
    assert bytes(found.image.content) == bytes(saved.image.content)
    assert replace(found.image, content=b"") == replace(saved.image, content=b"")  # type: ignore[arg-type]
    assert found.sent is not None and saved.sent is not None and found.sent.dtype == dtype
    for ours, theirs in zip(saved.sent.link.kept, found.sent.link.kept, strict=True):
        assert len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert replace(found.sent.link, kept=()) == replace(saved.sent.link, kept=())


def test_a_session_that_sent_nothing_arrives() -> None:
    """Before the first output there is no link to go on with."""
    saved = replace(saved_session(), sent=None)
    assert arrive(*pack(saved, OPENED, LAYOUT)).sent is None


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"end": 3}, "state of blocks 0:3"),
        ({"dtype": DType.FLOAT16}, "keys and values in FLOAT16"),
        ({"lengths": (20,)}, "the session has 2 rows"),
        ({"received": (20, 17, 1)}, "the session has 2 rows"),
        ({"outputs_from": (0,)}, "the session has 2 rows"),
        ({"base": (1,)}, "the session has 2 rows"),
        ({"lengths": (101, 17), "received": (101, 17)}, "a row of 101 tokens, session limit 100"),
        ({"received": (20, 18)}, "20, 18"),
        ({"received": (19, 17), "base": (20, 17)}, "received"),
        ({"order": (0, 2), "base": (20, 17)}, "order names row 2 of 2"),
        ({"order": (0, 1)}, "an order without a rollback"),
        ({"num_pages": 5}, "expected"),
        ({"num_pages": 1 << 24}, "expected"),
        ({"cache_bytes": 1 << 48}, "281474976710656 bytes of 4 pages and 2 states, expected"),
        ({"num_pages": 1, "cache_bytes": LAYOUT.num_bytes(1, 2)}, "1 pages for rows of"),
        ({"num_pages": 9, "cache_bytes": LAYOUT.num_bytes(9, 2)}, "9 pages for rows of"),
        ({"sent.ends": (20,)}, "the session has 2 rows"),
        ({"sent.ends": (101, 17)}, "a row of 101 tokens"),
        ({"sent.starts": (21, 0)}, "outputs from"),
        ({"sent.ends": (21, 17)}, "outputs up to"),
        ({"sent.order": (0, 2)}, "order names row 2 of 2"),
    ],
)
def test_a_state_that_cannot_be_this_sessions_is_refused_before_memory_is_taken(
    change: dict[str, object], text: str
) -> None:
    """Whatever disagrees with how the session was opened here, or with itself, is named."""
    state, _ = pack(saved_session(), OPENED, LAYOUT)
    assert state.sent is not None
    ours = {name: value for name, value in change.items() if not name.startswith("sent.")}
    theirs = {name[5:]: value for name, value in change.items() if name.startswith("sent.")}
    state = msgspec.structs.replace(state, **ours, sent=msgspec.structs.replace(state.sent, **theirs))  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=text):
        Arrival(state, OPENED, LAYOUT, HIDDEN)


def test_rows_of_other_adapters_are_not_permuted() -> None:
    """What a row holds was computed with its own adapter."""
    state, _ = pack(saved_session(order=(1, 0), base=(17, 17)), OPENED, LAYOUT)
    opened = msgspec.structs.replace(OPENED, adapters=("d" * 64,), adapter_of=(0, -1))
    with pytest.raises(InvalidRequest, match="adapter"):
        Arrival(state, opened, LAYOUT, HIDDEN)


@pytest.mark.parametrize(("offset", "size"), [(0, 0), (8, 8), (0, 1 << 20), (1 << 40, 8)])
def test_parts_out_of_order_empty_or_too_many_are_refused(offset: int, size: int) -> None:
    """Parts come one behind the other, and end where they should."""
    arrival = Arrival(pack(saved_session(), OPENED, LAYOUT)[0], OPENED, LAYOUT, HIDDEN)
    arrival.allocate()
    with pytest.raises(InvalidRequest, match="bytes of the state at"):
        arrival.take(StatePart(offset=offset), memoryview(bytes(size)))


def test_a_page_that_there_is_not_is_refused() -> None:
    """Page numbers are checked when all have come: nobody else's page can be named."""
    state, body = pack(saved_session(), OPENED, LAYOUT)
    body[4:8] = (4).to_bytes(4, "little")
    with pytest.raises(InvalidRequest, match="page 4 of 4"):
        arrive(state, bytes(body))
