"""One training run on a server: what its client forgets holds nobody up."""

from types import SimpleNamespace

from swarm.protocol import OpenTraining, TrainForget
from swarm.server.limits import TrainingLimits
from swarm.server.training_run import ServedTraining


async def test_micro_batches_that_are_forgotten_in_the_queue_take_no_room():
    """Nothing is ever told of them, so a run would wait for their room for good, and keep its place."""
    trainer = SimpleNamespace(new_run=lambda *_: object())
    executor = SimpleNamespace(span=SimpleNamespace(hidden_size=8), trainer=trainer, train=lambda command: None)
    stream = SimpleNamespace(account="a")
    opened = OpenTraining(push_key=bytes(16), model="0" * 64, start=0, end=1)
    run = ServedTraining(stream, opened, executor=executor, open_push=None, limits=TrainingLimits())
    run._pending = {3: 1 << 30, 4: 5}
    run._forget(TrainForget(micro_batches=(3,), versions=()))
    assert run._pending == {4: 5}
