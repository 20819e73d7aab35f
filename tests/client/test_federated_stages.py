"""What a round's updates come to, stage by stage: weights, clipping, limits of rank, and what all begin with."""

from collections.abc import Sequence

import pytest
import torch

from swarm.adapters.delta import BlockDelta, LinearDelta
from swarm.adapters.layout import BlockShape, LinearShape, ModelLayout
from swarm.client.federated_stages import FederatedSettings, FixedRank, Stacking, Warmup, rank_of
from swarm.errors import InvalidRequest
from swarm.federated.aggregate import Update, distance
from swarm.federated.exchange import Taken

INPUTS, OUTPUTS, RANK = 8, 6, 2
SHAPE = BlockShape(
    hidden_size=INPUTS, linears={"q": LinearShape(num_inputs=INPUTS, num_outputs=OUTPUTS)}, kv_shape=None
)


class FakeFactors:
    """A model's LoRA adapters as numbers, without a model."""

    def __init__(self, rank: int = RANK):
        self.name, self.rank, self.scale = "default", rank, 2.0
        self.layout = ModelLayout(blocks_path="layers", blocks=(SHAPE, SHAPE))
        self.linears = {0: ["q"], 1: ["q"]}
        self.model = self
        self.peft_config: dict[str, int] = {}
        self.adapters: dict[str, Update] = {}
        self.active: tuple[str, ...] = ()
        self.add("default", rank)

    def shape(self, block: int, path: str) -> tuple[int, int]:
        return INPUTS, OUTPUTS

    def add(self, name: str, rank: int) -> None:
        self.peft_config[name] = rank
        scale = self.scale if name == self.name else 1.0
        empty = LinearDelta(a_rI=torch.ones(rank, INPUTS), b_Or=torch.zeros(OUTPUTS, rank), scale=scale)
        self.adapters[name] = {block: BlockDelta(linears={"q": empty}) for block in self.linears}

    def remove(self, name: str) -> None:
        self.peft_config.pop(name, None)

    def read(self, name: str) -> Update:
        return self.adapters[name]

    def write(self, name: str, update: Update) -> None:
        assert rank_of(update) == self.peft_config[name]
        self.adapters[name] = update

    def activate(self, trained: str, frozen: Sequence[str] = (), *, with_a: bool = True) -> None:
        self.active = (trained, *frozen)


def update(seed: int, *, size: float = 1.0, rank: int = RANK, a: torch.Tensor | None = None) -> Update:
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(rank, INPUTS, generator=generator) if a is None else a
    b = size * torch.randn(OUTPUTS, rank, generator=generator)
    return {block: BlockDelta(linears={"q": LinearDelta(a_rI=own, b_Or=b, scale=2.0)}) for block in (0, 1)}


def taken(updates: Sequence[Update], numbers: Sequence[int]) -> list[Taken]:
    return [
        Taken(peer_id=f"p{index}", num_examples=number, update=it)
        for index, (it, number) in enumerate(zip(updates, numbers, strict=True))
    ]


def product(update: Update) -> torch.Tensor:
    linear = update[1].linears["q"]
    return linear.scale * (linear.b_Or.double() @ linear.a_rI.double())


def begun(kind, settings: FederatedSettings, factors: FakeFactors | None = None):
    stage = kind(factors or FakeFactors(), settings, "run")
    stage.begin(stage.start(), 0)
    return stage


