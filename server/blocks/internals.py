"""How transformers' decoder layers are called: the only place of the server that uses transformers' running internals.

    register           our attention under the name ATTENTION in AttentionInterface; it has no mask function, so that
                       transformers builds no masks and passes attention_mask=None
    trace_calls        run the model's own forward on the meta device with every layer replaced by a recorder: what
                       each layer is given, by name, and which rotary call its position_embeddings come from
    SequenceState      the recurrent state of one sequence, in transformers' own cache layers

Internals used: AttentionInterface.register, masking_utils' exit for unregistered names, DynamicCache(config) with
LinearAttentionCacheLayerMixin, `rotary_emb`-like modules beside the layers, `original_inv_freq`. Tested with 5.17-5.23.
"""

import copy
import inspect
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, LinearAttentionCacheLayerMixin

from swarm.checkpoint.partial import build_model, find_blocks
from swarm.errors import UnsupportedModel

ATTENTION = "swarm_paged"
"""Name of our attention in transformers' AttentionInterface."""

CACHE_ARGUMENTS = ("past_key_values", "layer_past", "cache_params", "past_key_value")
"""Names under which layers take transformers' cache."""


class _Probe:
    """Where attention calls of modules go that have no attention of ours yet: set while a layer is being probed."""

    __slots__ = ("handler",)

    def __init__(self) -> None:
        self.handler: Callable[[nn.Module, Tensor, Tensor, Tensor, Any, dict[str, Any]], Tensor] | None = None


PROBE = _Probe()


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """What transformers' layers call: q [1, H, T, D], keys and values of the new rows only -> ([1, T, H, E], None)."""
    attention = module.__dict__.get("swarm_attention")
    if attention is not None:
        return attention(query, key, value, attention_mask, options), None
    if PROBE.handler is None:
        raise RuntimeError(f"{type(module).__name__} has no attention bound to it")
    return PROBE.handler(module, query, key, value, attention_mask, options), None


