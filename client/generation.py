"""What a distributed model adds to a transformers model: sessions, and their end on every way out of `generate`.

    generate ─► transformers' own loop ─► forward ─Pass─► forward of the model's own class ─► RemoteBlocks
       └─ opens a session, closes it: at return, on any exception, on Ctrl-C
    trainers that want hidden states call the inner model ─► drive ─Pass─┘

Everything about decoding (sampling, beams, penalties, assistants, streamers, stopping) is transformers' own. Knows
nothing of networks. Hooks used, in transformers 5.17 to 5.23: generate, forward, _prepare_cache_for_generation.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Self

import torch
from transformers import Cache, GenerationMixin, PreTrainedModel

from swarm.adapters.layout import ModelLayout
from swarm.checkpoint.layout import model_layout
from swarm.checkpoint.source import Checkpoint
from swarm.client.adapter_methods import AdapterMethods
from swarm.client.adapters import Choice
from swarm.client.cache import BlockService, RemoteCache
from swarm.client.remote_blocks import BlockSlice, Pass, model_pass, open_session
from swarm.client.remote_layers import RemoteLayers
from swarm.client.row_adapters import RowAdapters
from swarm.client.trained import Trained, trained_now
from swarm.client.virtual import with_virtual
from swarm.errors import InvalidRequest, SwarmError
from swarm.types import BlockRange

logger = logging.getLogger(__name__)

_LOCAL_CACHES = ("static", "offloaded", "offloaded_static", "quantized", "hybrid", "sliding_window")
_CACHE_NAMES = ("past_key_values", "cache_params")
_INPUT_NAMES = ("input_ids", "inputs_embeds")

if TYPE_CHECKING:
    _Model = PreTrainedModel
else:
    _Model = GenerationMixin


_opened: ContextVar[list[RemoteCache] | None] = ContextVar("swarm_client_opened", default=None)
"""Sessions that the running `generate` of this thread has opened."""
_chosen: ContextVar[Choice] = ContextVar("swarm_client_adapters", default=None)
"""Adapters that its caller named."""


class DistributedModel(AdapterMethods, _Model):  # type: ignore[misc,no-untyped-call]
    """Mixed into the class of a transformers causal model whose layer list is a RemoteBlocks."""

    block_service: BlockService
    checkpoint: Checkpoint
    is_gradient_checkpointing = is_activation_checkpointing = False
    last_route: tuple[tuple[str, Any], ...] = ()
    """(name, hop) of each server that the last `generate` went through, in order."""

    @property
    def training_route(self) -> tuple[tuple[str, Any], ...]:
        """(name, hop) of each server that training goes through now, in order; none before its first use."""
        return self._named(self.blocks.route)

    @property
    def blocks(self) -> BlockSlice:
        """The remote blocks: `model.blocks[4:12](hidden_states)` runs some of them, with gradients where wanted."""
        return BlockSlice(self.remote_layers.remote, BlockRange(0, self.block_service.num_blocks))

    @property
    def remote_layers(self) -> RemoteLayers:
        """What stands where the model has its list of layers."""
        return next(module for module in self.modules() if isinstance(module, RemoteLayers))

    @property
    def layout(self) -> ModelLayout:
        """Names and shapes of what adapters may change."""
        found: ModelLayout | None = self.__dict__.get("swarm_layout")
        if found is None:
            found = self.__dict__["swarm_layout"] = model_layout(self.checkpoint.config())
        return found

    def trained(self) -> Trained | None:
        """What PEFT trains in the remote blocks, as far as it is active; None where nothing is.

        Raises:
            InvalidRequest: something that servers can't do, or a served adapter is active, too.
        """
        found = trained_now(self.remote_layers.placeholders, getattr(self, "peft_config", None))
        if found is not None and self.adapters.active:
            raise InvalidRequest(
                f"adapters {', '.join(self.adapters.active)} are active beside what is trained:"
                " disable_adapters() first"
            )
        return found

    def inference_session(
        self, *, max_length: int | None = None, batch_size: int = 1, adapter_name: Choice = None
    ) -> RemoteCache:
        """Open a session that outlives a call of `generate`, so that the next call sends only new tokens.

            with model.inference_session(max_length=512) as session:
                ids = model.generate(ids, session=session, max_new_tokens=20)
                ids = model.generate(torch.cat([ids, more], 1), session=session, max_new_tokens=20)

        Args:
            max_length: most tokens in a row, prompt and answers together; all that the model can hold by default.
            batch_size: rows; with beams or several return sequences, their product with the prompts.
            adapter_name: adapters of the rows, as in `generate`; they stay the same while the session lasts.

        Raises:
            InvalidRequest: when `max_length` is more than the model's positions, or a name is unknown.
        """
        adapters = self._adapters_of_session(adapter_name, max(batch_size, 1))
        if max_length is None:
            max_length = (max_positions(self) or 1 << 16) - _num_columns(adapters)
        self._check_length(max_length + _num_columns(adapters))
        if batch_size < 1 or max_length < 1:
            raise InvalidRequest(f"a session needs a row and a token, got batch_size {batch_size}, length {max_length}")
        return self._open(batch_size, max_length, adapters)

    @torch.no_grad()
    def generate(
        self, *args: Any, session: RemoteCache | None = None, adapter_name: Choice = None, **kwargs: Any
    ) -> Any:
        """As `GenerationMixin.generate` of transformers, with the blocks on other machines.

        A session is opened for the call and closed with it, however it ends; to continue, pass one of your own.

        Args:
            session: continue this session; `inputs` are the whole sequence so far, of which only what is new is sent.
                Where the session holds more, as after a call that was interrupted, it goes back to the inputs.
            adapter_name: which adapter to use: a name, or one per prompt, with None for no adapter; those that are
                active if not given. A session of your own has those that it was opened with.

        Raises:
            InvalidRequest: for arguments that the model or the session cannot serve.
            RouteNotFound, PeerError: when the swarm fails for longer than its patience.
        """
        self.adapters.check(adapter_name)
        if session is not None:
            if kwargs.get("past_key_values") is not None:
                raise InvalidRequest("pass either session or past_key_values, not both")
            kwargs["past_key_values"] = session
        given = kwargs.get("past_key_values")
        if given is not None and not isinstance(given, RemoteCache):
            raise InvalidRequest(f"past_key_values must come from inference_session(), got {type(given).__name__}")
        if given is not None:
            _go_back(given, args, kwargs)
        opened: list[RemoteCache] = []
        token, name_token = _opened.set(opened), _chosen.set(adapter_name)
        try:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            _opened.reset(token)
            _chosen.reset(name_token)
            self._remember_route(opened[0] if opened else given)
            for cache in opened:
                _close_quietly(cache)

    def forward(self, *args: Any, adapter_name: Choice = None, **kwargs: Any) -> Any:
        """Run the model once; see the `forward` of the transformers class.

        Without a session (`past_key_values`), one is opened for this call only. `adapter_name` is that of `generate`.
        What PEFT trains in the blocks counts unless an adapter is named.
        """
        return self.drive(super().forward, args, kwargs, adapter_name)

    def drive(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], adapter_name: Choice = None
    ) -> Any:
        """Call a forward that goes through the remote blocks: the model's own, or that of its inner model.

        Raises:
            InvalidRequest: for arguments that remote blocks or the session can't serve.
        """
        if len(args) > 1:
            raise InvalidRequest("pass everything but the first argument by keyword")
        name = next((name for name in _CACHE_NAMES if kwargs.get(name) is not None), None)
        cache = kwargs[name] if name is not None else None
        if cache is None:
            if kwargs.get("use_cache"):
                raise InvalidRequest("use_cache=True needs past_key_values=model.inference_session(...)")
            kwargs["use_cache"] = False
        elif not isinstance(cache, RemoteCache):
            raise InvalidRequest(f"past_key_values must come from inference_session(), got {type(cache).__name__}")
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim != 2:
            raise InvalidRequest(f"attention_mask must be [batch, tokens], got {tuple(mask.shape)}")
        is_free = cache is None and adapter_name is None and _chosen.get() is None
        trained = self.trained() if is_free else None
        if trained is None:
            adapters = self._adapters_of_call(args, kwargs, cache, adapter_name)
        else:
            adapters = self._virtual_rows(args, kwargs, trained)
        if adapters is not None and adapters.num_columns:
            return self._call_with_virtual(forward, args, kwargs, cache, adapters, trained)
        return self._call(forward, args, kwargs, cache, adapters, trained)

    def gradient_checkpointing_enable(self, *_: Any, **__: Any) -> None:
        """Nothing to do: servers keep what there is memory for, and run blocks again where there is none."""

    def gradient_checkpointing_disable(self) -> None:
        """Nothing to do."""

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Refused: most of the model is elsewhere.

        Raises:
            InvalidRequest: always.
        """
        raise InvalidRequest(
            f"a distributed model holds no blocks, so it can't be saved; "
            f"the checkpoint of {self.checkpoint.name} is at {self.checkpoint.path}"
        )

    def close(self) -> None:
        """Close all sessions and leave the swarm; may be called twice."""
        self.block_service.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- hooks of transformers ----------------------------------------------------------------------------------

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> bool:
        """Called once by `generate`, when the lengths are known: check them and open a session."""
        max_length = max_cache_length + 1
        copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        rows = batch_size * copies
        name = "cache_params" if "mamba" in type(self).__name__.lower() else "past_key_values"
        given: Cache | None = model_kwargs.get(name)
        if given is not None:
            assert isinstance(given, RemoteCache)  # checked by generate
            given.require_open()
            self._check_length(max_length + _num_columns(given.adapters))
            if given.rows != rows:
                raise InvalidRequest(f"the batch has {rows} rows, the session {given.rows}")
            if max_cache_length > given.max_length:  # the last token is never sent
                raise InvalidRequest(
                    f"max_length {max_length} needs {max_cache_length} tokens in a session of {given.max_length}"
                )
            self._check_choice(given, _chosen.get())
            return True
        adapters = self._adapters_of_session(_chosen.get(), batch_size)
        num_columns = _num_columns(adapters)
        self._check_length(max_length + num_columns)
        if generation_config.use_cache is False:
            return False
        if generation_config.cache_implementation in _LOCAL_CACHES:
            raise InvalidRequest(f"cache_implementation={generation_config.cache_implementation!r} is for local models")
        guessed = (
            generation_config.prompt_lookup_num_tokens or 0
        )  # guesses may reach beyond the end, and are dropped there
        max_length = min(max_length + guessed, (max_positions(self) or sys.maxsize) - num_columns)
        cache = self._open(rows, max_length, adapters.expanded(copies) if adapters is not None else None, copies)
        model_kwargs[name] = cache
        opened = _opened.get()
        if opened is not None:
            opened.append(cache)
        return True

    # -- helpers ------------------------------------------------------------------------------------------------

    def _adapters_of_call(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], cache: RemoteCache | None, choice: Choice
    ) -> RowAdapters | None:
        """The adapters of the rows of one call of the model."""
        if cache is not None:
            self._check_choice(cache, choice)
            return cache.adapters
        choice = _chosen.get() if choice is None else choice
        given = next((it for it in (*args[:1], *map(kwargs.get, _INPUT_NAMES)) if it is not None), None)
        return None if given is None else self.adapters.rows(choice, len(given))

    def _adapters_of_session(self, choice: Choice, num_rows: int) -> RowAdapters | None:
        """The adapters of a new session: what is named, or what is trained, as it is now, or what is active."""
        trained = self.trained() if choice is None else None
        if trained is None:
            return self.adapters.rows(choice, num_rows)
        return RowAdapters.of([trained.snapshot(self.layout)] * num_rows)

    def _check_choice(self, cache: RemoteCache, choice: Choice) -> None:
        """Whether a session has the adapters that a call names; one that names none takes what the session has."""
        if choice is None:
            return
        wanted = self.adapters.rows(choice, cache.rows)
        if (cache.adapters is None) != (wanted is None) or (wanted is not None and not wanted.is_same(cache.adapters)):
            raise InvalidRequest("the session was opened with other adapters; name them in inference_session()")

    def _virtual_rows(self, args: tuple[Any, ...], kwargs: dict[str, Any], trained: Trained) -> RowAdapters | None:
        """Virtual positions of what is trained, before every row."""
        if not trained.num_virtual:
            return None
        given = next(it for it in (*args[:1], *map(kwargs.get, _INPUT_NAMES)) if it is not None)
        rows = trained.rows(self.block_service.num_blocks, self.block_service.hidden_size)
        return RowAdapters(adapters=(rows,), of_row=(0,) * len(given))

    def _call(
        self,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        cache: RemoteCache | None,
        adapters: RowAdapters | None,
        trained: Trained | None,
    ) -> Any:
        keep = kwargs.get("logits_to_keep", 0)
        values = Pass(
            cache=cache,
            adapters=adapters if trained is None else None,
            mask=kwargs.get("attention_mask"),
            outputs=keep if isinstance(keep, int) else 0,
            deltas=None if trained is None else trained.deltas,
            num_virtual=0 if trained is None else trained.num_virtual,
            positions=kwargs.get("position_ids"),
        )
        with model_pass(values):
            return forward(*args, **kwargs)

    def _call_with_virtual(
        self,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        cache: RemoteCache | None,
        adapters: RowAdapters,
        trained: Trained | None,
    ) -> Any:
        """A call in which virtual positions stand before the tokens; its outputs are those of the tokens."""
        kwargs |= {"input_ids": args[0]} if args else {}
        length = cache.length if cache is not None else 0
        is_first = cache is None or cache.is_new
        changed = with_virtual(self, kwargs, adapters, is_first=is_first, length=length)
        with cache.virtual_shown() if cache is not None else nullcontext():
            outputs = self._call(forward, (), changed, cache, adapters, trained)
        total = changed["inputs_embeds"].shape[1] if is_first else 0
        for name in ("logits", "last_hidden_state"):
            found = getattr(outputs, name, None) if is_first else None
            if found is not None and found.shape[1] == total:
                setattr(outputs, name, found[:, adapters.num_columns :])
        return outputs

    def _open(self, rows: int, max_length: int, adapters: RowAdapters | None = None, copies: int = 1) -> RemoteCache:
        session = open_session(self.block_service, rows, max_length + _num_columns(adapters), adapters)
        return RemoteCache(session, max_length=max_length, copies=copies, adapters=adapters)

    def _remember_route(self, cache: RemoteCache | None) -> None:
        if cache is not None:
            self.last_route = self._named(cache.route)

    def _named(self, hops: Sequence[Any]) -> tuple[tuple[str, Any], ...]:
        peers = getattr(self.block_service, "peers", None)
        return tuple((peers.name_of(hop.peer_id) if peers else hop.peer_id, hop) for hop in hops)

    def _check_length(self, length: int) -> None:
        limit = max_positions(self)
        if limit is not None and length > limit:
            raise InvalidRequest(f"max_length {length} is more than the {limit} positions of {self.checkpoint.name}")


