"""The chain of one session: which blocks have which server, who feeds it, and what it surely holds.

    fill, lose, replace ─► [Part, Part, ...] ─ redirect ─► Connect: where a server's outputs go
                             └─ feed: the client's Link to it, or None where the part before pushes

A server holds at least what `held` says: the last result of a step has come through every server, so each has all of
that step. A bound that is too low costs a repetition, never a wrong token. Pure; why a server is lost, and what is to
be done next, is `swarm.session`'s business.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from swarm.errors import InvalidRequest
from swarm.link import Link
from swarm.session_actions import Connect
from swarm.session_steps import Step, Steps
from swarm.types import BlockRange, Hop

_CLIENT = -2
"""Where a server's outputs go when it was told to send them to the client."""
_NOWHERE = -3
"""Where they go when it was told nothing."""


@dataclass(slots=True, kw_only=True, eq=False)
class Part:
    """Consecutive blocks with one server, or none yet."""

    blocks: BlockRange
    feed: Link | None = None
    """The history of its inputs where the client feeds it; None where the hop before does."""
    hop: Hop | None = None
    link: int = -1
    is_open: bool = False
    is_replacement: bool = False
    """Whether these blocks had another server before."""
    proven_from: int = 0
    """The first step whose results can't have come through the server before this one."""
    held: tuple[int, ...]
    """Tokens of each row that it surely holds, in the order of rows after step `Steps.as_of`."""
    told: int = _NOWHERE
    epoch: int = -1
    max_step_tokens: int = 1 << 16
    can_rollback: bool = True

    def opened(self, *, max_step_tokens: int, can_rollback: bool, as_of: int) -> None:
        """What its server said of itself."""
        self.is_open, self.max_step_tokens, self.can_rollback = True, max_step_tokens, can_rollback
        self.connect_feed(as_of)

    def connect_feed(self, as_of: int) -> None:
        """Let the client send, where it feeds this server, what the server may lack."""
        if self.feed is not None and self.is_open:
            self.feed.connect(held=self.held, as_of=as_of, max_step_tokens=self.max_step_tokens)

    def lose_server(self, step_id: int) -> None:
        """Go back to having none."""
        if self.is_open:
            self.is_replacement, self.proven_from = True, step_id + 1
        self.hop, self.link, self.is_open, self.told, self.can_rollback = None, -1, False, _NOWHERE, True
        self.held = (0,) * len(self.held)
        if self.feed is not None:
            self.feed.disconnect()

    def absorb(self, following: "Part") -> None:
        """Be one gap with the next part; neither has a server."""
        self.blocks = BlockRange(self.blocks.start, following.blocks.end)
        self.is_replacement |= following.is_replacement
        self.proven_from = max(self.proven_from, following.proven_from)


