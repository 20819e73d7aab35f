"""Mutations of known inputs, as fuzzers make them: for hypothesis, which shrinks what it finds, and for plain speed."""

from collections.abc import Sequence
from random import Random

from hypothesis import strategies as st

INTERESTING = (b"\0", b"\xff", b"\x7f", b"\x80", bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xdd\xff\xff\xff\xff")
MAX_BYTES = 1 << 16


def mutations_of(corpus: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Inputs of the corpus, changed a few times."""

    @st.composite
    def draw(pick: st.DrawFn) -> bytes:
        data = pick(st.sampled_from(corpus))
        seeds = pick(st.lists(st.integers(0, (1 << 32) - 1), min_size=1, max_size=4))
        for seed in seeds:
            data = mutate(data, corpus, Random(seed))
        return data

    return draw()


def mutate(data: bytes, corpus: Sequence[bytes], random: Random) -> bytes:
    """One change: a byte, a number, a cut, a repetition, an insertion, or the tail of another input."""
    changed = bytearray(data)
    at = random.randrange(len(changed) + 1)
    kind = random.randrange(7)
    if kind == 0 and at < len(changed):
        changed[at] ^= 1 << random.randrange(8)
    elif kind == 1:
        changed[at : at + 1] = bytes([random.randrange(256)])
    elif kind == 2:
        value = random.choice(INTERESTING)
        changed[at : at + len(value)] = value
    elif kind == 3:
        del changed[at : at + random.randrange(1, 9)]
    elif kind == 4:
        piece = changed[at : at + random.randrange(1, 33)]
        changed[at:at] = piece * random.randrange(1, 5)
    elif kind == 5:
        changed[at:at] = random.randbytes(random.randrange(1, 9))
    else:
        other = random.choice(corpus)
        changed[at:] = other[random.randrange(len(other) + 1) :]
    return bytes(changed[:MAX_BYTES])