AttentionInterface.register(ATTENTION, attend)


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeCall:
    """One call of a rotary module that a step needs."""

    module: str
    """Path of the module beside the layers, such as "rotary_emb" or "rotary_embs.1"."""
    options: tuple[tuple[str, Any], ...]
    """Its arguments other than hidden states and positions: the layer type, where frequencies differ by it."""
    position_rows: int
    """Leading rows of positions that it wants: 3 for multimodal rope ([3, 1, T]), else 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCall:
    """How one layer is called. Layers that are called alike share one object."""

    constants: dict[str, Any]
    """Arguments that are the same for every step."""
    rope: int | None
    """Index of the RopeCall whose result is its position_embeddings."""
    takes_positions: bool
    cache_argument: str | None
    """Name under which it takes a cache, if it does."""

    def arguments(self, ropes: list[Any], positions_1T: Tensor) -> dict[str, Any]:
        """What it is called with beside hidden states, for rows at these positions."""
        given = dict(self.constants)
        if self.rope is not None:
            given["position_embeddings"] = ropes[self.rope]
        if self.takes_positions:
            given["position_ids"] = positions_1T
        return given


@dataclass(frozen=True, slots=True, kw_only=True)
class CallPlan:
    """How the layers of a model are called."""

    layers: tuple[LayerCall, ...]
    ropes: tuple[RopeCall, ...]


def trace_calls(config: PretrainedConfig, attn_implementation: str, ignored: frozenset[str]) -> CallPlan:
    """Find out how the model calls its layers, without any memory or weights.

    Args:
        config: of the whole model.
        attn_implementation: name under which to build it.
        ignored: arguments that `quirks` take care of, so that they may be anything.

    Raises:
        UnsupportedModel: a layer is given something that this runner would not give it, or hidden states don't
            flow straight from one layer to the next.
    """
    try:
        model = build_model(config, dtype=torch.bfloat16, attn_implementation=attn_implementation)
    except KeyError as error:
        raise UnsupportedModel(
            f"{config.model_type}: its attention doesn't go through transformers' AttentionInterface"
        ) from error
    problem = "hidden states don't flow straight from one block to the next"
    # Under our own name no masks are built: there is no data to build them from. Few models insist on having one.
    for name, as_tuple in itertools.product(dict.fromkeys((ATTENTION, attn_implementation)), (False, True)):
        model.config._attn_implementation = name
        tracer = _Tracer(model, as_tuple, ignored)
        try:
            tracer.run()
        except _WrongReturnKind:
            continue
        except (
            RuntimeError,
            ValueError,
            TypeError,
            AttributeError,
            NotImplementedError,
            IndexError,
            KeyError,
        ) as error:
            problem = f"its forward can't be traced: {error}"
            continue
        return tracer.plan()
    raise UnsupportedModel(f"{config.model_type}: {problem}")


class _WrongReturnKind(Exception):
    """The model took a tuple for a tensor, or the other way round."""


class _Tracer:
    """Runs a model's decoder on the meta device with recorders in place of its layers."""

    def __init__(self, model: PreTrainedModel, as_tuple: bool, ignored: frozenset[str]):
        path, blocks = find_blocks(model)
        self._model_type = model.config.model_type
        self._decoder = model.get_submodule(path.rpartition(".")[0])
        self._blocks = list(blocks)
        self._as_tuple = as_tuple
        self._ignored = ignored
        self._ropes: list[tuple[RopeCall, Any]] = []
        self._layers: list[LayerCall] = []
        hidden_size = model.config.get_text_config(decoder=True).hidden_size
        self._shares_kv = bool(getattr(model.config.get_text_config(decoder=True), "num_kv_shared_layers", 0))
        self._hidden = torch.zeros(1, 3, hidden_size, dtype=torch.bfloat16, device="meta")
        self._positions = torch.zeros(1, 3, dtype=torch.int64, device="meta")
        self._expected = self._hidden

    def run(self) -> None:
        for name, module in self._decoder.named_modules():
            if is_rotary(name, module) and not name.startswith(tuple(self._list_names())):
                module.forward = self._rope_recorder(name, module)
        for index, block in enumerate(self._blocks):
            block.forward = self._layer_recorder(index, block)
        options: dict[str, Any] = {"inputs_embeds": self._hidden, "use_cache": False}
        parameters = inspect.signature(type(self._decoder).forward).parameters
        if "position_ids" in parameters:
            options["position_ids"] = self._positions
        if "inputs_embeds" not in parameters:
            raise UnsupportedModel(f"{self._model_type}: its decoder takes no inputs_embeds")
        self._decoder(**options)

    def plan(self) -> CallPlan:
        if len(self._layers) != len(self._blocks):
            raise UnsupportedModel(f"{self._model_type}: calls {len(self._layers)} of its {len(self._blocks)} blocks")
        return CallPlan(layers=tuple(self._layers), ropes=tuple(call for call, _ in self._ropes))

    def _list_names(self) -> list[str]:
        return [f"{name}." for name, child in self._decoder.named_children() if any(
            block is member for member in child.children() for block in self._blocks[:1])]  # fmt: skip

    def _rope_recorder(self, name: str, module: nn.Module) -> Callable[..., Any]:
        parameters = list(inspect.signature(type(module).forward).parameters)[1:]

        def record(*args: Any, **options: Any) -> Any:
            named = dict(zip(parameters, args, strict=False)) | options
            positions = named.pop("position_ids", None)
            named.pop(parameters[0], None)
            if positions is None:
                positions = named.pop("position_ids_bld", None)
            rows = positions.shape[0] if isinstance(positions, Tensor) and positions.dim() == 3 else 0
            call = RopeCall(module=name, options=tuple(sorted(named.items())), position_rows=rows)
            for known, result in self._ropes:
                if known == call:
                    return result
            marker = (torch.empty(1, 3, 4, device="meta"), torch.empty(1, 3, 4, device="meta"))
            self._ropes.append((call, marker))
            return marker

        return record

    def _layer_recorder(self, index: int, block: nn.Module) -> Callable[..., Any]:
        signature = inspect.signature(type(block).forward)

        def record(*args: Any, **options: Any) -> Any:
            bound = signature.bind(block, *args, **options)
            given = dict(list(bound.arguments.items())[1:])
            for parameter in signature.parameters.values():
                if parameter.kind is parameter.VAR_KEYWORD:
                    given.update(given.pop(parameter.name, {}))
            hidden = given.pop(next(iter(given)))
            if index > 0 and hidden is not self._expected:
                raise _WrongReturnKind
            if not isinstance(hidden, Tensor) or hidden.shape != self._hidden.shape:
                raise UnsupportedModel(f"{self._model_type}: hidden states are not one [batch, tokens, hidden] tensor")
            if index != len(self._layers):
                raise UnsupportedModel(f"{self._model_type}: block {index} is called out of order or twice")
            call = self._layer_call(index, given, signature)
            self._layers.append(next((known for known in self._layers if known == call), call))
            self._expected = torch.empty_like(self._hidden)
            return (self._expected, None) if self._as_tuple else self._expected

        return record

    def _layer_call(self, index: int, given: dict[str, Any], signature: inspect.Signature) -> LayerCall:
        constants: dict[str, Any] = {}
        rope = None
        for name, value in given.items():
            markers = [i for i, (_, marker) in enumerate(self._ropes) if marker is value]
            if name in self._ignored or name == "attention_mask":
                if name in signature.parameters:
                    constants[name] = None
            elif name in ("position_ids", *CACHE_ARGUMENTS):
                continue
            elif name == "position_embeddings" and markers:
                rope = markers[0]
            elif _is_constant(value):
                constants[name] = value
            elif name == "shared_kv_states" and not self._shares_kv:
                constants[name] = {}  # nobody reads what its layers store there
            else:
                raise UnsupportedModel(
                    f"{self._model_type}: block {index} is given {name} ({type(value).__name__}), "
                    "which this runner doesn't provide"
                )
        caches = [name for name in CACHE_ARGUMENTS if name in signature.parameters]
        return LayerCall(
            constants=constants,
            rope=rope,
            takes_positions="position_ids" in given,
            cache_argument=caches[0] if caches else None,
        )


