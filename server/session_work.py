"""What one session has on the device: its rows in the executor's cache, and the work on them that isn't done yet.

    Accepted ─ submit ─► Backlog, Work ─► Executor ─► Produced ─ done ─► steps whose outputs begin

Knows what was given to the executor, not what becomes of the outputs.
"""

from swarm.intake import Accepted
from swarm.protocol import OpenSession, TensorSpec
from swarm.server.backlog import Backlog, StepStart
from swarm.server.cache_image import CacheImage
from swarm.server.executor import Executor
from swarm.server.work import Produced, SessionListener, Work


class SessionWork:
    """See the module.

    Args:
        opened: blocks, rows and adapters.
        executor: runs the blocks.
        client: who pays.
        listener: is told by the executor what has run, or can't.
    """

    def __init__(self, opened: OpenSession, executor: Executor, *, client: str, listener: SessionListener):
        self.is_waiting = False
        """Whether it waits for room in the cache, as far as known."""
        self._opened, self._executor = opened, executor
        self._backlog = Backlog()
        self._cached = executor.open(
            opened.blocks,
            opened.batch_size,
            client=client,
            listener=listener,
            adapters=opened.row_adapters,
        )

    @property
    def num_tokens(self) -> int:
        """Tokens that are still to be run."""
        return self._backlog.num_tokens

    def submit(self, accepted: Accepted, spec: TensorSpec, received: tuple[int, ...]) -> None:
        """Give the executor what is new; a step that takes back all that is queued makes it drop that.

        Args:
            accepted: what is new.
            spec: how it came; its outputs travel in the same way.
            received: tokens of each row, with these.
        """
        base, start = accepted.base, None
        if base is not None:
            kept = self._backlog.take_back(accepted.step_id, accepted.order, base)
            if kept is not None:
                self._executor.drop_queued(self._cached)
                self.is_waiting = False
                base = kept
            start = StepStart(
                step_id=accepted.step_id,
                order=accepted.order,
                base=base,
                outputs_from=accepted.outputs_from,
                spec=spec,
            )
        work = Work(
            step_id=accepted.step_id,
            order=accepted.order,
            base=base,
            num_tokens=accepted.num_tokens,
            outputs_from=accepted.outputs_from if self._opened.is_last else (0,) * self._opened.batch_size,
            hidden_states=accepted.hidden_states,
        )
        starts = tuple(end - count for end, count in zip(received, work.num_tokens, strict=True))
        self._backlog.add(work, starts, start)
        self._executor.submit(self._cached, work)

    def is_void(self, step_id: int) -> bool:
        """Whether outputs of this step, or failures, do not count any more."""
        return self._backlog.is_void(step_id)

    def done(self, produced: Produced) -> list[StepStart]:
        """A batch has run; returns the steps whose outputs begin with it."""
        self.is_waiting = False
        return self._backlog.done(produced.step_id, produced.num_tokens)

    def adapters_ready(self) -> None:
        """The session's adapters are here: its work may run."""
        self._executor.adapters_ready(self._cached)

    async def save(self) -> CacheImage:
        """The rows, while nothing runs."""
        return await self._executor.take_image(self._cached)

    async def resume(self, image: CacheImage) -> None:
        """Have these rows, before anything has run."""
        await self._executor.put_image(self._cached, image)

    def close(self) -> None:
        """Free the rows, and forget the work."""
        self._executor.close(self._cached)
