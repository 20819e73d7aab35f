"""What is trained in which round of a federated run, and what a round's updates make of it.

    Warmup ─ after its rounds ─► FixedRank or Stacking
      .begin(base)   puts what the round begins with into the model    .update()   what this client has made of it
      .rules()       what others' updates must look like               .combine()  what the next round begins with

* FixedRank: one adapter of rank r, which all clients train; afterwards the mean of their products, cut to rank r by an
  SVD ("svd"), or the means of A and of B ("average", FedIT).
* Stacking: what was learnt lies in a frozen adapter beside the one that is trained, which begins anew each round; the
  updates are stacked into the frozen one exactly, as FLoRA does. FLoRA then adds it to the base's weights. Those belong
  to servers here, so it stays an adapter, of a rank that grows each round, up to a limit, where an SVD shortens it.
* Warmup: SLoRA's first stage trains a random one per cent of all weights, wherever they lie. Servers apply and
  differentiate low-rank products, no sparse ones, so what is sparse here are columns: the same few input columns of
  each linear for all clients. W + B S with S a fixed selection of rows of the identity is such an update, and a LoRA of
  as many columns whose A isn't trained. The clients' mean is the mean of B, exactly. The second stage begins with its
  SVD.

All of it is deterministic: clients with the same updates have the same bits.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from swarm.adapters.delta import MAX_RANK, BlockDelta, LinearDelta
from swarm.client.lora_factors import LoraFactors
from swarm.errors import InvalidRequest
from swarm.federated.aggregate import (
    Update,
    averaged,
    clipped,
    distance,
    padded,
    stacked,
    truncated,
    weights_of,
    with_common_a,
)
from swarm.federated.common_start import common_a, selection
from swarm.federated.exchange import Taken
from swarm.federated.updates import Rules

Aggregate = Literal["svd", "stack", "average"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FederatedSettings:
    """What all clients of a run must have alike; those with others don't find each other."""

    aggregate: Aggregate = "svd"
    """"svd": the mean of all updates, cut to the adapter's rank. "stack": the exact mean, of growing rank. "average":
    the means of A and of B apart, for comparison."""
    max_rank: int = 64
    """Of "stack": beyond, what was learnt is cut to this rank; no client's own may be larger."""
    warmup_rounds: int = 0
    """Rounds in which a few columns of each linear are trained in place of a LoRA (SLoRA's first stage)."""
    warmup_columns: int = 16
    """How many; at least the adapter's rank, or a part of it would begin as nothing and stay so."""
    clip: float | None = None
    """Updates that go further than so many times the median of all count as if they had gone just so far."""
    weighting: Literal["examples", "equal"] = "examples"
    """Whether clients count by how many examples they say that they have, or all alike."""

    def __post_init__(self) -> None:
        if self.aggregate not in ("svd", "stack", "average"):
            raise InvalidRequest(f"aggregate is {self.aggregate!r}, known are svd, stack and average")
        if self.weighting not in ("examples", "equal"):
            raise InvalidRequest(f"weighting is {self.weighting!r}, known are examples and equal")
        for name in ("max_rank", "warmup_columns"):
            if not 1 <= getattr(self, name) <= MAX_RANK:
                raise InvalidRequest(f"{name} is {getattr(self, name)}, range 1..{MAX_RANK}")
        if not 0 <= self.warmup_rounds <= 1 << 20:
            raise InvalidRequest(f"warmup_rounds is {self.warmup_rounds}, need at least 0")
        if self.clip is not None and not 1.0 <= self.clip < math.inf:
            raise InvalidRequest(f"clip is {self.clip}, need at least 1: the median update counts in full")


class Stage(Protocol):
    """How rounds of one kind go."""

    @property
    def base(self) -> Update:
        """What the round began with; {} for nothing."""

    @property
    def base_rules(self) -> Rules:
        """What a base of this stage looks like, for those who fetch one."""

    def start(self) -> Update:
        """What the first round begins with, for all clients the same."""

    def begin(self, base: Update, number: int) -> None:
        """Put what a round begins with into the model."""

    def update(self) -> Update:
        """What this client has learnt, as the others get it."""

    def rules(self) -> Rules:
        """What updates of this round look like."""

    def combine(self, taken: Sequence[Taken]) -> Update:
        """What the updates of a round come to: the next round's base."""

    def current(self) -> Update:
        """All that the model has learnt, as one adapter."""


