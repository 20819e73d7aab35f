"""One prompt being answered: a session of the swarm, `generate` in a thread, pieces of text to whoever listens.

    run (a thread) ─► model.generate ─┬─ logits ─► Sampler
                                      └─ tokens ─► _Listener ─► Choice: text, stop strings, end ─Piece─► emit
    cancel (any thread) ─► closes the session: the step under way fails, the servers free its pages

Knows nothing of HTTP, of other requests, or of who is asking.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from swarm.api.models import ServedModel
from swarm.api.sampling import Logprob, Sampler, Sampling
from swarm.api.text import Detokenizer, StopStrings
from swarm.client.cache import BlockService, RemoteCache
from swarm.client.remote_blocks import open_session
from swarm.client.timings import HopTiming
from swarm.errors import SwarmError

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to generate."""

    model: ServedModel
    prompt: tuple[int, ...]
    rows: int
    """Answers to this prompt."""
    max_tokens: int
    """Most tokens of each."""
    sampling: Sampling
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """News of one answer."""

    row: int
    text: str = ""
    tokens: tuple[Logprob, ...] = ()
    """Those that this text was made of, where log probabilities are wanted."""
    finish_reason: FinishReason | None = None
    """Set in its last piece."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteHop:
    """A server that an answer went through."""

    name: str
    peer_id: str
    blocks: str
    ms_per_token: float | None
    """Its share of a token's time, the way to it included; None where nothing was measured."""


class Cancelled(SwarmError):
    """Nobody waits for this any more."""


class Generation:
    """One job; `run` is called once.

    Args:
        job: what to generate.
        service: the remote blocks, as the client of the swarm who asks.
        emit: gets every piece, in the thread that runs.
    """

    def __init__(self, job: Job, service: BlockService, emit: Callable[[Piece], None]):
        self.job = job
        self.choices = [Choice(job, row) for row in range(job.rows)]
        self.route: tuple[RouteHop, ...] = ()
        """Known at the end."""
        self._service, self._emit = service, emit
        self._cache: RemoteCache | None = None
        self._is_cancelled = False

    @property
    def num_tokens(self) -> int:
        """Generated so far, in all rows."""
        return sum(choice.num_tokens for choice in self.choices)

    def run(self) -> None:
        """Generate to the end.

        Raises:
            Cancelled: `cancel` was called.
            SwarmError: the swarm failed.
        """
        job = self.job
        max_length, adapters = len(job.prompt) + job.max_tokens, job.model.adapters(job.rows)
        columns = adapters.num_columns if adapters is not None else 0
        session = open_session(self._service, job.rows, max_length + columns, adapters)
        with RemoteCache(session, max_length=max_length, copies=job.rows, adapters=adapters) as cache:
            self._cache = cache
            self.raise_if_cancelled()  # for one that came before there was anything to close
            try:
                self._generate(cache)
                self._end_rest()
            except SwarmError:
                self.raise_if_cancelled()
                raise
            finally:
                self.route = named_route(cache, self._service)

    def cancel(self) -> None:
        """Stop as soon as possible; waits until the servers were told. Harmless at the end, and from any thread."""
        self._is_cancelled = True
        if self._cache is not None:
            self._cache.close()

    def raise_if_cancelled(self) -> None:
        """Raise Cancelled when nobody waits any more."""
        if self._is_cancelled:
            raise Cancelled("nobody waits for this answer any more")

    def _generate(self, cache: RemoteCache) -> None:
        job = self.job
        ids = torch.tensor([job.prompt]).expand(job.rows, -1)
        sampler = None
        if not job.sampling.is_plain:
            sampler = Sampler(job.sampling, prompt_tokens=len(job.prompt), rows=job.rows)
        job.model.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            session=cache,
            max_new_tokens=job.max_tokens,
            logits_processor=LogitsProcessorList([sampler] if sampler else []),
            stopping_criteria=StoppingCriteriaList([_Listener(self, sampler)]),
        )

    def _end_rest(self) -> None:
        """Answers that a model's own settings have ended, such as a limit of time."""
        for choice in self.choices:
            if not choice.is_over:
                self._emit(choice.end("length"))

    def heard(self, tokens: Sequence[int], logprobs: Sequence[Logprob]) -> list[bool]:
        """A token of each row has come; says which rows are over."""
        self.raise_if_cancelled()
        for row, (choice, token) in enumerate(zip(self.choices, tokens, strict=True)):
            if not choice.is_over and (piece := choice.push(token, logprobs[row] if logprobs else None)):
                self._emit(piece)
        return [choice.is_over for choice in self.choices]


class Choice:
    """One answer: what its tokens say, and whether it is over.

    Args:
        job: the job that it is part of.
        row: its number in the job.
    """

    def __init__(self, job: Job, row: int):
        self.num_tokens = 0
        self.is_over = False
        self._job, self._row = job, row
        self._words = Detokenizer(job.model.prompts.decode)
        self._stops = StopStrings(job.stop)
        self._untold: list[Logprob] = []

    def push(self, token: int, logprob: Logprob | None) -> Piece | None:
        """The next token; returns what can be told now."""
        self.num_tokens += 1
        is_end = token in self._job.model.end_tokens and not self._job.ignore_eos
        if logprob is not None and not is_end:
            self._untold.append(logprob)
        text, is_stopped = self._stops.push("" if is_end else self._words.push(token))
        if is_stopped:
            return self._finish(text, "stop")
        if is_end or self.num_tokens == self._job.max_tokens:
            return self.end("stop" if is_end else "length", text)
        return self._piece(text) if text else None

    def end(self, reason: FinishReason, text: str = "") -> Piece:
        """The last piece: `text`, and what was kept back so far."""
        last, is_stopped = self._stops.push(self._words.flush())
        rest = "" if is_stopped else self._stops.flush()
        return self._finish(text + last + rest, "stop" if is_stopped else reason)

    def _finish(self, text: str, reason: FinishReason) -> Piece:
        self.is_over = True
        return self._piece(text, reason)

    def _piece(self, text: str, finish_reason: FinishReason | None = None) -> Piece:
        tokens, self._untold = tuple(self._untold), []
        return Piece(row=self._row, text=text, tokens=tokens, finish_reason=finish_reason)


class _Listener(StoppingCriteria):
    """Hands each step's tokens to the generation, and its answer to transformers."""

    def __init__(self, generation: Generation, sampler: Sampler | None):
        self._generation, self._sampler = generation, sampler

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        logprobs = self._sampler.logprobs if self._sampler is not None else []
        return torch.tensor(self._generation.heard(input_ids[:, -1].tolist(), logprobs))


def named_route(cache: RemoteCache, service: BlockService) -> tuple[RouteHop, ...]:
    """The servers of a session with their names, and what each of them took of a token's time."""
    peers = getattr(service, "peers", None)
    timings: Sequence[HopTiming] = getattr(cache.session, "timings", ())
    return tuple(
        RouteHop(
            name=peers.name_of(hop.peer_id) if peers else hop.peer_id,
            peer_id=hop.peer_id,
            blocks=str(hop.blocks),
            ms_per_token=_ms_per_token(timings, hop.peer_id, cache.rows),
        )
        for hop in cache.route
    )


def _ms_per_token(timings: Sequence[HopTiming], peer_id: str, rows: int) -> float | None:
    """Of the steps that decode, a token per row at most."""
    steps = [timing.round_trip_s for timing in timings if timing.peer_id == peer_id and timing.num_tokens <= rows]
    return round(1e3 * sum(steps) / len(steps), 1) if steps else None
