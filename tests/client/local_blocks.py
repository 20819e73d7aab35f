"""A block service in this process: transformers' own layers, one cache per row, with the rules of a remote session.

It honours positions, rollback, row order and wanted outputs, refuses what a server would refuse, and notes every step.
"""

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from swarm.checkpoint.partial import find_blocks
from swarm.errors import InvalidRequest
from swarm.types import BlockRange, Hop


@dataclass(frozen=True, slots=True, kw_only=True)
class SentStep:
    """What one step carried."""

    positions: tuple[int, ...]
    num_tokens: tuple[int, ...]
    num_outputs: tuple[int, ...]
    order: tuple[int, ...] | None


class LocalBlockService:
    """Runs the blocks of `model`, a complete transformers model."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        path, blocks = find_blocks(model)
        self.num_blocks, self.hidden_size = len(blocks), model.config.get_text_config().hidden_size
        self.sessions: list[LocalBlockSession] = []
        self.is_closed = False
        self.before_step: Callable[[], None] | None = None
        """Called at the start of every step; may raise."""
        decoder = model.get_submodule(path.rpartition(".")[0])
        self.run_row = _row_runner(decoder if decoder is not model else model, blocks)

    def open_session(self, *, batch_size: int, max_length: int, adapters: Any = None) -> "LocalBlockSession":
        session = LocalBlockSession(self, batch_size, max_length)
        session.adapters = adapters
        self.sessions.append(session)
        return session

    def open_training(self, blocks: BlockRange) -> "LocalTraining":
        return LocalTraining(self, blocks)

    def close(self) -> None:
        self.is_closed = True

    @property
    def steps(self) -> list[SentStep]:
        """Steps of all sessions."""
        return [step for session in self.sessions for step in session.steps]

    @property
    def num_open(self) -> int:
        """Sessions that were not closed."""
        return sum(not session.is_closed for session in self.sessions)


class LocalBlockSession:
    """One session of a LocalBlockService."""

    def __init__(self, service: LocalBlockService, batch_size: int, max_length: int):
        self.service, self.batch_size, self.max_length = service, batch_size, max_length
        self.rows = [self._new_row() for _ in range(batch_size)]
        self.lengths = [0] * batch_size
        self.steps: list[SentStep] = []
        self.is_closed = False
        self.adapters: Any = None
        """As given; nothing is done with them here."""

    @property
    def route(self) -> tuple[Hop, ...]:
        return (Hop(peer_id="12D3local", blocks=BlockRange(0, self.service.num_blocks)),) if self.steps else ()

    @torch.no_grad()
    def step(
        self,
        hidden_states: torch.Tensor,
        *,
        positions: Sequence[int],
        num_tokens: Sequence[int],
        num_outputs: Sequence[int] | None = None,
        order: Sequence[int] | None = None,
    ) -> torch.Tensor:
        if self.is_closed:
            raise InvalidRequest("the session is closed")
        outputs = list(num_tokens if num_outputs is None else num_outputs)
        if self.service.before_step is not None:
            self.service.before_step()
        if not {len(positions), len(num_tokens), len(outputs)} == {self.batch_size}:
            raise InvalidRequest(f"{self.batch_size} rows, the step speaks of {len(positions)}")
        if hidden_states.shape != (sum(num_tokens), self.service.hidden_size) or not sum(outputs):
            raise InvalidRequest(f"{tuple(hidden_states.shape)} for {num_tokens} tokens")
        if order is not None:
            self.rows = [copy.deepcopy(self.rows[old]) for old in order]
            self.lengths = [self.lengths[old] for old in order]
        self.steps.append(
            SentStep(
                positions=tuple(positions),
                num_tokens=tuple(num_tokens),
                num_outputs=tuple(outputs),
                order=None if order is None else tuple(order),
            )
        )
        results = []
        pieces = hidden_states.split(list(num_tokens))
        for row, (position, piece, wanted) in enumerate(zip(positions, pieces, outputs, strict=True)):
            self._roll_back(row, position)
            if not len(piece):
                continue
            if position + len(piece) > self.max_length:
                raise InvalidRequest(f"row {row}: {position} + {len(piece)} tokens, limit {self.max_length}")
            output = self.service.run_row(piece, self.rows[row], position)
            self.lengths[row] += len(piece)
            results.append(output[len(piece) - wanted :])
        return torch.cat(results)

    def close(self) -> None:
        self.is_closed = True

    def _new_row(self) -> DynamicCache:
        config = self.service.model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or [])
        is_stateful = not kinds <= {"full_attention", "sliding_attention", "chunked_attention"}
        return DynamicCache(config=config) if is_stateful else DynamicCache()

    def _roll_back(self, row: int, position: int) -> None:
        length = self.lengths[row]
        if position > length:
            raise InvalidRequest(f"row {row} holds {length} tokens, can't continue at {position}")
        self.lengths[row] = position
        if position == 0 and length:
            self.rows[row] = self._new_row()
        elif position < length:
            self.rows[row].crop(position - length)


class LocalTraining:
    """One training run of a LocalBlockService, through all of its blocks."""

    def __init__(self, service: LocalBlockService, blocks: BlockRange):
        assert blocks == BlockRange(0, service.num_blocks)
        self.service = service
        self.num_calls = 0
        self.route: tuple[Hop, ...] = ()
        self.dropped: list[Any] = []
        self.forgotten: list[int] = []

    def forth(
        self, hidden_states: torch.Tensor, lengths: Sequence[int], *, parameters: Any, wants_gradients: bool
    ) -> Any:
        assert parameters is None
        self.num_calls += 1
        with torch.set_grad_enabled(wants_gradients):
            leaf = hidden_states.detach().requires_grad_(wants_gradients)
            rows = [self.service.run_row(row, DynamicCache(), 0) for row in leaf.split(list(lengths))]
            outputs = torch.cat(rows)
        return (leaf, outputs), outputs.detach()

    def back(
        self, call: Any, gradients: torch.Tensor, *, wants_inputs: bool = True
    ) -> tuple[torch.Tensor | None, dict[int, torch.Tensor]]:
        leaf, outputs = call
        return torch.autograd.grad(outputs, leaf, gradients, retain_graph=True)[0], {}

    def drop(self, call: Any) -> None:
        self.dropped.append(call)

    def forget(self, version: int) -> None:
        self.forgotten.append(version)


def _row_runner(decoder: Any, blocks: Any) -> Callable[[torch.Tensor, DynamicCache, int], torch.Tensor]:
    """A function that runs hidden states [n, H] of one row through the layers, with whatever its model hands them.

    The decoder's own forward runs on dummy tokens; hooks put the hidden states in before the first layer and take them
    out behind the last one. One thread at a time.
    """
    decoder = decoder.eval()
    lock = threading.Lock()
    state: dict[str, torch.Tensor] = {}
    cache_name = "cache_params" if "cache_params" in signature(decoder.forward).parameters else "past_key_values"

    def put_in(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if "in" not in state:
            return args, kwargs
        if args:
            return (state["in"], *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": state["in"]}

    def take_out(_: Any, __: Any, output: Any) -> None:
        state["out"] = output[0] if isinstance(output, tuple) else output

    blocks[0].register_forward_pre_hook(put_in, with_kwargs=True)
    blocks[-1].register_forward_hook(take_out)

    def run_row(hidden_states: torch.Tensor, cache: DynamicCache, position: int) -> torch.Tensor:
        count = len(hidden_states)
        with lock:
            state["in"] = hidden_states[None]
            try:
                decoder(
                    input_ids=torch.zeros(1, count, dtype=torch.long),
                    attention_mask=torch.ones(1, position + count, dtype=torch.long),
                    **{cache_name: cache},
                    use_cache=True,
                )
                return state["out"][0]
            finally:
                state.clear()

    return run_row
