"""PEFT's own models over remote blocks: `get_peft_model(model, LoraConfig(...))`.

    config ─check─► peft.get_peft_model ─► PeftModelForCausalLM around the model ─► class := Distributed<class>
                         └─ parameters beside the placeholders of the remote linears, at the client

Everything is PEFT's: where adapters go, how they begin, state dicts, files. Added is what depends on blocks being
elsewhere: prefixes go to the servers instead of a cache, generation uses a snapshot, and what can't be done is refused
by the name of its field.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Self, cast

import peft
from peft import PeftConfig, PeftType, TaskType
from torch import Tensor

from swarm.adapters.delta import BlockDelta
from swarm.client.adapters import Choice
from swarm.client.cache import RemoteCache
from swarm.client.generation import DistributedModel
from swarm.client.remote_blocks import has_packed_rows
from swarm.client.trained import Trained, adapted, prompted
from swarm.errors import InvalidRequest

_PREFIX = (PeftType.PREFIX_TUNING,)
_ANY = frozenset({"peft_type", "task_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping",
                  "peft_version"})  # fmt: skip
_LINEARS = _ANY | {"target_modules", "exclude_modules", "modules_to_save", "fan_in_fan_out"}
_PROMPTS = _ANY | {"num_virtual_tokens", "modules_to_save", "token_dim", "num_transformer_submodules",
                   "num_attention_heads", "num_layers"}  # fmt: skip
_FIELDS: Mapping[PeftType, frozenset[str]] = {
    PeftType.LORA: _LINEARS
    | {"r", "lora_alpha", "use_rslora", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern",
       "alpha_pattern", "lora_bias", "megatron_core", "qalora_group_size", "runtime_config"},
    PeftType.IA3: _LINEARS | {"feedforward_modules", "init_ia3_weights"},
    PeftType.PROMPT_TUNING: _PROMPTS
    | {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"},
    PeftType.P_TUNING: _PROMPTS
    | {"encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"},
    PeftType.PREFIX_TUNING: _PROMPTS | {"encoder_hidden_size", "prefix_projection", "init_weights"},
}  # fmt: skip
"""What may be other than its default, by method."""
_INITIALISED_ALONE = (True, False, "gaussian", "orthogonal")
"""LoRA's initialisations that need no weights of the base."""


def get_peft_model(
    model: DistributedModel, peft_config: PeftConfig, adapter_name: str = "default", **options: Any
) -> "DistributedPeftModel":
    """Put trainable parameters beside the remote blocks of a model, as `peft.get_peft_model` does beside local ones.

    The parameters are the client's: the same seed gives the same values as on a local model.

    Args:
        model: with remote blocks; it is changed, as PEFT does.
        peft_config: LoraConfig, IA3Config, PromptTuningConfig, PromptEncoderConfig or PrefixTuningConfig.
        adapter_name: how PEFT calls it.
        options: of `peft.get_peft_model`: autocast_adapter_dtype, revision.

    Returns:
        A `peft.PeftModel` of the class for the config's task.

    Raises:
        InvalidRequest: something of the config can't be had with remote blocks, or fits no module; names the field.
    """
    check_config(peft_config)
    try:
        found = peft.get_peft_model(model, peft_config, adapter_name, **options)
    except ValueError as error:  # PEFT's way to say that nothing fits, before it has changed anything
        raise InvalidRequest(f"{_field_of(error)}: {error}") from error
    return _distributed(found)


def check_config(config: PeftConfig) -> None:
    """Refuse what can't be trained through remote blocks.

    Raises:
        InvalidRequest: names the field and its value.
    """
    known = _FIELDS.get(cast(PeftType, config.peft_type))
    if known is None:
        names = ", ".join(sorted(it.value for it in _FIELDS))
        raise InvalidRequest(f"peft_type = {config.peft_type} can't be trained in remote blocks, only {names}")
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in known and value and value != _default(field) and value != "none":
            hint = ": dropout can't be reproduced there, set it to 0" if "dropout" in field.name else ""
            raise InvalidRequest(f"{field.name} = {str(value)[:80]} can't be had in remote blocks{hint}")
    init = getattr(config, "init_lora_weights", True)
    if init not in _INITIALISED_ALONE:
        raise InvalidRequest(f"init_lora_weights = {init!r} needs the base's weights, which are on servers")
    if config.is_prompt_learning and config.task_type is None:
        raise InvalidRequest(f"task_type is missing: {config.peft_type} needs it (CAUSAL_LM or SEQ_CLS)")