class DistributedClassifier(DistributedModel):  # type: ignore[no-untyped-call]
    """Mixed into the class of a transformers model that classifies sequences: its head is here, and may be trained.

    Its forward is all its own; the inner model alone knows that blocks are elsewhere (`DistributedModel.drive`), so
    that rows are pooled by their own tokens whatever stands before them.
    """

    def forward(self, *args: Any, adapter_name: Choice = None, **kwargs: Any) -> Any:
        """Run the model once; `adapter_name` is that of `generate`."""
        self.adapters.check(adapter_name)
        token = _chosen.set(adapter_name)
        try:
            return super(DistributedModel, self).forward(*args, **kwargs)
        finally:
            _chosen.reset(token)


def max_positions(model: PreTrainedModel) -> int | None:
    """Longest sequence that the model was made for, or None where it has no such limit."""
    found = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(found) if isinstance(found, int) and found > 0 else None


def longest(model: DistributedModel) -> int:
    """Tokens of the longest row, beside the virtual positions of the active adapters."""
    return (max_positions(model) or 1 << 16) - _num_columns(model.adapters.rows(None, 1))


def _num_columns(adapters: RowAdapters | None) -> int:
    return adapters.num_columns if adapters is not None else 0


def _go_back(cache: RemoteCache, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Let a session forget what goes beyond the inputs of `generate`, and their last token, which is to be sent."""
    names = ("attention_mask", "inputs", "input_ids", "inputs_embeds")
    given = next((it for it in (*map(kwargs.get, names), *args[:1]) if it is not None), None)
    columns = cache.length + 1 if given is None else given.shape[1]
    if 0 < columns <= cache.length:
        cache.crop(columns - 1 - cache.length)


def _close_quietly(cache: RemoteCache) -> None:
    """Close without hiding the exception that may be on its way."""
    try:
        cache.close()
    except (SwarmError, TimeoutError) as error:
        logger.warning("a session did not close: %s", error)
