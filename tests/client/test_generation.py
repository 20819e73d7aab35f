"""What a distributed model does besides generating: sessions, what travels, and what it refuses."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, StoppingCriteria, TextIteratorStreamer, TextStreamer
from transformers.generation.streamers import BaseStreamer

from swarm.errors import InvalidRequest, PeerDisconnected, RouteNotFound
from tests.client.conftest import Pair
from tests.client.local_blocks import LocalBlockSession

IDS = torch.tensor([[5, 6, 7, 8, 9]])
GREEDY: dict[str, Any] = {"do_sample": False, "min_new_tokens": 8}
NO_MINIMUM: dict[str, Any] = {"min_new_tokens": None}


def fail_at(pair: Pair, step: int, error: BaseException) -> None:
    """Let the service raise `error` at its `step`-th step."""
    seen = []

    def before_step() -> None:
        seen.append(None)
        if len(seen) == step:
            raise error

    pair.service.before_step = before_step


# -- what travels -----------------------------------------------------------------------------------------------


def test_each_token_travels_once_and_one_output_returns(pair: Pair) -> None:
    """The prompt goes in one step that asks for its last output only; then one token per step."""
    pair.distributed.generate(IDS, max_new_tokens=8, **GREEDY)
    steps = pair.service.steps
    assert [step.num_tokens for step in steps] == [(5,)] + [(1,)] * 7
    assert [step.num_outputs for step in steps] == [(1,)] * 8
    assert [step.positions for step in steps] == [(0,)] + [(5 + index,) for index in range(7)]


def test_beams_share_their_prompt(pair: Pair) -> None:
    """A prompt is run once for all beams and answers, and forked when they part."""
    pair.distributed.generate(IDS, max_new_tokens=8, num_beams=4, num_return_sequences=2)
    first, second, *_ = pair.service.steps
    assert first.num_tokens == (5, 0, 0, 0)
    assert second.order == (0, 0, 0, 0)
    assert second.positions == (5, 5, 5, 5)


def test_padding_does_not_travel(pair: Pair) -> None:
    """Each row sends its real tokens only, at positions of its own."""
    ids = torch.tensor([[0, 0, 0, 5, 6], [5, 6, 7, 8, 9]])
    pair.distributed.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=4, min_new_tokens=4)
    first, second, *_ = pair.service.steps
    assert (first.num_tokens, second.positions) == ((2, 5), (2, 5))


def test_a_resumed_session_sends_only_new_tokens(pair: Pair) -> None:
    """Two calls with one session equal one long call, and no token travels twice."""
    expected = pair.local.generate(IDS, max_new_tokens=12, do_sample=False, min_new_tokens=12)
    with pair.distributed.inference_session(max_length=40) as session:
        half = pair.distributed.generate(IDS, session=session, max_new_tokens=6, do_sample=False, min_new_tokens=6)
        full = pair.distributed.generate(half, session=session, max_new_tokens=6, do_sample=False, min_new_tokens=6)
        assert not session.is_closed
        assert sum(sum(step.num_tokens) for step in pair.service.steps) == 5 + 12 - 1
    assert torch.equal(full, expected)
    assert pair.service.num_open == 0


def test_a_resumed_batch_keeps_its_padding(pair: Pair) -> None:
    """Left-padded rows go on at their own positions."""
    ids = torch.tensor([[0, 0, 0, 5, 6], [5, 6, 7, 8, 9]])
    mask = (ids != 0).long()
    options: dict[str, Any] = {"do_sample": False}
    expected = pair.local.generate(ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, **options)
    with pair.distributed.inference_session(max_length=40, batch_size=2) as session:
        for _ in range(2):
            ids = pair.distributed.generate(
                ids, attention_mask=mask, session=session, max_new_tokens=4, min_new_tokens=4, **options
            )
            mask = torch.cat([mask, torch.ones(2, ids.shape[1] - mask.shape[1], dtype=torch.long)], 1)
    assert torch.equal(ids, expected)


def test_an_assistant_saves_remote_steps(pair: Pair) -> None:
    """With a perfect assistant, several tokens are confirmed in one step; the text stays the same."""
    expected = pair.local.generate(IDS, max_new_tokens=12, do_sample=False, min_new_tokens=12)
    found = pair.distributed.generate(
        IDS, assistant_model=pair.local, max_new_tokens=12, do_sample=False, min_new_tokens=12
    )
    assert torch.equal(found, expected)
    assert len(pair.service.steps) <= 8


def test_rejected_guesses_are_rolled_back(pair: Pair) -> None:
    """Steps after a wrong guess continue at a smaller position."""
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6, 7]])
    expected = pair.local.generate(ids, max_new_tokens=10, do_sample=False, min_new_tokens=10)
    found = pair.distributed.generate(
        ids, prompt_lookup_num_tokens=3, max_new_tokens=10, do_sample=False, min_new_tokens=10
    )
    assert torch.equal(found, expected)
    steps = pair.service.steps
    ends = [step.positions[0] + step.num_tokens[0] for step in steps]
    assert any(step.positions[0] < end for step, end in zip(steps[1:], ends, strict=False))


def test_streamer_and_stop_strings(pair: Pair, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A streamer prints the words as they come, and a stop string ends the text, as with transformers."""
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": True, "tokenizer": tokenizer}
    torch.manual_seed(0)
    words = tokenizer.decode(pair.local.generate(IDS, **options)[0, 5:]).split()
    torch.manual_seed(0)
    expected = pair.local.generate(IDS, stop_strings=[words[4]], **options)
    torch.manual_seed(0)
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    found = pair.distributed.generate(IDS, stop_strings=[words[4]], streamer=streamer, **options)
    assert torch.equal(found, expected)
    assert found.shape[1] < 17
    assert capsys.readouterr().out.split() == tokenizer.decode(found[0, 5:]).split()


