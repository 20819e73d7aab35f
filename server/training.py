"""Training as a service: who may train here, and the runs that are open.

    Stream ──OpenTraining──► TrainingDesk: check, admit ─► ServedTraining, until its client ends it

Knows nothing of micro-batches: `server.training_run` has one run.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial

from swarm.errors import CheckpointMismatch, InvalidRequest, PeerBusy
from swarm.protocol import OpenTraining
from swarm.server.executor import Executor
from swarm.server.limits import TrainingLimits
from swarm.server.push import PushDesk
from swarm.server.training_run import ServedTraining
from swarm.transport import Stream
from swarm.types import ServerState


class TrainingDesk:
    """Admits runs.

    Args:
        executor: runs the blocks.
        pushes: leads to other servers, and others to our runs.
        model: content digest of the checkpoint.
        model_name: what people call it.
        state: of the server, now.
        limits: what to refuse.
    """

    def __init__(
        self,
        executor: Executor,
        pushes: PushDesk,
        *,
        model: str,
        model_name: str,
        state: Callable[[], ServerState] = lambda: ServerState.ONLINE,
        limits: TrainingLimits | None = None,
    ):
        self._state = state
        self._executor, self._pushes, self._model, self._model_name = executor, pushes, model, model_name
        self._limits = limits or TrainingLimits()
        self._runs_of: Counter[str] = Counter()
        self._runs: set[ServedTraining] = set()

    @property
    def num_runs(self) -> int:
        """Runs that are open."""
        return self._runs_of.total()

    async def serve(self, stream: Stream) -> None:
        """Serve one run until its client ends it, errs or falls silent; all that it had is freed in every case."""
        message, _ = await stream.receive(timeout_s=self._limits.open_timeout_s)
        if not isinstance(message, OpenTraining):
            raise InvalidRequest(f"expected OpenTraining, got {type(message).__name__}")
        self._admit(message, stream.account)
        self._pushes.check(message.push_key)
        open_push = partial(self._pushes.open, client=stream.account)
        run = ServedTraining(stream, message, executor=self._executor, open_push=open_push, limits=self._limits)
        self._runs_of[stream.account] += 1
        self._runs.add(run)
        self._pushes.add(message.push_key, run)
        try:
            await run.run()
        finally:
            self._pushes.remove(message.push_key)
            self._runs.discard(run)
            self._runs_of[stream.account] -= 1
            if not self._runs_of[stream.account]:
                del self._runs_of[stream.account]

    def drain(self) -> None:
        """End all runs: their clients do elsewhere what they have not got from here."""
        for run in list(self._runs):
            run.end(PeerBusy(f"the server is {self._state().name}", retry_after_s=60.0))

    def _admit(self, message: OpenTraining, account: str) -> None:
        span, limits = self._executor.span, self._limits
        if not self._executor.trainer.budget.capacity:
            raise PeerBusy("this server takes no training", retry_after_s=3600.0)
        if message.model != self._model:
            raise CheckpointMismatch(
                f"this server runs {self._model_name} {self._model[:12]}, not {message.model[:12]}"
            )
        if not span.blocks.covers(message.blocks):
            raise PeerBusy(f"this server runs blocks {span.blocks}, not {message.blocks}", retry_after_s=60.0)
        if (state := self._state()) is not ServerState.ONLINE:
            raise PeerBusy(f"the server is {state.name}", retry_after_s=60.0)
        for count, limit in ((self.num_runs, limits.max_runs), (self._runs_of[account], limits.max_runs_per_peer)):
            if count >= limit:
                raise PeerBusy(f"{count} training runs are open, limit {limit}", retry_after_s=5.0)
