"""Real blocks under the scheduler: sessions that are moved to host memory and back, or share pages, are not changed."""

import pytest
import torch

from swarm.server.blocks import BlockSpan, Chunk
from swarm.server.pages import PAGE_SIZE
from swarm.server.work import Work
from swarm.types import BlockRange
from tests.families.configs import FAMILIES
from tests.families.harness import SavedCheckpoint
from tests.server.engine import Engine

HIDDEN = 32
NUM_PAGES = 12
BLOCKS = BlockRange(0, 4)


def load(name, directory):
    FAMILIES[name].model().save_pretrained(directory)
    return BlockSpan.load(SavedCheckpoint(directory), BLOCKS, num_pages=NUM_PAGES)


@pytest.fixture(scope="module")
def span(tmp_path_factory):
    return load("gemma3_text", tmp_path_factory.mktemp("gemma3"))


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory):
    return load("qwen3_next", tmp_path_factory.mktemp("qwen3_next"))


def hidden(count, seed):
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def undisturbed(span, rows, blocks=BLOCKS):
    """The outputs of one session that has the span for itself."""
    state = span.new_state()
    chunk = Chunk(hidden_states=rows, position=0, pages=range(8), entry=blocks.start, exit=blocks.end, state=state)
    return span.run([chunk])[0]


def send(engine, session, rows, *, step):
    """One step of a session of one row."""
    engine.submit(
        session,
        Work(step_id=step, order=None, base=None, num_tokens=(len(rows),), outputs_from=(0,), hidden_states=rows),
    )


def outputs(engine, session):
    """All outputs of a session of one row."""
    found = engine.told[session].outputs()
    return torch.stack([found[key] for key in sorted(found, key=lambda key: key[2])])


@pytest.mark.parametrize("kind", ["span", "recurrent"])
def test_sessions_that_do_not_fit_together_compute_the_same_by_turns(kind, request):
    """Three sessions of six pages in a cache of twelve, some of whose blocks they skip, moved many times."""
    span = request.getfixturevalue(kind)
    engine = Engine(span=span, token_budget=32, min_turn_tokens=4)
    ranges = [BLOCKS, BlockRange(1, 4), BLOCKS]
    all_rows = [hidden(90, seed) for seed in range(3)]
    sessions = [engine.open(client, blocks=blocks) for client, blocks in zip("aab", ranges, strict=True)]
    for start, end in ((0, 50), *((at, at + 1) for at in range(50, 90))):
        for session, rows in zip(sessions, all_rows, strict=True):
            send(engine, session, rows[start:end], step=start)
        if start % 7 == 0:
            engine.run()
            engine.now += 2.0
    engine.run()
    assert engine.num_swaps > 10
    for session, rows, blocks in zip(sessions, all_rows, ranges, strict=True):
        expected = undisturbed(span, rows, blocks)
        torch.testing.assert_close(outputs(engine, session), expected, atol=2e-5, rtol=1e-4)
        engine.close(session)
    assert engine.allocator.num_used == engine.host.used == 0


def test_pages_that_are_read_and_written_are_the_same_bits(span):
    """A page in host memory is exactly what was in the cache, for the blocks of the session."""
    undisturbed(span, hidden(2 * PAGE_SIZE, 1))
    saved = span.read_pages((0, 1), BlockRange(1, 4))
    span.write_pages((6, 3), BlockRange(1, 4), saved)
    again = span.read_pages((6, 3), BlockRange(1, 4))
    assert len(saved) == 3
    for before, after in zip(saved, again, strict=True):
        assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_a_shared_prefix_gives_the_same_outputs_without_computing_it(span):
    """Two prompts with 40 tokens in common: the outputs of 32 of them are the first one's, bit by bit."""
    engine = Engine(span=span, token_budget=32)
    prefix = hidden(40, 1)
    all_rows = [torch.cat([prefix, hidden(9, seed)]) for seed in (2, 3)]
    sessions = [engine.open(client) for client in "ab"]
    computed = []
    for session, rows in zip(sessions, all_rows, strict=True):
        send(engine, session, rows, step=0)
        computed.append(0)
        while engine.scheduler.num_ready:
            computed[-1] += engine.turn().num_tokens
    assert computed == [49, 49 - 32]
    first, second = (outputs(engine, session) for session in sessions)
    assert torch.equal(first[:32], second[:32])
    for found, rows in ((first, all_rows[0]), (second, all_rows[1])):
        torch.testing.assert_close(found, undisturbed_after(engine, rows), atol=2e-5, rtol=1e-4)


def undisturbed_after(engine, rows):
    """The same on the engine's span, whose pages nobody needs any more."""
    for session in list(engine.told):
        engine.close(session)
    return undisturbed(engine.span, rows)


def test_a_span_whose_pages_depend_on_more_than_their_tokens_shares_none(span, recurrent):
    """Recurrent blocks keep their state elsewhere than in pages."""
    assert span.shares_prefixes and not recurrent.shares_prefixes