# -- sessions end -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [PeerDisconnected("gone"), RouteNotFound("none"), KeyboardInterrupt(), ValueError("bug")], ids=repr
)
def test_the_session_is_closed_on_every_exception(pair: Pair, error: BaseException) -> None:
    """Also on Ctrl-C and on errors of other people's code."""
    fail_at(pair, 3, error)
    with pytest.raises(type(error)):
        pair.distributed.generate(IDS, max_new_tokens=8)
    assert len(pair.service.sessions) == 1
    assert pair.service.num_open == 0


def test_the_session_is_closed_when_a_consumer_goes_away(pair: Pair) -> None:
    """A streamer whose generator was closed raises GeneratorExit."""

    class Gone(BaseStreamer):
        def put(self, value: torch.Tensor) -> None:
            if value.numel() == 1:
                raise GeneratorExit

        def end(self) -> None: ...

    with pytest.raises(GeneratorExit):
        pair.distributed.generate(IDS, max_new_tokens=8, streamer=Gone())
    assert pair.service.num_open == 0


@pytest.mark.parametrize("step", [1, 4])
def test_the_session_is_closed_when_a_processor_or_criterion_fails(pair: Pair, step: int) -> None:
    """Code of the caller runs inside of the loop: in the first step, which is the prompt's, and in a later one."""

    def failing(*_: Any, **__: Any) -> Any:
        if len(pair.service.steps) % step == 0:
            raise ZeroDivisionError
        return torch.zeros(1, dtype=torch.bool)

    class Processor(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            failing()
            return scores

    class Criterion(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            stop: torch.Tensor = failing()
            return stop

    for options in ({"logits_processor": [Processor()]}, {"stopping_criteria": [Criterion()]}):
        pair.service.sessions = []
        with pytest.raises(ZeroDivisionError):
            pair.distributed.generate(IDS, max_new_tokens=8, **GREEDY, **options)
        assert [session.is_closed for session in pair.service.sessions] == [True]


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"prompt_lookup_num_tokens": 2}, {"num_return_sequences": 2, "do_sample": True}],
    ids=lambda options: next(iter(options)),
)
def test_the_session_is_closed_in_every_way_of_decoding(pair: Pair, options: dict[str, Any]) -> None:
    """Ctrl-C in beam search, in assisted decoding and with several answers."""
    fail_at(pair, 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        pair.distributed.generate(torch.tensor([[5, 6, 5, 6, 5]]), max_new_tokens=8, min_new_tokens=8, **options)
    assert [session.is_closed for session in pair.service.sessions] == [True]


def test_the_session_is_closed_when_the_text_stops_early(pair: Pair, tokenizer: Any) -> None:
    """At a stop string and at the end marker, long before the longest length."""
    first = int(pair.local.generate(IDS, max_new_tokens=1, do_sample=False)[0, -1])
    word = tokenizer.decode([first])
    for options in ({"stop_strings": [word], "tokenizer": tokenizer}, {"eos_token_id": first}):
        pair.service.sessions = []
        found = pair.distributed.generate(IDS, max_new_tokens=9, do_sample=False, **options)
        assert found.shape == (1, 6)
        assert [session.is_closed for session in pair.service.sessions] == [True]


def test_the_session_is_closed_when_an_iterator_is_abandoned(pair: Pair, tokenizer: Any) -> None:
    """The caller reads a text as it comes, from a thread, and goes away after two pieces."""

    class Pieces(TextIteratorStreamer):
        is_abandoned = False

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if self.is_abandoned:
                raise GeneratorExit
            super().on_finalized_text(text, stream_end)  # type: ignore[no-untyped-call]

    turn, streamer = threading.Semaphore(0), Pieces(tokenizer, skip_prompt=True)  # type: ignore[no-untyped-call]
    pair.service.before_step = turn.acquire  # type: ignore[assignment]
    ends: list[BaseException] = []

    def generate() -> None:
        try:
            pair.distributed.generate(IDS, max_new_tokens=20, min_new_tokens=20, streamer=streamer, do_sample=False)
        except GeneratorExit as error:
            ends.append(error)

    def pieces() -> Iterator[str]:
        try:
            for piece in streamer:
                yield piece
                turn.release()
        finally:
            streamer.is_abandoned = True
            turn.release(20)

    thread = threading.Thread(target=generate)
    thread.start()
    turn.release(3)  # a word is handed on when the next one begins
    text = pieces()
    next(text), next(text)
    text.close()
    thread.join(30)
    assert len(ends) == 1 and not thread.is_alive()
    assert len(pair.service.steps) < 10
    assert pair.service.num_open == 0


def test_the_session_is_closed_when_it_can_not_be_used(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails between the opening of the session and the first step."""

    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(type(pair.distributed), "_prefill", broken)
    with pytest.raises(ZeroDivisionError):
        pair.distributed.generate(IDS, max_new_tokens=8)
    assert [session.is_closed for session in pair.service.sessions] == [True]


def test_a_session_that_does_not_close_hides_no_exception(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller learns what went wrong first; what closing met is logged."""

    def unreachable(_: Any) -> None:
        raise PeerDisconnected("gone")

    monkeypatch.setattr(LocalBlockSession, "close", unreachable)
    fail_at(pair, 3, ValueError("bug"))
    with pytest.raises(ValueError, match="bug"):
        pair.distributed.generate(IDS, max_new_tokens=8)


def test_a_call_without_a_session_closes_its_own(pair: Pair) -> None:
    """One pass of the model, good or failed."""
    pair.distributed(IDS)
    fail_at(pair, 1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        pair.distributed(IDS)
    assert [session.is_closed for session in pair.service.sessions] == [True, True]


@pytest.mark.parametrize("rejected", [True, False])
def test_a_session_of_the_caller_survives_a_processor(pair: Pair, rejected: bool) -> None:
    """A failure in the caller's own code, or a refused call, leaves the session open and good for the next call."""
    expected = pair.local.generate(IDS, max_new_tokens=8, **GREEDY)

    class Processor(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            raise ZeroDivisionError

    with pair.distributed.inference_session(max_length=40) as session:
        if rejected:
            with pytest.raises(InvalidRequest):
                pair.distributed.generate(IDS, session=session, max_new_tokens=100, **GREEDY)
        else:
            with pytest.raises(ZeroDivisionError):
                pair.distributed.generate(
                    IDS, session=session, max_new_tokens=8, logits_processor=[Processor()], **GREEDY
                )
        assert not session.is_closed
        found = pair.distributed.generate(IDS, session=session, max_new_tokens=8, **GREEDY)
    assert torch.equal(found, expected)
    assert pair.service.num_open == 0


@pytest.mark.parametrize("step", [1, 2, 4])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_session_of_the_caller_survives_an_exception(pair: Pair, step: int, num_beams: int) -> None:
    """The same call can simply be made again, with the same result, and doesn't send again what the session holds."""
    options: dict[str, Any] = {"max_new_tokens": 8, "num_beams": num_beams, **GREEDY}
    expected = pair.local.generate(IDS, **options)
    fail_at(pair, step, KeyboardInterrupt())
    with pair.distributed.inference_session(max_length=40, batch_size=num_beams) as session:
        with pytest.raises(KeyboardInterrupt):
            pair.distributed.generate(IDS, session=session, **options)
        assert not session.is_closed
        done = len(pair.service.steps)
        assert torch.equal(pair.distributed.generate(IDS, session=session, **options), expected)
        prompt = 1 if step > 1 and num_beams == 1 else 5
        assert pair.service.steps[done].num_tokens == (prompt,) * num_beams
    assert pair.service.num_open == 0


def test_a_padded_session_of_the_caller_survives_an_exception(pair: Pair) -> None:
    """Rows of different lengths go back to their own ends."""
    ids = torch.tensor([[0, 0, 0, 5, 6], [5, 6, 7, 8, 9]])
    options: dict[str, Any] = {"attention_mask": (ids != 0).long(), "max_new_tokens": 6, "min_new_tokens": 6}
    expected = pair.local.generate(ids, do_sample=False, **options)
    fail_at(pair, 4, KeyboardInterrupt())
    with pair.distributed.inference_session(max_length=40, batch_size=2) as session:
        with pytest.raises(KeyboardInterrupt):
            pair.distributed.generate(ids, session=session, do_sample=False, **options)
        assert torch.equal(pair.distributed.generate(ids, session=session, do_sample=False, **options), expected)


def test_a_call_may_begin_again_in_the_middle(pair: Pair) -> None:
    """A session that holds a longer text goes back to the inputs, also where they are given as embeddings."""
    with pair.distributed.inference_session(max_length=40) as session:
        whole = pair.distributed.generate(IDS, session=session, max_new_tokens=8, **GREEDY)
        again = pair.distributed.generate(whole[:, :8], session=session, max_new_tokens=5, **(GREEDY | NO_MINIMUM))
        assert torch.equal(again, whole)
        assert pair.service.steps[8].positions == (7,)
        embeddings = pair.local.get_input_embeddings()(IDS)
        options: dict[str, Any] = {"max_new_tokens": 8, "session": session, **GREEDY}
        found = pair.distributed.generate(inputs_embeds=embeddings, **options)
        assert torch.equal(found, whole[:, 5:])


def test_a_returned_cache_is_closed(pair: Pair) -> None:
    """`return_dict_in_generate` gives logits and scores; to continue, the caller opens the session."""
    result = pair.distributed.generate(IDS, max_new_tokens=4, return_dict_in_generate=True)
    assert pair.service.num_open == 0
    with pytest.raises(InvalidRequest, match="inference_session"):
        pair.distributed.generate(result.sequences, past_key_values=result.past_key_values, max_new_tokens=4)


def test_route_of_the_last_call_is_remembered(pair: Pair) -> None:
    """With names of the peers, although the session is closed."""
    pair.distributed.generate(IDS, max_new_tokens=2)
    [(name, hop)] = pair.distributed.last_route
    assert (name, str(hop.blocks)) == ("12D3local", "0:3")


def test_closing_the_model_closes_the_service(pair: Pair) -> None:
    """Also as a context manager."""
    with pair.distributed:
        assert not pair.service.is_closed
    assert pair.service.is_closed


# -- what is refused --------------------------------------------------------------------------------------------


def test_lengths_beyond_the_model_are_refused(pair: Pair) -> None:
    """Before anything is sent, with both numbers."""
    limit = pair.local.config.max_position_embeddings
    with pytest.raises(InvalidRequest, match=rf"{limit + 6} is more than the {limit} positions"):
        pair.distributed.generate(IDS, max_new_tokens=limit + 1)
    with pytest.raises(InvalidRequest, match=rf"{limit + 1} is more than the {limit}"):
        pair.distributed.inference_session(max_length=limit + 1)
    assert pair.service.sessions == []


def test_foreign_and_misfit_caches_are_refused(pair: Pair) -> None:
    """Local caches, two sessions at once, another batch, and caches that only local models have."""
    model = pair.distributed
    with pytest.raises(InvalidRequest, match="DynamicCache"):
        model.generate(IDS, past_key_values=DynamicCache())
    with pytest.raises(InvalidRequest, match="DynamicCache"):
        model(IDS, past_key_values=DynamicCache())
    with model.inference_session(max_length=6) as session, pytest.raises(InvalidRequest, match="7 tokens .* of 6"):
        model.generate(IDS, session=session, max_new_tokens=3)
    with model.inference_session(max_length=20, batch_size=2) as session:
        with pytest.raises(InvalidRequest, match="1 rows, the session 2"):
            model.generate(IDS, session=session, max_new_tokens=2)
        with pytest.raises(InvalidRequest, match="not both"):
            model.generate(IDS, session=session, past_key_values=session)
    with pytest.raises(InvalidRequest, match="static"):
        model.generate(IDS, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(InvalidRequest, match="use_cache"):
        model(IDS, use_cache=True)


def test_misfit_calls_are_refused(pair: Pair) -> None:
    """Masks with more dimensions, positional arguments whose meaning differs by model, empty sessions."""
    with pytest.raises(InvalidRequest, match=r"attention_mask must be \[batch, tokens\]"):
        pair.distributed(IDS, attention_mask=torch.ones(1, 1, 5, 5))
    with pytest.raises(InvalidRequest, match="keyword"):
        pair.distributed(IDS, torch.ones_like(IDS))
    with pytest.raises(InvalidRequest, match="batch_size 0"):
        pair.distributed.inference_session(max_length=4, batch_size=0)


def test_saving_is_refused(pair: Pair, tmp_path: Path) -> None:
    """What would be written has no blocks; nothing is."""
    with pytest.raises(InvalidRequest, match="holds no blocks"):
        pair.distributed.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_generate_without_a_session_still_works(pair: Pair) -> None:
    """use_cache=False sends everything each time and closes each session."""
    expected = pair.local.generate(IDS, max_new_tokens=4, **(GREEDY | {"min_new_tokens": 4}))
    found = pair.distributed.generate(IDS, max_new_tokens=4, use_cache=False, **(GREEDY | {"min_new_tokens": 4}))
    assert torch.equal(found, expected)
    assert [step.num_tokens for step in pair.service.steps] == [(5,), (6,), (7,), (8,)]
    assert pair.service.num_open == 0


def test_generate_from_embeddings(pair: Pair) -> None:
    """A prompt may be given as embeddings."""
    embeddings = pair.local.get_input_embeddings()(IDS)
    expected = pair.local.generate(inputs_embeds=embeddings, max_new_tokens=5, do_sample=False)
    found = pair.distributed.generate(inputs_embeds=embeddings, max_new_tokens=5, do_sample=False)
    assert torch.equal(found, expected)
