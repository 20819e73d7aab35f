"""Training on the device thread, with passes that compute nothing."""

from types import SimpleNamespace

import torch

from swarm.server.blocks.training_pass import Part
from swarm.server.lean import return_free_memory
from swarm.server.trainer import Trainer
from swarm.types import BlockRange

BLOCKS = BlockRange(0, 1)


class FakePass:
    """Whole sequences through one block that does nothing."""

    def __init__(self, parts, budget):
        self.parts, self.budget, self.is_kept = parts, budget, False
        self.outputs = tuple(part.hidden_states for part in parts)

    def forward(self, *, keep):
        if keep:
            self.budget.take(8)
            self.is_kept = True
        yield

    def release(self):
        if self.is_kept:
            self.budget.give_back(8)
            self.is_kept = False


def test_free_memory_is_returned_when_nothing_is_kept():
    """And not while something is, nor after every micro-batch."""
    trims = []
    span = SimpleNamespace(
        blocks=BLOCKS, device=torch.device("cpu"), training_pass=lambda blocks, parts, budget: FakePass(parts, budget)
    )
    trainer = Trainer(span, lambda tell: tell(), trim=lambda: trims.append(trainer.budget.used))
    told = []
    run = trainer.new_run("a", BLOCKS, told.append)
    trainer.open(run)

    def forth(number, *, keep):
        trainer.forth(run, number, Part(hidden_states=torch.zeros(2, 4), lengths=(2,)), keep=keep)
        while trainer.has_work:
            trainer.advance()

    forth(0, keep=True)
    assert not trims and told[-1].is_kept
    trainer.forget(run, [0])
    forth(1, keep=False)
    forth(2, keep=False)
    assert trims == [0]


def test_returning_memory_is_harmless():
    """Wherever it is called, and twice."""
    return_free_memory()
    return_free_memory()