class DistributedPeftModel(peft.PeftModel):  # type: ignore[misc,unused-ignore]
    """Mixed into PEFT's class for the task; see the module."""

    @classmethod
    def from_pretrained(  # type: ignore[override,unused-ignore]
        cls, model: DistributedModel, model_id: str | Path, adapter_name: str = "default", **options: Any
    ) -> "DistributedPeftModel":
        """As `peft.PeftModel.from_pretrained`; `is_trainable=True` to train on.

        Raises:
            InvalidRequest: something of its config can't be had with remote blocks; names the field.
        """
        config = options.pop("config", None) or PeftConfig.from_pretrained(str(model_id), **_hub_options(options))
        config.inference_mode = not options.get("is_trainable", False)
        _check_loaded(config)
        if config.is_prompt_learning and not config.inference_mode:
            return _prompts_to_train(model, config, str(model_id), adapter_name, _hub_options(options))
        return _distributed(
            peft.PeftModel.from_pretrained(model, str(model_id), adapter_name, config=config, **options)
        )

    def load_adapter(  # type: ignore[override,unused-ignore]
        self, model_id: Any, adapter_name: str, is_trainable: bool = False, **options: Any
    ) -> Any:
        """As PEFT's: another adapter whose parameters are the client's; `set_adapter` makes it the one that is used.

        Raises:
            InvalidRequest: something of its config can't be had with remote blocks; names the field.
        """
        config = options.get("peft_config") or PeftConfig.from_pretrained(str(model_id), **_hub_options(options))
        config.inference_mode = not is_trainable
        _check_loaded(config)
        if config.is_prompt_learning and is_trainable:  # PEFT loads no prompt to train on
            if adapter_name not in self.peft_config:
                self.add_adapter(adapter_name, config)
            return _fill_prompt(self, config, str(model_id), adapter_name, _hub_options(options))
        result = super().load_adapter(str(model_id), adapter_name, is_trainable=is_trainable, **options)
        self._check_targets()
        return result

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's; where a prefix is trained, servers put it before each row.

        Raises:
            InvalidRequest: adapter_names; or rows that hold several sequences, where virtual positions are trained.
        """
        if kwargs.get("adapter_names") is not None:
            raise InvalidRequest("adapter_names can't be used here; use adapter_name with served adapters")
        config = self.active_peft_config
        if config.is_prompt_learning:
            _refuse_packed_rows({**dict(zip(("input_ids", "attention_mask"), args, strict=False)), **kwargs})
        is_classifier = config.is_prompt_learning and config.task_type == TaskType.SEQ_CLS  # pools by the tokens' ids
        if config.peft_type not in _PREFIX and not is_classifier:
            return super().forward(*args, **kwargs)
        if len(args) > 1:
            raise InvalidRequest("only input_ids can be given by position, all else by keyword")
        kwargs |= {"input_ids": args[0]} if args else {}
        with self._prompted():
            return cast(Any, self.base_model)(**{name: value for name, value in kwargs.items() if name != "task_ids"})

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`DistributedModel.generate` with the parameters as they are now, unless `adapter_name` says otherwise."""
        if kwargs.get("adapter_names") is not None:
            raise InvalidRequest("adapter_names can't be used here; use adapter_name with served adapters")
        with self._prompted():
            return cast(Any, self.get_base_model()).generate(*args, **kwargs)

    def inference_session(
        self, *, max_length: int | None = None, batch_size: int = 1, adapter_name: Choice = None
    ) -> RemoteCache:
        """`DistributedModel.inference_session` with the parameters as they are now."""
        with self._prompted():
            model = cast(DistributedModel, self.get_base_model())
            return model.inference_session(max_length=max_length, batch_size=batch_size, adapter_name=adapter_name)

    def save_pretrained(self, save_directory: str, **options: Any) -> None:  # type: ignore[override,unused-ignore]
        """As PEFT's: adapter_config.json and adapter_model.safetensors, for PEFT and for the swarm alike.

        Embeddings never change here, so they are saved only where `save_embedding_layers=True` asks for it.
        """
        super().save_pretrained(save_directory, **{"save_embedding_layers": False, **options})

    def merge_and_unload(self, *_: Any, **__: Any) -> Any:
        """Refused.

        Raises:
            InvalidRequest: always.
        """
        raise InvalidRequest("adapters can't be merged into remote blocks, which serve others, too; use unload()")

    merge_adapter = merge_and_unload

    def close(self) -> None:
        """Leave the swarm; may be called twice."""
        cast(DistributedModel, self.get_base_model()).close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _prompted(self) -> Iterator[None]:
        """Let the model use the virtual positions that are trained, where there are any."""
        if not self.active_peft_config.is_prompt_learning or self._adapters_disabled:
            yield
            return
        with prompted(self._virtual()):
            yield

    def _virtual(self) -> Trained:
        config = self.active_peft_config
        encoder: Any = self.prompt_encoder[self.active_adapter]
        tokens = self.prompt_tokens[self.active_adapter][: config.num_virtual_tokens].to(self.device)
        rows: Tensor = encoder.embedding.weight if config.inference_mode else encoder(tokens[None])[0]
        base = str(config.base_model_name_or_path or "")[:1024]
        common: dict[str, Any] = {"method": config.peft_type.value, "base": base}
        if config.peft_type not in _PREFIX:
            return Trained(deltas={}, num_virtual=len(rows), embeddings_PH=rows, **common)
        width = config.token_dim // config.num_attention_heads
        parts = rows.view(len(rows), config.num_layers, 2, config.num_attention_heads, width)
        deltas = {
            block: BlockDelta(prefix_k_PKD=parts[:, block, 0], prefix_v_PKE=parts[:, block, 1])
            for block in range(config.num_layers)
        }
        return Trained(deltas=deltas, num_virtual=len(rows), **common)

    def _check_targets(self) -> None:
        """Whether servers can train all that PEFT has found.

        Raises:
            InvalidRequest: names the first module that they can't.
        """
        model = cast(DistributedModel, self.get_base_model())
        for index, layer in enumerate(model.remote_layers.placeholders):
            for path, module in adapted(layer).items():
                name = f"{model.layout.blocks_path}.{index}.{path}"
                if isinstance(module, peft.utils.ModulesToSaveWrapper):
                    raise InvalidRequest(f"modules_to_save has {name}, which is in a remote block")
                if path not in model.layout.blocks[index].linears:
                    raise InvalidRequest(f"target_modules has {name}, which servers can't train")


