"""The micro-batches of a training run on their way through a chain of servers, forth and back: who gets what next.

    add, go_back ─► Pipeline ─ next_action ─► Forward | Backward | Forget, to one hop of the chain
                       ▲
                       └── came_forth, came_back, lost_one, chain_lost        from the hops' answers

A micro-batch visits the hops in order and, when the gradients of its outputs are there, in reverse; several are under
way at once, so that all hops work. A hop that is linked to the next sends it what comes out by itself, and gets its
gradients from there: then its answers only say how far a micro-batch is, and may be overtaken by those of hops behind
it. The chain holds what a micro-batch needs for the way back, and nobody else does:
when a hop is lost, the whole chain is, and every micro-batch that is not done begins anew on the next chain, under a
new number. Nothing counts before a micro-batch has come all the way back, and then it counts once: answers to old
numbers are ignored. So a run with lost servers has the same gradients as one without.

Pure: no I/O, no clock, and tensors are only passed on: whatever the caller puts in. Hops are numbered from 0.
"""

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from swarm.errors import PeerMisbehaved


class State(Enum):
    """Where a micro-batch is."""

    WAITING = "has to begin"
    FORTH = "at a hop, on the way forth"
    HELD = "the chain holds it for the way back"
    BACK = "at a hop, on the way back"
    RESTING = "the chain knows nothing of it, and nothing is to be done"


@dataclass(eq=False, slots=True, kw_only=True)
class MicroBatch:
    """Some whole sequences of one call."""

    num_tokens: tuple[int, ...]
    version: int
    """Of the parameters; -1 for none."""
    inputs: Any
    wants_gradients: bool
    outputs: Any = None
    """None until they have come."""
    output_gradients: Any = None
    wants_inputs: bool = True
    """Whether the gradients of its inputs are wanted, besides those of the parameters."""
    input_gradients: Any = None
    """None until they have come."""
    parameter_gradients: dict[int, Any] = field(default_factory=dict)
    """By hop of the chain that it came back through; of some hops until it is back."""
    is_back: bool = False
    """Whether all gradients have come."""
    state: State = State.WAITING
    number: int = -1
    """Under which the chain knows it; another one each time that it begins."""
    hop: int = -1
    """Where it is, as far as is known; on the way back of linked hops the last one that was sent anything."""
    is_kept: bool = False
    """Whether all hops so far keep what the way back needs."""


class Forward(NamedTuple):
    """Send a micro-batch's hidden states to a hop."""

    hop: int
    micro: MicroBatch
    hidden_states: Any


class Backward(NamedTuple):
    """Send the gradients of a micro-batch's outputs at a hop to this hop."""

    hop: int
    micro: MicroBatch
    gradients: Any
    wants_inputs: bool


class Forget(NamedTuple):
    """Tell all hops that these numbers will not go back."""

    numbers: tuple[int, ...]


Action = Forward | Backward | Forget


