"""What can be asked for by name: the one place that turns the `model` of a request into what runs it.

    "base" | "base:adapter" ─Models.find─► ServedModel: a distributed model, its adapter, its tokenizer, its limits

Knows nothing of HTTP. Changes the model's generation settings once: `generate` runs greedily and without end, since
choosing tokens and ending answers is `swarm.api.generation`'s business.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from swarm.api.errors import ApiError
from swarm.api.prompts import Prompts
from swarm.api.requests import Options
from swarm.api.sampling import Sampling
from swarm.client.adapters import BASE
from swarm.client.chat import load_tokenizer
from swarm.client.generation import DistributedModel, max_positions
from swarm.client.row_adapters import RowAdapters


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model that answers under one name."""

    name: str
    model: DistributedModel
    prompts: Prompts
    end_tokens: frozenset[int]
    """Tokens that end an answer."""
    defaults: Sampling
    """What its authors recommend where a request says nothing."""
    max_positions: int
    """Prompt and answer together, in tokens."""
    adapter: str | None = None
    """The model's name for the adapter that answers under this name."""

    @property
    def digest(self) -> str:
        """Which content the model's name stands for."""
        return self.model.checkpoint.digest

    def adapters(self, rows: int) -> RowAdapters | None:
        """The adapters of a session of so many rows."""
        return self.model.adapters.rows(self.adapter or BASE, rows)

    def with_adapter(self, adapter: str) -> "ServedModel":
        """This model with one of its adapters, which then has a name of its own."""
        rows = self.model.adapters.rows(adapter, 1)
        columns = rows.num_columns if rows is not None else 0
        name = f"{self.name}:{adapter}"
        return replace(self, name=name, adapter=adapter, max_positions=self.max_positions - columns)

    def sampling(self, options: Options) -> Sampling:
        """How tokens are chosen for a request.

        Raises:
            ApiError: a bias for a token that the model doesn't know.
        """
        for token, _ in options.logit_bias:
            if token >= self.prompts.vocabulary:
                raise ApiError(f"logit_bias: token {token} is beyond {self.prompts.vocabulary - 1}", param="logit_bias")
        given = {
            name: value for name in ("temperature", "top_p", "top_k") if (value := getattr(options, name)) is not None
        }
        return replace(
            self.defaults,
            **given,
            seed=options.seed,
            frequency_penalty=options.frequency_penalty,
            presence_penalty=options.presence_penalty,
            logit_bias=options.logit_bias,
            top_logprobs=options.top_logprobs,
        )


class Models:
    """Everything that this process serves."""

    def __init__(self, models: Iterable[ServedModel]):
        self._models = {model.name: model for model in models}

    @property
    def all(self) -> tuple[ServedModel, ...]:
        """In the order in which they are listed."""
        return tuple(self._models.values())

    def find(self, name: str) -> ServedModel:
        """The model of this name.

        Raises:
            ApiError: there is none.
        """
        if name not in self._models:
            raise ApiError(
                f"the model {name!r} does not exist here; there is {', '.join(self._models)}",
                status=404,
                code="model_not_found",
                param="model",
            )
        return self._models[name]


def serve_model(model: DistributedModel, *, tokenizer: PreTrainedTokenizerBase | None = None) -> ServedModel:
    """Make a distributed model ready for requests.

    Args:
        model: its generation settings are changed.
        tokenizer: that of its checkpoint by default.

    Raises:
        UnsupportedModel: its checkpoint has no tokenizer.
    """
    settings = model.generation_config
    model.generation_config = _endless(settings)
    return ServedModel(
        name=model.checkpoint.name,
        model=model,
        prompts=Prompts(tokenizer or load_tokenizer(model.checkpoint), _vocabulary(model)),
        end_tokens=frozenset(_ids(settings.eos_token_id)),
        defaults=_defaults(settings),
        max_positions=max_positions(model) or 1 << 16,
    )


def _endless(settings: GenerationConfig) -> GenerationConfig:
    """Greedy, one answer, no end before its length; penalties and suppressed tokens stay as the authors want them."""
    changed = copy.deepcopy(settings)
    changed.do_sample, changed.num_beams, changed.num_return_sequences = False, 1, 1
    changed.temperature = changed.top_p = changed.top_k = changed.max_length = changed.max_new_tokens = None
    changed.eos_token_id, changed.pad_token_id = None, 0
    return changed


def _defaults(settings: GenerationConfig) -> Sampling:
    if not settings.do_sample:
        return Sampling(temperature=1.0)  # OpenAI's default
    temperature = 1.0 if settings.temperature is None else settings.temperature
    return Sampling(temperature=temperature, top_p=settings.top_p or 1.0, top_k=settings.top_k or 0)


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(token) for token in value] if isinstance(value, list | tuple) else [int(value)]


def _vocabulary(model: DistributedModel) -> int:
    return len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
