"""The step that a session is doing: what its results must look like, its clocks, and what each hop had of the time.

    sent, answered ─► RunningStep ─► timings          on_time, late, stuck: `swarm.client.deadlines`
    StepResult ─────► outputs(...) ─► hidden states, or PeerMisbehaved

Knows nothing of streams; servers are known by their link.
"""

from collections.abc import Mapping
from math import inf

import torch

from swarm.client.deadlines import Patience, Watch
from swarm.client.progress import Progress, StepShape, progress_of
from swarm.client.timings import HopTiming, attribute
from swarm.codec import decode_tensor
from swarm.errors import PeerMisbehaved, SwarmError
from swarm.protocol import HopTrace, ProbeResult, StepResult
from swarm.types import Hop


class RunningStep:
    """State of one step.

    Args:
        shape: what it does to the rows.
        hidden_states: its inputs; results are of the same type and width.
        now: the time in seconds, as in all methods.
        watch: notices when it is late.
        patience: says when to give up.
    """

    def __init__(self, shape: StepShape, hidden_states: torch.Tensor, *, now: float, watch: Watch, patience: Patience):
        self.shape, self.started = shape, now
        self.watch, self.patience = watch, patience
        self.error: SwarmError | None = None
        """Why the step must end."""
        self.trouble: SwarmError | None = None
        """The last failure, or None."""
        self.has_moved = False
        """Whether a hop has gone to another server meanwhile."""
        self._width, self._dtype = hidden_states.shape[1], hidden_states.dtype
        self._sent: dict[int, tuple[float, int]] = {}
        self._answers: dict[int, tuple[tuple[HopTrace, ...], float]] = {}
        self._num_received: dict[int, int] = {}
        self._progress: dict[int, Progress] = {}
        self._stands_since = inf

    @property
    def num_tokens(self) -> int:
        """New tokens of all rows."""
        return sum(self.shape.num_tokens)

    def is_fed(self, link: int) -> bool:
        """Whether the client has sent tokens of this step to this link's server."""
        return link in self._sent

    # -- events -------------------------------------------------------------------------------------------------

    def sent(self, link: int, now: float) -> None:
        """The client sent tokens to a server."""
        self._sent[link] = now, self._sent.get(link, (now, 0))[1] + 1

    def outputs(self, message: StepResult, body: memoryview, peer_id: str) -> torch.Tensor:
        """The hidden states of a result, if they can be what was asked for.

        Raises:
            PeerMisbehaved: they can't.
        """
        spec, expected = message.hidden_states, (sum(message.num_tokens), self._width)
        if message.step_id > self.shape.step_id:
            raise PeerMisbehaved(f"result of step {message.step_id}, not begun yet", peer_id=peer_id)
        if spec.shape != expected:
            raise PeerMisbehaved(f"outputs of shape {spec.shape}, expected {expected}", peer_id=peer_id)
        outputs = decode_tensor(spec, body)
        if outputs.dtype != self._dtype:
            raise PeerMisbehaved(f"outputs in {outputs.dtype}, expected {self._dtype}", peer_id=peer_id)
        return outputs

    def answered(self, link: int, message: StepResult, now: float, *, num_new: int) -> bool:
        """Outputs came; whether that counts as progress, which more tokens than there are don't.

        Outputs that are known already are progress of a server that catches up, but forgive no failures: one that fails
        at the same token again and again sends those before it each time.
        """
        self._answers[link] = message.trace, now
        count = sum(message.num_tokens)
        total = self._num_received[link] = self._num_received.get(link, 0) + count
        if not count or total > sum(self.shape.base) + self.num_tokens:
            return False
        self.watch.heard(now)
        if num_new:
            self.patience.progressed()
        else:
            self.patience.advanced(now)
        return True

    def redirected(self, link: int) -> None:
        """A server was told anew where to send its outputs, and may send some of them again."""
        self._num_received.pop(link, None)

    def probed(self, link: int, message: ProbeResult, now: float) -> None:
        """A server said how far it is.

        Raises:
            PeerMisbehaved: about something else than this session.
        """
        progress = progress_of(message, self.shape)
        is_beyond = progress.is_beyond(self.progress(link))
        if message.is_waiting or is_beyond:
            self._progress[link] = progress
            self.watch.advanced(now)
        if message.is_waiting:
            self.patience.waits(now)
        elif is_beyond:
            self.patience.advanced(now)

    def progress(self, link: int) -> Progress:
        """The furthest that a server has said it is."""
        return self._progress.get(link, Progress())

    def may_stand_still(self, now: float, limit_s: float) -> bool:
        """Whether it may go on to stand still for a hop that moves: for so long in all, whoever moves how often."""
        self._stands_since = min(self._stands_since, now)
        return now < self._stands_since + limit_s

    # -- afterwards ---------------------------------------------------------------------------------------------

    def timings(self, hops: Mapping[int, Hop]) -> tuple[HopTiming, ...]:
        """What each hop that answered had of the time since it, or the first of those that it ends, was sent to."""
        found: list[HopTiming] = []
        segment: list[Hop] = []
        started = self.started
        for link, hop in hops.items():
            if link in self._sent:
                segment, started = [], self._sent[link][0]
            segment.append(hop)
            if link in self._answers:
                trace, at = self._answers[link]
                found += attribute(segment, trace, total_s=max(0.0, at - started), num_tokens=self.num_tokens)
        return tuple(found)

    @property
    def is_plain(self) -> bool:
        """Whether nothing failed, moved or was cut into chunks, so that the times say what a hop costs."""
        return self.trouble is None and not self.has_moved and all(count == 1 for _, count in self._sent.values())