def _is_constant(value: Any) -> bool:
    return (
        value is None or isinstance(value, (bool, int, float, str)) or (isinstance(value, (dict, list)) and not value)
    )


def is_rotary(name: str, module: nn.Module) -> bool:
    """Whether a module beside the layers computes rotary position embeddings."""
    leaf = name.rpartition(".")[2] if not name.rpartition(".")[2].isdigit() else name
    named = "rotary" in leaf.lower() or "rotary" in type(module).__name__.lower()
    return named and not isinstance(module, nn.ModuleList)


class Ropes:
    """The rotary embeddings of a step, by the model's own modules.

    Frequencies of "longrope" and "dynamic" depend on the longest position in the call. They are computed sequence by
    sequence, from the initial state, so that no session changes the numbers of another one.

    Args:
        modules: from swarm.checkpoint.partial.build_rotary.
        calls: of the plan.
    """

    def __init__(self, modules: dict[str, nn.Module], calls: tuple[RopeCall, ...]):
        self._calls = []
        for call in calls:
            root, _, rest = call.module.partition(".")
            if root not in modules:
                raise UnsupportedModel(f"no rotary module {call.module!r} beside the blocks, found {sorted(modules)}")
            module = modules[root].get_submodule(rest) if rest else modules[root]
            self._calls.append((call, module, _depends_on_length(module)))

    @property
    def depend_on_length(self) -> bool:
        """Whether some frequencies depend on how many tokens are in the call."""
        return any(by_sequence for _, _, by_sequence in self._calls)

    def compute(self, hidden_1TH: Tensor, positions_1T: Tensor, lengths: list[int]) -> list[Any]:
        """The result of each call, for rows of sequences with `lengths` new tokens each."""
        results = []
        for call, module, by_sequence in self._calls:
            if not by_sequence:
                results.append(_rotate(call, module, hidden_1TH, positions_1T))
                continue
            parts = []
            for positions in positions_1T.split(lengths, dim=1):
                _reset(module)
                parts.append(_rotate(call, module, hidden_1TH, positions))
            results.append(_concatenate(parts))
        return results


def _rotate(call: RopeCall, module: nn.Module, hidden_1TH: Tensor, positions_1T: Tensor) -> Any:
    if call.position_rows:
        positions_1T = positions_1T[None].expand(call.position_rows, -1, -1)
    return module(hidden_1TH, positions_1T, **dict(call.options))


def _depends_on_length(module: nn.Module) -> bool:
    kinds = getattr(module, "rope_type", "default")
    return any("dynamic" in str(kind) or kind == "longrope" for kind in (
        kinds.values() if isinstance(kinds, dict) else [kinds]))  # fmt: skip


def _reset(module: nn.Module) -> None:
    """Put the frequencies of a stateful rotary module back to those of a short sequence."""
    for name, original in list(module.named_buffers(recurse=False)):
        if name.endswith("original_inv_freq"):
            module.register_buffer(name.replace("original_inv_freq", "inv_freq"), original.clone(), persistent=False)
            length = name.replace("original_inv_freq", "max_seq_len_cached")
            setattr(module, length, module.original_max_seq_len)


def _concatenate(parts: list[Any]) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(parts, dim=1)
    return tuple(torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))


class SequenceState(DynamicCache):
    """Recurrent state of one sequence in all layers of a model; keys and values stay in our pages.

    Args:
        config: of the whole model.
    """

    def __init__(self, config: PretrainedConfig):
        super().__init__(config=config)
        self.position = 0
        """Tokens that the state has seen."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Pass new keys and values through: our attention caches them."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.position

    def touched(self, layer: int) -> bool:
        """Whether the layer has put a state here."""
        entry = self.layers[layer] if layer < len(self.layers) else None
        if not isinstance(entry, LinearAttentionCacheLayerMixin):
            return False
        return any(state is not None for state in (*entry.conv_states.values(), *entry.recurrent_states.values()))

    def fork(self) -> "SequenceState":
        """An independent copy, for a beam."""
        return copy.deepcopy(self)

    def move_to(self, device: torch.device) -> None:
        """Move it to host memory or back."""
        for entry in self.layers:
            if isinstance(entry, LinearAttentionCacheLayerMixin):
                for states in (entry.conv_states, entry.recurrent_states):
                    for name, state in states.items():
                        states[name] = None if state is None else state.to(device)

    def tensors(self, layers: Iterable[int]) -> list[Tensor]:
        """What these layers have put here, in a fixed order."""
        entries = [self.layers[layer] for layer in layers if layer < len(self.layers)]
        return [
            state
            for entry in entries
            if isinstance(entry, LinearAttentionCacheLayerMixin)
            for states in (entry.conv_states, entry.recurrent_states)
            for _, state in sorted(states.items())
            if state is not None
        ]

    @property
    def num_bytes(self) -> int:
        """Memory that the state takes now."""
        return sum(tensor.nbytes for tensor in self.tensors(range(len(self.layers))))