class FixedRank:
    """One adapter that all train."""

    def __init__(self, factors: LoraFactors, settings: FederatedSettings, seed: str):
        self._factors, self._settings, self._seed = factors, settings, seed
        self.base: Update = {}

    @property
    def base_rules(self) -> Rules:
        """As updates: the result has the same shape."""
        return self.rules()

    def start(self) -> Update:
        """What the first round begins with: a common A where nothing was learnt yet, else the adapter as it is."""
        own = self._factors.read(self._factors.name)
        return own if has_learnt(own) else _fresh(self._factors, self._seed, 0)

    def begin(self, base: Update, number: int) -> None:
        """All go on with the same adapter."""
        self._factors.activate(self._factors.name)
        self._factors.write(self._factors.name, base)
        self.base = base

    def update(self) -> Update:
        """The adapter as it is."""
        return self._factors.read(self._factors.name)

    current = update

    def rules(self) -> Rules:
        """The same rank and scale for all."""
        factors = self._factors
        return Rules(
            layout=factors.layout, linears=factors.linears, max_rank=factors.rank, is_rank_fixed=True,
            scale=factors.scale,
        )  # fmt: skip

    def combine(self, taken: Sequence[Taken]) -> Update:
        """The mean, cut to the rank."""
        updates, weights = _weighted(taken, self._settings, self.base)
        if self._settings.aggregate == "average":
            return averaged(updates, weights)
        return truncated(updates, weights, rank=self._factors.rank, scale=self._factors.scale)

    def after_warmup(self, learnt: Update) -> Update:
        """SLoRA's second stage begins with the SVD of the first."""
        return truncated([learnt], [1.0], rank=self._factors.rank, scale=self._factors.scale)


class Stacking:
    """An adapter that begins anew each round, beside all that was learnt before.

    Raises:
        InvalidRequest: its rank is over the run's limit: the others would refuse its updates.
    """

    def __init__(self, factors: LoraFactors, settings: FederatedSettings, seed: str):
        if factors.rank > settings.max_rank:
            raise InvalidRequest(f"the adapter has rank {factors.rank}, max_rank of the run is {settings.max_rank}")
        self._factors, self._settings, self._seed = factors, settings, seed
        self._shared = f"{factors.name}_shared"
        self.base: Update = {}

    @property
    def base_rules(self) -> Rules:
        """Any rank within the limit."""
        return self._rules(self._settings.max_rank, scale=1.0)

    def start(self) -> Update:
        """Nothing was learnt yet.

        Raises:
            InvalidRequest: the adapter has, and would be lost.
        """
        _refuse_learnt(self._factors, "aggregate = 'stack'")
        return {}

    def begin(self, base: Update, number: int) -> None:
        """Freeze what was learnt, and begin anew."""
        self._factors.activate(self._factors.name)
        frozen: tuple[str, ...] = ()
        if base:
            self._factors.add(self._shared, rank_of(base))
            self._factors.write(self._shared, padded(base, rank_of(base)))
            frozen = (self._shared,)
        self._factors.activate(self._factors.name, frozen)
        self._factors.write(self._factors.name, _fresh(self._factors, self._seed, number))
        self.base = base

    def update(self) -> Update:
        """What is new since the round began."""
        return self._factors.read(self._factors.name)

    def rules(self) -> Rules:
        """Clients may have ranks of their own, within the limit that all have alike."""
        return self._rules(self._settings.max_rank)

    def combine(self, taken: Sequence[Taken]) -> Update:
        """What was there, and the exact mean of what is new."""
        updates, weights = _weighted(taken, self._settings, None)
        if self.base:
            updates, weights = [self.base, *updates], [1.0, *weights]
        if sum(rank_of(update) for update in updates) > self._settings.max_rank:
            return truncated(updates, weights, rank=self._settings.max_rank)
        return stacked(updates, weights)

    def after_warmup(self, learnt: Update) -> Update:
        """What the first stage has learnt is exact here, if its rank is within the limit."""
        return truncated([learnt], [1.0], rank=min(rank_of(learnt), self._settings.max_rank))

    def current(self) -> Update:
        """Both parts stacked."""
        own = self.update()
        return stacked([self.base, own], [1.0, 1.0]) if self.base else own

    def _rules(self, max_rank: int, scale: float | None = None) -> Rules:
        return Rules(
            layout=self._factors.layout, linears=self._factors.linears, max_rank=max_rank, is_rank_fixed=False,
            scale=scale,
        )  # fmt: skip