def best(exact: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(exact)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


@pytest.mark.parametrize(("weighting", "weights"), [("examples", (0.25, 0.75)), ("equal", (0.5, 0.5))])
def test_clients_count_by_examples_or_alike(weighting, weights):
    """A claim of many examples is worth nothing where all count alike."""
    updates = [update(1), update(2)]
    stage = begun(FixedRank, FederatedSettings(weighting=weighting))
    exact = sum(weight * product(it) for weight, it in zip(weights, updates, strict=True))
    torch.testing.assert_close(
        product(stage.combine(taken(updates, [10, 30]))), best(exact, RANK), rtol=1e-4, atol=1e-5
    )


def test_an_outlier_counts_as_if_it_had_gone_twice_the_median():
    """The rest of its weight belongs to what the round began with, which is nothing here."""
    updates = [update(1), update(2), update(3, size=1000.0)]
    stage = begun(FixedRank, FederatedSettings(clip=2.0))
    distances = [distance(it, stage.base) for it in updates]
    factor = 2 * sorted(distances)[1] / distances[2]
    assert factor < 0.01
    exact = (product(updates[0]) + product(updates[1]) + factor * product(updates[2])) / 3
    found = product(stage.combine(taken(updates, [1, 1, 1])))
    torch.testing.assert_close(found, best(exact, RANK), rtol=1e-4, atol=1e-5)


def test_a_fixed_rank_goes_on_with_the_size_of_a_that_training_begins_with():
    """Singular values are in B alone: rows of A have the norm that PEFT draws."""
    stage = begun(FixedRank, FederatedSettings())
    linear = stage.combine(taken([update(1, size=1e-3), update(2, size=1e-3)], [1, 1]))[0].linears["q"]
    torch.testing.assert_close(linear.a_rI.norm(dim=1), torch.full((RANK,), 3**-0.5))
    assert linear.scale == 2.0


def test_all_begin_alike_whatever_their_seeds():
    """A is drawn from the run's name; stacking draws another one each round."""
    one, other = (begun(FixedRank, FederatedSettings()).update() for _ in range(2))
    assert torch.equal(one[0].linears["q"].a_rI, other[0].linears["q"].a_rI)
    stage = begun(Stacking, FederatedSettings(aggregate="stack"))
    first = stage.update()[0].linears["q"].a_rI
    stage.begin({}, 1)
    assert not torch.equal(first, stage.update()[0].linears["q"].a_rI)


def test_stacking_is_exact_up_to_its_largest_rank():
    """Two rounds of two clients; the second goes beyond, and is cut as well as can be."""
    settings = FederatedSettings(aggregate="stack", max_rank=5)
    factors = FakeFactors()
    stage = begun(Stacking, settings, factors)
    rounds = [[update(1), update(2)], [update(3), update(4)]]
    exact = torch.zeros(OUTPUTS, INPUTS, dtype=torch.float64)
    for number, updates in enumerate(rounds):
        exact = exact + sum(product(it) for it in updates) / 2
        base = stage.combine(taken(updates, [1, 1]))
        torch.testing.assert_close(product(base), best(exact, 5), rtol=1e-4, atol=1e-4)
        stage.begin(base, number + 1)
        assert rank_of(base) == (4, 5)[number]
        assert factors.active == ("default", "default_shared")
    assert rank_of(stage.current()) == 5 + RANK


def test_clients_of_different_ranks_stack():
    """Each linear of the result has the sum of their ranks."""
    stage = begun(Stacking, FederatedSettings(aggregate="stack"))
    updates = [update(1, rank=1), update(2, rank=3)]
    base = stage.combine(taken(updates, [1, 1]))
    assert rank_of(base) == 4
    torch.testing.assert_close(product(base), sum(product(it) for it in updates) / 2, rtol=1e-5, atol=1e-5)


def test_ranks_over_the_runs_limit_are_refused_by_all_alike():
    """Whatever rank the client itself has; one that has more is told at once."""
    settings = FederatedSettings(aggregate="stack", max_rank=3)
    assert [begun(Stacking, settings, FakeFactors(rank)).rules().max_rank for rank in (1, 3)] == [3, 3]
    for more in (settings, FederatedSettings(aggregate="stack", max_rank=3, warmup_rounds=1)):
        with pytest.raises(InvalidRequest, match="rank 4, max_rank of the run is 3"):
            Stacking(FakeFactors(4), more, "run")


def test_a_warm_up_changes_the_same_columns_at_all_clients():
    """The mean is exact, and the adapter that follows begins with its SVD."""
    settings, factors = FederatedSettings(warmup_rounds=1, warmup_columns=3), FakeFactors()
    stage = begun(Warmup, settings, factors)
    selection = stage.base[1].linears["q"].a_rI
    assert torch.equal(selection, begun(Warmup, settings).base[1].linears["q"].a_rI)
    updates = [update(seed, rank=3, a=selection) for seed in (1, 2)]
    learnt = stage.combine(taken(updates, [1, 1]))
    exact = sum(product(it) for it in updates) / 2
    torch.testing.assert_close(product(learnt), exact, rtol=1e-5, atol=1e-5)
    assert int((exact != 0).any(0).sum()) == 3
    torch.testing.assert_close(
        product(FixedRank(factors, settings, "run").after_warmup(learnt)), best(exact, RANK), rtol=1e-4, atol=1e-5
    )
    stage.end()
    assert list(factors.peft_config) == ["default"]