class Chain:
    """See the module. It begins as one gap.

    Args:
        blocks: all blocks of the model.
        steps: of the session.
        push: whether servers send to each other; if not, everything goes through the client.
    """

    def __init__(self, blocks: BlockRange, steps: Steps, *, push: bool):
        self.fallbacks: set[tuple[str, str]] = set()
        """Pairs of peers of which the first can't send to the second."""
        self._steps, self._push = steps, push
        self._nothing = (0,) * len(steps.lengths)
        self._first_feed = self._new_feed()
        self._parts = [Part(blocks=blocks, feed=self._first_feed, held=self._nothing)]
        self._next_link = self._next_epoch = 0

    def __iter__(self) -> Iterator[Part]:
        """The parts, in order."""
        return iter(self._parts)

    @property
    def first_feed(self) -> Link:
        """The client's own inputs: always fed by it."""
        return self._first_feed

    @property
    def last(self) -> Part:
        """Its outputs are the client's."""
        return self._parts[-1]

    def find(self, link: int) -> Part | None:
        """The part of a link; None for one that is not in use any more."""
        return next((part for part in self._parts if part.link == link and part.hop is not None), None)

    def following(self, part: Part) -> Part | None:
        """The part behind; None behind the last."""
        index = self._parts.index(part) + 1
        return self._parts[index] if index < len(self._parts) else None

    def new_link(self) -> int:
        """A number for a link that was never used."""
        self._next_link += 1
        return self._next_link - 1

    # -- servers that come and go -------------------------------------------------------------------------------

    def fill(self, hops: Sequence[Hop]) -> None:
        """The first gap gets these servers.

        Raises:
            InvalidRequest: when they do not cover exactly its blocks in order.
        """
        index = next(i for i, part in enumerate(self._parts) if part.hop is None)
        gap = self._parts[index]
        edges = [gap.blocks.start, *(hop.blocks.end for hop in hops)]
        if edges[-1] != gap.blocks.end or [hop.blocks.start for hop in hops] != edges[:-1]:
            raise InvalidRequest(f"route {[str(hop.blocks) for hop in hops]} does not cover blocks {gap.blocks}")
        fresh = [
            Part(
                blocks=hop.blocks,
                hop=hop,
                link=self.new_link(),
                is_replacement=gap.is_replacement,
                proven_from=gap.proven_from,
                held=self._nothing,
            )
            for hop in hops
        ]
        fresh[0].feed = gap.feed
        self._parts[index : index + 1] = fresh
        following = index + len(fresh)
        for part in self._parts[index : following + 1]:
            self.feed_if_needed(part)
        if following < len(self._parts) and self._can_push(following):
            self._parts[following].feed = None  # the new server before it has the history once it has caught up

    def replace(self, part: Part, hop: Hop, link: int, *, max_step_tokens: int, can_rollback: bool) -> None:
        """A part has another server, which has what the one before had."""
        part.hop, part.link, part.told, part.epoch = hop, link, _NOWHERE, -1
        part.proven_from = self._steps.step_id + 1  # results of the step under way may have come through the first
        part.opened(max_step_tokens=max_step_tokens, can_rollback=can_rollback, as_of=self._steps.as_of)
        self.feed_if_needed(part)
        if (following := self.following(part)) is not None:
            self.feed_if_needed(following)

    def lose(self, part: Part) -> None:
        """A part has no server any more; neighbours without one become one gap with it."""
        part.lose_server(self._steps.step_id)
        index = self._parts.index(part)
        while index and self._parts[index - 1].hop is None:
            index -= 1
        while index + 1 < len(self._parts) and self._parts[index + 1].hop is None:
            self._parts[index].absorb(self._parts.pop(index + 1))

    def lose_those_that_cannot_roll_back(self) -> None:
        """Tokens are taken back, which some servers must not have seen then."""
        self._lose_each([part for part in self._parts if not part.can_rollback])

    def lose_those_that_feed_in_vain(self) -> None:
        """What the client has not received yet of a history that it takes over is on the way, or lost."""
        self._lose_each([before for before, part in pairwise(self._parts) if self._lacks_history(part)])

    def _lose_each(self, parts: Iterable[Part]) -> None:
        for link in [part.link for part in parts if part.hop is not None]:
            if (part := self.find(link)) is not None:
                self.lose(part)

    def _lacks_history(self, part: Part) -> bool:
        committed = self._steps.committed
        return part.feed is not None and any(a < b for a, b in zip(part.feed.lengths, committed, strict=True))

    # -- who feeds whom -----------------------------------------------------------------------------------------

    def redirect(self, step: Step) -> Connect | None:
        """What a server has not been told yet of where its outputs go, and counts as told from now on."""
        for part, following in pairwise(self._parts):
            if (connect := self._redirect(part, following, step)) is not None:
                return connect
        return None

    def _redirect(self, part: Part, following: Part, step: Step) -> Connect | None:
        target = following.link if following.feed is None else _CLIENT
        if part.told == target:
            return None
        part.told, part.epoch = target, self._next_epoch
        self._next_epoch += 1
        if following.feed is not None:
            held, as_of = following.feed.lengths, step.step_id
        elif following.can_rollback:
            held, as_of = following.held, self._steps.as_of
        else:  # it must not see what this step rolls back, so nothing may be sent to it before this step
            held, as_of = step.change.apply(following.held), step.step_id
        return Connect(
            link=part.link,
            epoch=part.epoch,
            target=None if target == _CLIENT else target,
            held=held,
            as_of=as_of,
            max_step_tokens=following.max_step_tokens,
        )

    def cannot_push(self, part: Part) -> None:
        """A server can't reach the next one, if that is still the one that it was told of."""
        following = self.following(part)
        if following is not None and following.hop is not None and part.told == following.link:
            assert part.hop is not None
            self.fallbacks.add((part.hop.peer_id, following.hop.peer_id))
            self.feed_if_needed(following)

    def feed_if_needed(self, part: Part) -> None:
        """Let the client feed a part that the one before it can't push to."""
        if part.feed is not None or self._can_push(self._parts.index(part)):
            return
        part.feed = self._new_feed()
        if self._steps.current is not None:
            self._steps.current.begin_at(part.feed)
        part.connect_feed(self._steps.as_of)

    def _can_push(self, index: int) -> bool:
        """Whether the hop before may feed this one, as far as is known."""
        before, part = self._parts[index - 1].hop, self._parts[index].hop
        pair = (before.peer_id, part.peer_id) if before is not None and part is not None else None
        return self._push and index > 0 and pair not in self.fallbacks

    def _new_feed(self) -> Link:
        return Link(len(self._nothing), to_client=False)

    # -- what servers hold --------------------------------------------------------------------------------------

    def begin(self, step: Step) -> None:
        """A new step, for all that the client feeds."""
        for part in self._parts:
            if part.feed is not None:
                step.begin_at(part.feed)

    def prove(self, step: Step) -> None:
        """The step is done: each row whose results came through a server is there as a whole."""
        for part in self._parts:
            held = step.change.apply(part.held)
            if part.proven_from <= step.step_id:
                rows = zip(held, step.change.base, step.lengths, strict=True)
                held = tuple(length if length > base else count for count, base, length in rows)
            part.held = held

    def forget(self, kept: Sequence[int]) -> None:
        """The step was given up, and leaves no more than this of each row."""
        for part in self._parts:
            part.held = tuple(map(min, part.held, kept))

    def has_all(self, part: Part, step_id: int, received: Sequence[int]) -> bool:
        """Whether somebody who has received so much by this step has all that a part's server surely holds."""
        step = self._steps.current
        held = part.held if step is None or step_id < step.step_id else step.change.apply(part.held)
        return len(received) == len(held) and all(has >= least for has, least in zip(received, held, strict=True))
