"""Sessions over three servers of two blocks each, in the fake swarm; links count up from the first."""

from collections import Counter

from swarm.session import Session
from swarm.types import BlockRange, Hop
from tests.swarm.fake_chain import Caller, FakeChain

FIRST, MIDDLE, LAST = 0, 1, 2
"""Links of the hops of `three_hops`, until one is replaced: links count up."""


def three_hops(blocks: BlockRange) -> list[Hop]:
    """A server for every two blocks."""
    starts = range(blocks.start, blocks.end, 2)
    return [Hop(peer_id=f"peer{start}", blocks=BlockRange(start, start + 2)) for start in starts]


def caller(*, num_rows: int = 1, push: bool = True, seed: int = 0, **chain_options: object) -> Caller:
    """A caller of a session over three hops of two blocks each."""
    session = Session(BlockRange(0, 6), batch_size=num_rows, max_length=1000, push=push)
    return Caller(FakeChain(session, seed=seed, find_route=three_hops, **chain_options))  # type: ignore[arg-type]


def ready_to_decode(**options: object) -> Caller:
    """A caller that has sent a prompt of 20 tokens and decoded two; counters at zero."""
    user = caller(**options)  # type: ignore[arg-type]
    user.prompt(20)
    user.decode()
    user.decode()
    user.chain.settle()
    user.chain.tokens.clear()
    user.chain.messages.clear()
    return user


def sums(counter: Counter[tuple[int, int]], end: int) -> tuple[int, int]:
    """What went out of an end, and what came in."""
    sent = sum(count for (source, _), count in counter.items() if source == end)
    return sent, sum(count for (_, target), count in counter.items() if target == end)
