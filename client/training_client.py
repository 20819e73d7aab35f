"""Training in four verbs, for loops and losses of one's own: forward_backward, optim_step, sample, save_state.

    client = TrainingClient(get_peft_model(model, LoraConfig(...)))
    done = client.forward_backward([Datum(tokens=ids, weights=weights)], "cross_entropy")
    client.optim_step(AdamParams(learning_rate=1e-4))           every call returns a future, and they run in order
    [answer] = client.sample(prompt, max_tokens=32).result()
    client.save_state("state").result()                          adapter, optimiser, steps: load_state goes on exactly

In the manner of Tinker. The loss is a sum over tokens; gradients add up until `optim_step`. Knows nothing of networks.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from swarm.client.peft_model import DistributedPeftModel
from swarm.errors import InvalidRequest

OPTIMIZER_FILE = "optimizer.pt"

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Datum:
    """One sequence to learn from; numbers per token belong to the token that is predicted, so the first is ignored."""

    tokens: Sequence[int]
    weights: Sequence[float] | None = None
    """How much each token counts; 1 by default."""
    logprobs: Sequence[float] | None = None
    """Of the policy that has sampled it, for importance_sampling and ppo."""
    advantages: Sequence[float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamParams:
    """Of one step of AdamW."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float | None = None
    """Largest norm of all gradients together; None for no limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBackward:
    """What `forward_backward` has found."""

    loss: float
    """Summed over tokens and sequences."""
    logprobs: list[Tensor]
    """[len(tokens) - 1] each: of every token but the first."""
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """An answer."""

    tokens: list[int]
    """Without the prompt; the end of text, if it came, is the last."""
    logprobs: list[float]
    """Of the model itself, whatever the temperature."""


Loss = Callable[[Sequence[Tensor], Sequence[Datum]], tuple[Tensor, Mapping[str, float]]]
"""(log-probabilities [len(tokens) - 1] of each datum, data) -> the loss to sum up, and numbers to report."""


class TrainingClient:
    """See the module.

    Args:
        model: its trainable parameters are trained; it is put into training mode.
    """

    def __init__(self, model: DistributedPeftModel):
        self.model = model.train()
        self.num_steps = 0
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not self._parameters:
            raise InvalidRequest("the model has nothing to train: load its adapter with is_trainable=True")
        self._optimizer = torch.optim.AdamW(self._parameters)
        self._has_gradients = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="swarm-training-client")

    def forward_backward(
        self, data: Sequence[Datum], loss_fn: str | Loss = "cross_entropy", **settings: float
    ) -> Future[ForwardBackward]:
        """Add the gradients of a loss to those that are there; where that fails half way, all of them are forgotten.

        Args:
            data: sequences; they travel together.
            loss_fn: "cross_entropy", "importance_sampling", "ppo" (`clip`, 0.2 by default), or a function.
            settings: of the loss.

        Raises:
            InvalidRequest: data that doesn't fit the loss; names the field.
        """
        loss = LOSSES.get(loss_fn) if isinstance(loss_fn, str) else loss_fn
        if loss is None:
            raise InvalidRequest(f"loss_fn is {loss_fn!r}, known are {', '.join(LOSSES)}")
        _check(data)
        return self._submit(lambda: self._forward_backward(list(data), loss, settings))

    def optim_step(self, params: AdamParams | None = None) -> Future[float]:
        """Change the parameters by the gradients, which are gone then; gives the norm that these had.

        Raises:
            InvalidRequest: there are none.
        """
        return self._submit(lambda: self._optim_step(params or AdamParams()))

    def sample(
        self, prompt: Sequence[int], *, max_tokens: int, num_samples: int = 1, temperature: float = 1.0,
        top_p: float = 1.0, seed: int | None = None,
    ) -> Future[list[Sample]]:  # fmt: skip
        """Let the model with its parameters as they are then go on with a prompt.

        Args:
            prompt: tokens.
            max_tokens: of each answer.
            num_samples: how many.
            temperature: 0 for the likeliest tokens.
            top_p: draw from the likeliest tokens of this total probability.
            seed: makes it repeatable.
        """
        options = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
        return self._submit(
            lambda: self._sample(list(prompt), seed, max_new_tokens=max_tokens, num_return_sequences=num_samples,
                                 do_sample=temperature > 0, **options)
        )  # fmt: skip

    def save_state(self, directory: Path | str) -> Future[Path]:
        """Write the adapter (PEFT's files) and the optimiser's state, gradients not included."""
        return self._submit(lambda: self._save(Path(directory)))

    def load_state(self, directory: Path | str) -> Future[None]:
        """Go on from what `save_state` has written; gradients are forgotten.

        Raises:
            InvalidRequest: there is no such state.
        """
        return self._submit(lambda: self._load(Path(directory)))

    def close(self) -> None:
        """Wait for what is under way; the model stays open."""
        self._thread.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- on the thread -------------------------------------------------------------------------------------------

    def _submit(self, work: Callable[[], T]) -> Future[T]:
        return self._thread.submit(work)

    def _forward_backward(self, data: list[Datum], loss_fn: Loss, settings: Mapping[str, float]) -> ForwardBackward:
        lengths = [len(datum.tokens) for datum in data]
        ids = torch.zeros(len(data), max(lengths), dtype=torch.long)
        for row, datum in enumerate(data):
            ids[row, : lengths[row]] = torch.tensor(list(datum.tokens))
        mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
        device = self.model.device
        logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits[:, -ids.shape[1] :].float()
        logprobs = [
            logits[row, : length - 1].log_softmax(-1).gather(1, ids[row, 1:length, None].to(device))[:, 0]
            for row, length in enumerate(lengths)
        ]
        loss, metrics = loss_fn(logprobs, data, **settings)
        try:
            loss.backward()
        except BaseException:
            self._forget_gradients()  # some of them have this call's share, others not
            raise
        self._has_gradients = True
        return ForwardBackward(loss=loss.item(), logprobs=[it.detach().cpu() for it in logprobs], metrics=dict(metrics))

    def _optim_step(self, params: AdamParams) -> float:
        if not self._has_gradients:
            raise InvalidRequest("optim_step without forward_backward: there are no gradients")
        limit = float("inf") if params.grad_clip_norm is None else params.grad_clip_norm
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, limit, error_if_nonfinite=False)
        for group in self._optimizer.param_groups:
            group.update(lr=params.learning_rate, betas=(params.beta1, params.beta2), eps=params.eps,
                         weight_decay=params.weight_decay)  # fmt: skip
        self._optimizer.step()
        self._forget_gradients()
        self.num_steps += 1
        return float(norm)

    def _sample(self, prompt: list[int], seed: int | None, **options: Any) -> list[Sample]:
        if seed is not None:
            torch.manual_seed(seed)
        ids = torch.tensor([prompt], device=self.model.device)
        given = {"attention_mask": torch.ones_like(ids), "output_logits": True, "return_dict_in_generate": True}
        self.model.eval()
        try:
            found = self.model.generate(input_ids=ids, **given, **options)
        finally:
            self.model.train()
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        steps = [step.float().log_softmax(-1) for step in found.logits]
        answers = []
        for row, sequence in enumerate(found.sequences[:, len(prompt) :].tolist()):
            end = next((index + 1 for index, token in enumerate(sequence) if token in ends), len(sequence))
            tokens = sequence[:end]
            answers.append(
                Sample(tokens=tokens, logprobs=[float(steps[index][row, it]) for index, it in enumerate(tokens)])
            )
        return answers

    def _save(self, directory: Path) -> Path:
        self.model.save_pretrained(str(directory))
        state = {"optimizer": self._optimizer.state_dict(), "num_steps": self.num_steps}
        torch.save(state, directory / OPTIMIZER_FILE)
        return directory

    def _load(self, directory: Path) -> None:
        if not (directory / OPTIMIZER_FILE).is_file():
            raise InvalidRequest(f"{directory} has no {OPTIMIZER_FILE}: it was not written by save_state")
        self.model.load_adapter(directory, self.model.active_adapter, is_trainable=True)
        self.model.train()
        state = torch.load(directory / OPTIMIZER_FILE, weights_only=True)
        self._optimizer.load_state_dict(state["optimizer"])
        self.num_steps = state["num_steps"]
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        self._optimizer.zero_grad()
        self._has_gradients = False


def cross_entropy(logprobs: Sequence[Tensor], data: Sequence[Datum]) -> tuple[Tensor, Mapping[str, float]]:
    """The sum of -weight * logprob."""
    parts = [-(own * _numbers(datum, "weights", own)).sum() for own, datum in zip(logprobs, data, strict=True)]
    return torch.stack(parts).sum(), {}


def importance_sampling(logprobs: Sequence[Tensor], data: Sequence[Datum]) -> tuple[Tensor, Mapping[str, float]]:
    """The sum of -ratio * advantage, the ratio being that of now to when it was sampled."""
    parts = [
        -(_ratio(own, datum) * _numbers(datum, "advantages", own) * _numbers(datum, "weights", own)).sum()
        for own, datum in zip(logprobs, data, strict=True)
    ]
    return torch.stack(parts).sum(), {}


def ppo(logprobs: Sequence[Tensor], data: Sequence[Datum], clip: float = 0.2) -> tuple[Tensor, Mapping[str, float]]:
    """The same with the ratio kept within 1 - clip and 1 + clip where that makes it worse (Schulman et al., 2017)."""
    parts, num_clipped, num_tokens = [], 0, 0
    for own, datum in zip(logprobs, data, strict=True):
        ratio, advantages = _ratio(own, datum), _numbers(datum, "advantages", own)
        plain, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
        parts.append(-(torch.minimum(plain, clipped) * _numbers(datum, "weights", own)).sum())
        num_clipped += int((clipped < plain).sum())
        num_tokens += len(own)
    return torch.stack(parts).sum(), {"clipped": num_clipped / max(num_tokens, 1)}


LOSSES: Mapping[str, Any] = {"cross_entropy": cross_entropy, "importance_sampling": importance_sampling, "ppo": ppo}


def _ratio(logprobs: Tensor, datum: Datum) -> Tensor:
    return (logprobs - _numbers(datum, "logprobs", logprobs)).exp()


def _numbers(datum: Datum, name: str, like: Tensor) -> Tensor:
    """Numbers per predicted token."""
    values = getattr(datum, name)
    if values is None:
        if name == "weights":
            return torch.ones_like(like)
        raise InvalidRequest(f"a datum has no {name}, which this loss needs")
    return torch.tensor(list(values)[1:], dtype=like.dtype, device=like.device)


def _check(data: Sequence[Datum]) -> None:
    if not data:
        raise InvalidRequest("forward_backward needs at least one datum")
    for index, datum in enumerate(data):
        if len(datum.tokens) < 2:
            raise InvalidRequest(f"datum {index}: {len(datum.tokens)} tokens, need at least 2")
        for name in ("weights", "logprobs", "advantages"):
            values = getattr(datum, name)
            if values is not None and len(values) != len(datum.tokens):
                raise InvalidRequest(f"datum {index}: {len(values)} {name} for {len(datum.tokens)} tokens")