class Pipeline:
    """See the module docstring."""

    def __init__(self) -> None:
        self.num_hops = 0
        """Of the chain; 0 while there is none."""
        self.links: frozenset[int] = frozenset()
        """Hops that are linked to the next one."""
        self.num_done = 0
        """Outputs and gradients that have come and counted: this is progress, and nothing else is."""
        self.num_restarts = 0
        """Times that a micro-batch had to go forth again."""
        self._next_number = 0
        self._waiting: deque[MicroBatch] = deque()
        self._known: dict[int, MicroBatch] = {}
        """By number, those that the chain has."""
        self._actions: deque[Action] = deque()

    @property
    def has_work(self) -> bool:
        """Whether anything is to be sent, or an answer is to come."""
        return bool(self._waiting or self._actions or self.hops_at_work)

    @property
    def is_empty(self) -> bool:
        """Whether there is no micro-batch that the chain has, or should get."""
        return not self._known and not self._waiting

    @property
    def hops_at_work(self) -> frozenset[int]:
        """Hops that are known to have something to do: whoever waits, waits for them."""
        return frozenset(self._at_work(it) for it in self._known.values() if it.state in (State.FORTH, State.BACK))

    def micro(self, number: int) -> MicroBatch | None:
        """The micro-batch that the chain knows by this number."""
        return self._known.get(number)

    # -- what the caller wants ----------------------------------------------------------------------------------

    def add(self, micros: Iterable[MicroBatch]) -> None:
        """Micro-batches that are to go forth."""
        self._waiting.extend(micros)

    def go_back(self, micros: Iterable[MicroBatch]) -> None:
        """Micro-batches whose outputs have come, and whose `output_gradients` are there now."""
        for micro in micros:
            micro.input_gradients, micro.parameter_gradients, micro.is_back = None, {}, False
            if micro.state is State.HELD:
                self._send_back(micro)
            elif micro.state is State.RESTING:
                self._begin_again(micro)

    def drop(self, micros: Iterable[MicroBatch]) -> None:
        """Micro-batches in which nobody is interested any more."""
        dropped = set(micros)
        self._waiting = deque(micro for micro in self._waiting if micro not in dropped)
        numbers = tuple(micro.number for micro in dropped if micro.number in self._known)
        self._actions = deque(it for it in self._actions if isinstance(it, Forget) or it.micro not in dropped)
        if numbers:
            self._actions.append(Forget(numbers))
        for micro in dropped:
            self._rest(micro)

    # -- what happens -------------------------------------------------------------------------------------------

    def chain_opened(self, num_hops: int, links: Collection[int] = ()) -> None:
        """There is a chain, which knows nothing yet.

        Args:
            num_hops: how long it is.
            links: hops that are linked to the next one.
        """
        self.num_hops, self.links = num_hops, frozenset(links)

    def chain_lost(self) -> None:
        """The chain is gone, with all that it held."""
        self.num_hops, self.links = 0, frozenset()
        self._actions.clear()
        lost = sorted(self._known.values(), key=lambda micro: -micro.number)
        for micro in lost:
            state = micro.state
            self._rest(micro)
            if state is not State.HELD:  # one that was held begins again when its gradients come
                self._begin_again(micro, first=True)

    def came_forth(self, hop: int, number: int, outputs: Any, *, is_kept: bool) -> bool:
        """A hop has run a micro-batch.

        Args:
            hop: which one.
            number: of the micro-batch.
            outputs: None where they went to the next hop.
            is_kept: whether it keeps what the way back needs; of linked hops, the last one speaks for all.

        Returns:
            False where it was not kept although its gradients wait for it: it will begin again.

        Raises:
            PeerMisbehaved: this hop was not asked to.
        """
        micro = self._find(number)
        if micro is None:
            return True
        if hop in self.links and outputs is None:
            if micro.state is State.FORTH and micro.hop <= hop:
                micro.hop = hop + 1
            return True
        is_expected = micro.state is State.FORTH and micro.hop <= hop and self._are_linked(micro.hop, hop)
        if not is_expected or hop in self.links or outputs is None:
            raise self._unexpected(hop, micro)
        micro.hop = hop
        micro.is_kept &= is_kept
        if hop + 1 < self.num_hops:
            micro.hop = hop + 1
            self._actions.append(Forward(hop + 1, micro, outputs))
            return True
        if micro.outputs is None:
            micro.outputs = outputs
            self.num_done += 1
        if micro.is_kept:
            micro.state = State.HELD
            if micro.output_gradients is not None:
                self._send_back(micro)
            return True
        if micro.wants_gradients:
            self._actions.append(Forget((number,)))  # some hops may have kept it
        self._rest(micro)
        if micro.output_gradients is None or not micro.wants_gradients:
            return True
        self._begin_again(micro)
        return False

    def came_back(self, hop: int, number: int, input_gradients: Any, parameter_gradients: Any) -> None:
        """A hop has found the gradients of a micro-batch.

        Args:
            hop: which one.
            number: of the micro-batch.
            input_gradients: None where they went to the hop before, or are not wanted.
            parameter_gradients: of its blocks.

        Raises:
            PeerMisbehaved: this hop was not asked to.
        """
        micro = self._find(number)
        if micro is None:
            return
        self._check_back(hop, micro)
        is_first_of_linked = hop - 1 not in self.links
        if (input_gradients is not None) != (is_first_of_linked and (hop > 0 or micro.wants_inputs)):
            raise self._unexpected(hop, micro)
        micro.parameter_gradients[hop] = parameter_gradients
        if is_first_of_linked and hop > 0:
            micro.hop = hop - 1
            self._actions.append(self._backward(micro, input_gradients))
        elif hop == 0:
            micro.input_gradients = input_gradients
        if len(micro.parameter_gradients) == self.num_hops:
            micro.is_back = True
            self.num_done += 1
            self._rest(micro)

    def lost_one(self, hop: int, number: int) -> None:
        """A hop does not keep a micro-batch any more: it begins again.

        Raises:
            PeerMisbehaved: this hop was not asked for it.
        """
        micro = self._find(number)
        if micro is not None:
            self._check_back(hop, micro)
            self._actions.append(Forget((number,)))
            self._rest(micro)
            self._begin_again(micro, first=True)

    def next_action(self) -> Action | None:
        """What to send now; None if an answer must come first, or there is no chain."""
        if not self.num_hops:
            return None
        if self._actions:
            return self._actions.popleft()
        num_under_way = sum(micro.state is not State.HELD for micro in self._known.values())
        if not self._waiting or num_under_way >= 2 * self.num_hops + 2:
            return None
        micro = self._waiting.popleft()
        micro.state, micro.number, micro.hop, micro.is_kept = State.FORTH, self._next_number, 0, micro.wants_gradients
        self._known[micro.number] = micro
        self._next_number += 1
        return Forward(0, micro, micro.inputs)

    # -- details ------------------------------------------------------------------------------------------------

    def _send_back(self, micro: MicroBatch) -> None:
        micro.state, micro.hop, micro.parameter_gradients = State.BACK, self.num_hops - 1, {}
        self._actions.append(self._backward(micro, micro.output_gradients))

    def _backward(self, micro: MicroBatch, gradients: Any) -> Backward:
        is_last_leg = self._are_linked(0, micro.hop)
        return Backward(micro.hop, micro, gradients, micro.wants_inputs or not is_last_leg)

    def _begin_again(self, micro: MicroBatch, *, first: bool = False) -> None:
        self.num_restarts += 1
        micro.state, micro.parameter_gradients = State.WAITING, {}
        (self._waiting.appendleft if first else self._waiting.append)(micro)

    def _rest(self, micro: MicroBatch) -> None:
        self._known.pop(micro.number, None)
        micro.state, micro.hop, micro.is_kept = State.RESTING, -1, False

    def _find(self, number: int) -> MicroBatch | None:
        """The micro-batch of a number; None for one that nobody waits for.

        Raises:
            PeerMisbehaved: there was none.
        """
        micro = self._known.get(number)
        if micro is None and not 0 <= number < self._next_number:
            raise PeerMisbehaved(f"an answer for micro-batch {number}, of {self._next_number} that were sent")
        return micro

    def _are_linked(self, first: int, last: int) -> bool:
        """Whether each of these hops but the last is linked to the next."""
        return all(hop in self.links for hop in range(first, last))

    def _check_back(self, hop: int, micro: MicroBatch) -> None:
        """Refuse an answer on the way back of a hop that has no gradients, or has answered."""
        was_reached = hop > micro.hop or self._are_linked(hop, micro.hop)
        if micro.state is not State.BACK or not was_reached or hop in micro.parameter_gradients:
            raise self._unexpected(hop, micro)

    def _at_work(self, micro: MicroBatch) -> int:
        """The hop that has this micro-batch; of linked ones on the way back, the last that has not answered."""
        if micro.state is State.FORTH:
            return micro.hop
        return max(hop for hop in range(self.num_hops) if hop not in micro.parameter_gradients)

    @staticmethod
    def _unexpected(hop: int, micro: MicroBatch) -> PeerMisbehaved:
        return PeerMisbehaved(
            f"hop {hop} answers for micro-batch {micro.number}, which is {micro.state.value} {micro.hop}"
        )