class Warmup:
    """A few input columns of each linear, the same for all clients; B is trained, the selection A is not."""

    def __init__(self, factors: LoraFactors, settings: FederatedSettings, seed: str):
        self._factors, self._settings, self._seed = factors, settings, seed
        self._name = f"{factors.name}_warmup"
        self.base: Update = {}

    @property
    def base_rules(self) -> Rules:
        """As updates."""
        return self.rules()

    def start(self) -> Update:
        """The selection, and nothing learnt.

        Raises:
            InvalidRequest: the adapter has, and would be lost; or there are fewer columns than ranks.
        """
        _refuse_learnt(self._factors, "warmup_rounds")
        if self._settings.warmup_columns < self._factors.rank:
            raise InvalidRequest(
                f"warmup_columns is {self._settings.warmup_columns}, need at least the rank, {self._factors.rank}"
            )
        return self._selection()

    def _selection(self) -> Update:
        return _each(self._factors, self._nothing)

    def begin(self, base: Update, number: int) -> None:
        """The columns as all have them now."""
        if self._name not in self._factors.model.peft_config:
            self._factors.add(self._name, self._settings.warmup_columns)
        self._factors.activate(self._name, with_a=False)
        self._factors.write(self._name, base)
        self.base = base

    def end(self) -> None:
        """The second stage has an adapter of its own."""
        self._factors.remove(self._name)

    def update(self) -> Update:
        """The columns as they are."""
        return self._factors.read(self._name)

    current = update

    def rules(self) -> Rules:
        """Everybody has the same selection."""
        return Rules(
            layout=self._factors.layout, linears=self._factors.linears, max_rank=self._settings.warmup_columns,
            is_rank_fixed=True, scale=1.0, common_a=self._selection(),
        )  # fmt: skip

    def combine(self, taken: Sequence[Taken]) -> Update:
        """The mean of B."""
        return with_common_a(*_weighted(taken, self._settings, self.base))

    def _nothing(self, block: int, path: str) -> LinearDelta:
        num_inputs, num_outputs = self._factors.shape(block, path)
        columns = self._settings.warmup_columns
        if columns > num_inputs:
            raise InvalidRequest(f"warmup_columns is {columns}, block {block}, {path} has {num_inputs} inputs")
        a = selection(f"{self._seed} warm-up {block} {path}", columns, num_inputs)
        return LinearDelta(a_rI=a, b_Or=torch.zeros(num_outputs, columns))


def has_learnt(update: Update) -> bool:
    """Whether it changes anything."""
    linears = (linear for delta in update.values() for linear in delta.linears.values())
    return any(linear.b_Or is not None and bool(linear.b_Or.any()) for linear in linears)


def rank_of(update: Update) -> int:
    """The largest rank of a linear."""
    return max((linear.rank for delta in update.values() for linear in delta.linears.values()), default=0)


def _fresh(factors: LoraFactors, seed: str, number: int) -> Update:
    """A LoRA that has learnt nothing, with an A that all clients of this rank have."""

    def make(block: int, path: str) -> LinearDelta:
        num_inputs, num_outputs = factors.shape(block, path)
        a = common_a(f"{seed} round {number} {block} {path}", factors.rank, num_inputs)
        return LinearDelta(a_rI=a, b_Or=torch.zeros(num_outputs, factors.rank), scale=factors.scale)

    return _each(factors, make)


def _refuse_learnt(factors: LoraFactors, what: str) -> None:
    if has_learnt(factors.read(factors.name)):
        raise InvalidRequest(f"adapter {factors.name} has learnt something already, which {what} can't go on from")


def _weighted(
    taken: Sequence[Taken], settings: FederatedSettings, base: Update | None
) -> tuple[list[Update], list[float]]:
    """Updates and their parts of the mean; where some are clipped, the rest belongs to what all began with."""
    updates = [it.update for it in taken]
    numbers = [it.num_examples if settings.weighting == "examples" else 1 for it in taken]
    weights = weights_of(numbers)
    if settings.clip is None:
        return updates, weights
    weights = clipped(weights, [distance(update, base) for update in updates], settings.clip)
    rest = 1.0 - math.fsum(weights)
    return ([*updates, base], [*weights, rest]) if base is not None else (updates, weights)


def _each(factors: LoraFactors, make: Callable[[int, str], LinearDelta]) -> Update:
    return {
        block: BlockDelta(linears={path: make(block, path) for path in paths})
        for block, paths in sorted(factors.linears.items())
    }