def _distributed(model: peft.PeftModel) -> DistributedPeftModel:
    """Give PEFT's model our ways; where servers can't train what it has found, it is taken apart again."""
    own = type(model)
    model.__class__ = type(f"Distributed{own.__name__}", (DistributedPeftModel, own), {"__module__": own.__module__})
    found = cast(DistributedPeftModel, model)
    try:
        found._check_targets()
    except InvalidRequest:
        if not found.active_peft_config.is_prompt_learning:
            cast(Any, found.base_model).unload()
        raise
    return found


def _prompts_to_train(
    model: DistributedModel, config: PeftConfig, model_id: str, adapter_name: str, options: Mapping[str, Any]
) -> DistributedPeftModel:
    """A saved prompt or prefix, to train on, which PEFT itself doesn't offer."""
    found = get_peft_model(model, config, adapter_name)
    _fill_prompt(found, config, model_id, adapter_name, options)
    return found


def _fill_prompt(
    model: DistributedPeftModel, config: PeftConfig, model_id: str, adapter_name: str, options: Mapping[str, Any]
) -> Any:
    name = next((it for it in ("prefix_projection", "encoder_reparameterization_type") if getattr(config, it, 0)), None)
    if name is not None:
        raise InvalidRequest(f"{name} is set: what its encoder computes was saved, not the encoder, so it can't go on")
    weights = peft.utils.load_peft_weights(model_id, device="cpu", **options)
    return peft.set_peft_model_state_dict(model, weights, adapter_name)


def _refuse_packed_rows(given: Mapping[str, Any]) -> None:
    """Virtual positions stand before a row, so a second sequence in it would have none, and see the first."""
    tokens, mask = given.get("input_ids"), given.get("attention_mask")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    if tokens is None:
        return
    rows, columns = tokens.shape[:2]
    before = 0 if mask is None else max(0, mask.shape[-1] - columns)
    if has_packed_rows(given.get("position_ids"), mask, rows, columns, before=before):
        raise InvalidRequest("position_ids start anew within a row: packed rows can't be had with virtual positions")


def _check_loaded(config: PeftConfig) -> None:
    """A saved adapter's dropout matters only where it is trained; how it began, not at all."""
    if config.inference_mode and hasattr(config, "lora_dropout"):
        config.lora_dropout = 0.0
    check_config(config)


def _default(field: Any) -> Any:
    factory: Callable[[], Any] | Any = field.default_factory
    return factory() if factory is not MISSING else field.default


def _field_of(error: ValueError) -> str:
    """Which field PEFT complains about."""
    text = str(error)
    named = ("modules_to_save", "layers_to_transform", "exclude_modules", "feedforward_modules", "task_type")
    return next((name for name in named if name in text), "target_modules")


def _hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    names = ("revision", "token", "cache_dir", "subfolder", "local_files_only")
    return {name: options[name] for name in names if options.get(name) is not None}
