"""A session's cache goes on at another server with the same bits, wherever it was: pages, beams, recurrent states."""

import asyncio

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import InvalidRequest, PeerBusy
from swarm.server.blocks import BlockSpan
from swarm.server.cache_image import CacheImage, put_image, take_image
from swarm.server.work import Work
from swarm.types import BlockRange
from tests.families.configs import FAMILIES
from tests.families.harness import SavedCheckpoint, split_model
from tests.families.test_blocks import skip_if_newer
from tests.server.engine import Engine, User
from tests.server.test_executor import Listener, running

PLAIN = ("llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3", "llama4_text")
STATEFUL = ("qwen3_next", "mamba2", "jamba", "lfm2", "kimi_linear", "falcon_h1")
PAGES = 24


def move(user: User, other: Engine) -> None:
    """Let a user's session go on at another engine."""
    user.engine.check()
    session = other.open(user.session.client, len(user.session.rows), user.blocks, user.session.adapters)
    put_image(session, take_image(user.session, user.engine.span), other.span, other.host)
    other.told[session] = user.engine.told[user.session]
    user.close()
    user.engine, user.session = other, session
    other.check()


@settings(max_examples=60, deadline=None)
@given(st.data(), st.booleans())
def test_sessions_that_move_between_full_caches_get_what_they_asked_for(data: st.DataObject, stateful: bool) -> None:
    """Pages, swapped pages, beams and states: sessions that others push out of the cache move like any other."""
    engines = [Engine(data.draw(st.integers(8, 16)), stateful=stateful, min_turn_tokens=4) for _ in range(2)]
    users = [User(engines[number % 2], f"client{number}", rows=1 + number % 2) for number in range(4)]
    for _ in range(data.draw(st.integers(3, 12))):
        user = data.draw(st.sampled_from(users))
        if user.step and data.draw(st.booleans()):
            move(user, engines[engines.index(user.engine) - 1])
        order = data.draw(st.sampled_from([None, (1, 0), (0, 0)])) if len(user.rows) == 2 else None
        pieces = [[data.draw(st.integers(1, 99))] * data.draw(st.sampled_from([1, 1, 3, 17])) for _ in user.rows]
        user.send(
            pieces, order=order, base=[min(map(len, user.rows))] * len(user.rows) if order and not stateful else None
        )
        if user.num_tokens > 100:
            user.close()
            users[users.index(user)] = User(user.engine, user.session.client, rows=len(user.rows))
            continue
        for engine in engines:
            engine.run()
    for user in users:
        user.check()
        user.close()
    for engine in engines:
        assert not engine.allocator.num_used and not engine.host.used


def test_a_session_that_has_begun_or_finds_no_memory_takes_no_image():
    """What is refused leaves everything as it was."""
    source, target = Engine(), Engine(host_bytes=510)
    user = User(source, "a", rows=1)
    user.send([[1.0] * 20])
    with pytest.raises(PeerBusy, match="1 pieces of work"):
        take_image(user.session, source.span)
    source.run()
    image = take_image(user.session, source.span)
    with pytest.raises(PeerBusy, match="256 bytes of host memory needed, 255 free"):
        put_image(target.open(), image, target.span, target.host)
    with pytest.raises(InvalidRequest, match="holds 20 tokens"):
        put_image(user.session, image, source.span, source.host)
    source.check()
    target.check()


def test_an_empty_session_is_an_empty_image():
    """There is nothing to be moved, nor to be brought back later."""
    source, target = Engine(), Engine()
    image = take_image(source.open(rows=2), source.span)
    assert image == CacheImage(lengths=(0, 0), num_pages=0, layouts=((), ()), content=bytearray())
    session = target.open(rows=2)
    put_image(session, image, target.span, target.host)
    assert session.swapped is None


def work_of(rows: list[torch.Tensor], step: int, *, order=None, base=None) -> Work:
    return Work(
        step_id=step,
        order=order,
        base=base,
        num_tokens=tuple(map(len, rows)),
        outputs_from=(0,) * len(rows),
        hidden_states=torch.cat(rows),
    )


@pytest.mark.parametrize("name", [*PLAIN, *STATEFUL])
@torch.no_grad()
def test_a_family_goes_on_with_the_same_bits_at_another_server(name, tmp_path):
    """Keys, values and recurrent states of beams, in a server whose blocks begin elsewhere: no output differs."""
    skip_if_newer(name, FAMILIES[name].model_type)
    model = FAMILIES[name].model()
    model.save_pretrained(tmp_path)
    num_blocks, checkpoint = len(split_model(model)[0]), SavedCheckpoint(tmp_path)
    own = BlockRange(1, num_blocks)
    source = BlockSpan.load(checkpoint, own, num_pages=PAGES)
    target = BlockSpan.load(checkpoint, BlockRange(0, num_blocks), num_pages=PAGES)
    assert source.stateful == (name in STATEFUL)
    asyncio.run(goes_on_with_the_same_bits(source, target, own))


async def goes_on_with_the_same_bits(source: BlockSpan, target: BlockSpan, own: BlockRange) -> None:
    generator = torch.Generator().manual_seed(1)

    def rows(*counts: int) -> list[torch.Tensor]:
        return [torch.randn(count, source.hidden_size, generator=generator) for count in counts]

    async with running(source) as old, running(target) as new:
        charged: list[str] = []
        for executor in (old, new):
            executor._scheduler.used = lambda client, seconds: charged.append(client)
        listeners = [Listener(), Listener()]
        session = old.open(own, 2, client="a", listener=listeners[0])
        old.submit(session, work_of(rows(37, 9), 0))
        old.submit(session, work_of(rows(1, 1), 1, order=(0, 0), base=(37, 37)))
        old.submit(session, work_of(rows(1, 1), 2))
        await listeners[0].done(50)
        assert await old.layout(own) == await new.layout(own)
        image = await old.take_image(session)
        assert image.lengths == (39, 39) and image.num_pages < 6, "beams share pages"
        heir = new.open(own, 2, client="a", listener=listeners[1])
        await new.put_image(heir, image)
        assert charged == ["a", "a"], "its client pays for the device's time at both"
        for step, order in ((3, (1, 0)), (4, (1, 1)), (5, None)):
            more = rows(1, 1) if step < 5 else rows(20, 3)
            for executor, it in ((old, session), (new, heir)):
                executor.submit(it, work_of(more, step, order=order, base=tuple(36 + step for _ in more)))
        await listeners[0].done(50 + 27)
        await listeners[1].done(27)
        for row in range(2):
            outputs = [listener.outputs(row) for listener in listeners]
            before, after = outputs[0][-len(outputs[1]) :], outputs[1]
            assert torch.equal(before[:2], after[:2]) and len(after) == (22, 5)[row]
            torch.testing.assert_close(before, after, atol=1e-5, rtol=1e-5)  # prompts are cut as batches allow
        old.close(session)
        new.close(heir)
        assert await old.pages_in_use() == await new.pages_in_use() == 0
