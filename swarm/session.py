"""The client's side of an inference session as a pure state machine: what to do next, whatever fails.

The blocks of a model are cut into hops, each run by one server. The client sends a step to the first hop; each hop
sends its outputs straight to the next, and the last one sends what is wanted back. Where two servers can't reach each
other, or pushing is off, the hop behind the gap is fed by the client instead.

    begin(step) ─► next_action ─► FindRoute | Open | Connect | Send | Wait | Done
                        ▲                           │
                        └── routed, opened, received, failed, link_down ◄── driver

Who feeds a hop keeps the history of its inputs (`swarm.link.Link`): the client for the hops that it feeds, a server for
the next one. So replacing a lost hop is: find a server, open it, and tell its feeder that it holds nothing.

The machine does no I/O and knows no clock: a driver carries out each action and reports what happened. Which error is
worth another try, how long to wait for one and whom to blame is the driver's policy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from swarm.errors import InvalidRequest, PeerMisbehaved
from swarm.history import RowHistory, join
from swarm.link import Link
from swarm.protocol import LinkFault
from swarm.rows import check_order
from swarm.step_chunk import StepChunk
from swarm.types import BlockRange


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """One server's part of a route."""

    peer_id: str
    blocks: BlockRange


@dataclass(frozen=True, slots=True, kw_only=True)
class FindRoute:
    """Find servers for these blocks and report them with `routed`."""

    blocks: BlockRange


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """Open a session with this server and report with `opened` or `failed`; see also `Session.pending_opens`."""

    link: int
    hop: Hop
    is_last: bool
    """Whether its outputs are the client's from the start; the outputs of any other wait for a `Connect`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Connect:
    """Tell the server of `link` that its outputs go to the server of link `target`, or (None) to the client.

    The other fields mean what they mean in `swarm.protocol.Forward`. Nothing is reported, unless the server says that
    it can't: `link_down`.
    """

    link: int
    epoch: int
    target: int | None
    held: tuple[int, ...]
    as_of: int
    max_step_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    """Send this chunk to the server of `link`. Nothing is reported, unless it fails: `failed`."""

    link: int
    hop: Hop
    chunk: StepChunk


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Everything is sent: wait for results or bad news."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The step is complete; `outputs` is [sum(num_outputs), hidden], row after row."""

    outputs: torch.Tensor


Action = FindRoute | Open | Connect | Send | Wait | Done

_CLIENT = -2
"""Where a server's outputs go when it was told to send them to the client."""
_NOWHERE = -3
"""Where they go when it was told nothing."""


@dataclass(slots=True, kw_only=True)
class _Part:
    """Consecutive blocks with one server, or none yet."""

    blocks: BlockRange
    feed: Link | None = None
    """The history of its inputs where the client feeds it; None where the hop before does."""
    hop: Hop | None = None
    link: int = -1
    is_open: bool = False
    is_replacement: bool = False
    """Whether these blocks had another server before."""
    came_in: int = 0
    """The step in which this server was found."""
    proven_from: int = 0
    """The first step whose results can't have come through the server before this one."""
    held: tuple[int, ...]
    """Tokens of each row that it surely holds, in the order of rows after step `Session._as_of`."""
    told: int = _NOWHERE
    epoch: int = -1
    max_step_tokens: int = 1 << 16
    can_rollback: bool = True

    def lose_server(self, step_id: int) -> None:
        if self.is_open:
            self.is_replacement, self.proven_from = True, step_id + 1
        self.hop, self.link, self.is_open, self.told, self.can_rollback = None, -1, False, _NOWHERE, True
        self.held = (0,) * len(self.held)
        if self.feed is not None:
            self.feed.disconnect()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """The step under way."""

    order: tuple[int, ...] | None
    base: tuple[int, ...]
    outputs_from: tuple[int, ...]
    """What the servers are asked for: at least the last output of each row that has new tokens, so that the last result
    proves that every hop holds everything."""
    num_outputs: tuple[int, ...]
    hidden_size: int
    results: list[RowHistory]

    def begin_at(self, feed: Link, step_id: int) -> None:
        """Begin the step on a link of the client's."""
        feed.begin(step_id, order=self.order, base=self.base, outputs_from=self.outputs_from)


class Session:
    """State of one inference session over `blocks`, for `batch_size` rows of at most `max_length` tokens.

    Call `begin` with a step, then carry out `next_action` until it is `Done`. After an exception that the driver raised
    out of a step, `abandon` makes the session ready to go on from where it was before that step.

    Args:
        blocks: all blocks of the model.
        batch_size: rows.
        max_length: most tokens in a row.
        push: whether servers send to each other; if not, everything goes through the client.
        adapter_of: which adapter each row uses; empty where none does.
    """

    def __init__(
        self,
        blocks: BlockRange,
        *,
        batch_size: int,
        max_length: int,
        push: bool = True,
        adapter_of: Sequence[int] = (),
    ):
        self.blocks = blocks
        self.batch_size = batch_size
        self.max_length = max_length
        self.num_replays = 0
        self.fallbacks: set[tuple[str, str]] = set()
        """Pairs of peers of which the first can't send to the second."""
        self._push, self._adapter_of = push, adapter_of
        self._nothing = (0,) * batch_size
        self._parts = [_Part(blocks=blocks, feed=Link(batch_size, to_client=False), held=self._nothing)]
        self._lengths = [0] * batch_size
        self._committed = self._nothing
        self._step_id = -1
        self._step: _Step | None = None
        self._next_link = 0
        self._next_epoch = 0

    # -- what it is ---------------------------------------------------------------------------------------------

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens in each row after the last step that was begun and not abandoned."""
        return tuple(self._lengths)

    @property
    def step_id(self) -> int:
        """The step under way, or the last one."""
        return self._step_id

    @property
    def route(self) -> tuple[Hop, ...]:
        """The hops in use, in order; blocks without a server are left out."""
        return tuple(part.hop for part in self._parts if part.hop is not None)

    @property
    def hops(self) -> dict[int, Hop]:
        """Links in use, in order, and where they lead; the driver closes all others."""
        return {part.link: part.hop for part in self._parts if part.hop is not None}

    @property
    def fed(self) -> tuple[tuple[int, ...] | None, ...]:
        """For each of `hops` the tokens of each row that are here for it; None where the hop before feeds it."""
        return tuple(None if part.feed is None else part.feed.lengths for part in self._parts if part.hop is not None)

    @property
    def num_pushes(self) -> int:
        """Hops that are fed by the hop before them."""
        return sum(part.feed is None for part in self._parts)

    @property
    def history_bytes(self) -> int:
        """Memory of what is kept for replays here."""
        return sum(part.feed.history_bytes for part in self._parts if part.feed is not None)

    @property
    def pending_opens(self) -> tuple[Open, ...]:
        """All sessions to open now; they may be opened at once."""
        last = self._parts[-1]
        return tuple(
            Open(link=part.link, hop=part.hop, is_last=part is last)
            for part in self._parts
            if part.hop is not None and not part.is_open
        )

    def __repr__(self) -> str:
        replays = f" | {self.num_replays} replayed" if self.num_replays else ""
        return f"<Session {len(self.route)} hops | position {max(self._lengths)}/{self.max_length}{replays}>"

    # -- events -------------------------------------------------------------------------------------------------

    def begin(
        self,
        hidden_states: torch.Tensor,
        *,
        positions: Sequence[int],
        num_tokens: Sequence[int],
        num_outputs: Sequence[int] | None = None,
        order: Sequence[int] | None = None,
    ) -> None:
        """Start a step.

        Args:
            hidden_states: [sum(num_tokens), hidden], inputs of the first block, row after row.
            positions: tokens that each row keeps; fewer than it has is a rollback.
            num_tokens: new tokens of each row, 0 allowed.
            num_outputs: how many trailing outputs of each row are wanted; all by default.
            order: for each row, which old row it continues (beam search); applied first.

        Raises:
            InvalidRequest: for lengths or an order that do not fit the session.
        """
        outputs = tuple(num_tokens if num_outputs is None else num_outputs)
        check_order(order, self._adapter_of)
        lengths = [self._lengths[old] for old in order] if order is not None else list(self._lengths)
        self._check_step(hidden_states, positions, num_tokens, outputs, lengths)
        base = tuple(positions)
        if any(length > position for length, position in zip(lengths, base, strict=True)):
            self._lose_each([part for part in self._parts if not part.can_rollback])
        self._lengths = [position + count for position, count in zip(base, num_tokens, strict=True)]
        asked = [max(wanted, min(count, 1)) for wanted, count in zip(outputs, num_tokens, strict=True)]
        outputs_from = tuple(length - count for length, count in zip(self._lengths, asked, strict=True))
        self._step_id += 1
        self._step = _Step(
            order=tuple(order) if order is not None else None,
            base=base,
            outputs_from=outputs_from,
            num_outputs=outputs,
            hidden_size=hidden_states.shape[1],
            results=[RowHistory() for _ in base],
        )
        for row, position in zip(self._step.results, outputs_from, strict=True):
            row.restart(position)
        for part in self._parts:
            if part.feed is not None:
                self._step.begin_at(part.feed, self._step_id)
        first = self._parts[0].feed
        assert first is not None
        for row_index, piece in enumerate(hidden_states.split_with_sizes(list(num_tokens))):
            first.append(row_index, base[row_index], piece)

    def next_action(self) -> Action:
        """What the driver has to do now.

        Raises:
            InvalidRequest: no step is under way.
        """
        if self._step is None:
            raise InvalidRequest("no step is under way")
        for part in self._parts:
            if part.hop is None:
                return FindRoute(blocks=part.blocks)
        if opens := self.pending_opens:
            return opens[0]
        for index in range(len(self._parts)):
            if (connect := self._connect(index)) is not None:
                return connect
        for part in self._parts:
            if part.feed is not None and (chunk := part.feed.next_chunk()) is not None:
                assert part.hop is not None
                return Send(link=part.link, hop=part.hop, chunk=chunk)
        if any(row.length < length for row, length in zip(self._step.results, self._lengths, strict=True)):
            return Wait()
        if not all(part.feed is None or part.feed.lengths == self.lengths for part in self._parts):
            return Wait()  # for the history of a hop that the client has begun to feed
        return self._finish(self._step)

    def routed(self, hops: Sequence[Hop]) -> None:
        """The driver found servers for the blocks of the last FindRoute.

        Raises:
            InvalidRequest: when the hops do not cover exactly those blocks in order.
        """
        index = next(i for i, part in enumerate(self._parts) if part.hop is None)
        gap = self._parts[index]
        edges = [gap.blocks.start, *(hop.blocks.end for hop in hops)]
        if edges[-1] != gap.blocks.end or [hop.blocks.start for hop in hops] != edges[:-1]:
            raise InvalidRequest(f"route {[str(hop.blocks) for hop in hops]} does not cover blocks {gap.blocks}")
        fresh = [
            _Part(
                blocks=hop.blocks,
                hop=hop,
                link=link,
                is_replacement=gap.is_replacement,
                came_in=self._step_id,
                proven_from=gap.proven_from,
                held=self._nothing,
            )
            for link, hop in enumerate(hops, self._next_link)
        ]
        self._next_link += len(fresh)
        fresh[0].feed = gap.feed
        self._parts[index : index + 1] = fresh
        for position in range(index, min(index + len(fresh) + 1, len(self._parts))):
            self._feed_if_needed(position)
        following = index + len(fresh)
        if following < len(self._parts) and self._can_push(following):
            self._parts[following].feed = None  # the new server before it has the history once it has caught up

    def opened(self, link: int, *, max_step_tokens: int, can_rollback: bool) -> None:
        """What the server of a new link said of itself."""
        part = self._find(link)
        if part is None:
            return
        part.is_open, part.max_step_tokens, part.can_rollback = True, max_step_tokens, can_rollback
        if part.feed is not None:
            part.feed.connect(held=part.held, as_of=self._as_of, max_step_tokens=max_step_tokens)

    def new_link(self) -> int:
        """A number for a link that may take the place of another; see `moved`."""
        self._next_link += 1
        return self._next_link - 1

    def moved(
        self,
        link: int,
        new_link: int,
        hop: Hop,
        *,
        max_step_tokens: int,
        can_rollback: bool,
        step_id: int,
        received: Sequence[int],
    ) -> bool:
        """The server of `link` has handed what it had to another one, where a session of the same blocks is open.

        Args:
            link: is in use no more.
            new_link: from `new_link`.
            hop: the other server.
            max_step_tokens, can_rollback: as in `opened`.
            step_id: the latest step that the other server has seen.
            received: tokens of each row that it has then.

        Returns:
            Whether it takes the place of the first; not when that has been lost meanwhile, or when it has less.
        """
        part = self._find(link)
        if part is None or not part.is_open or hop.blocks != part.blocks or not self._has(part, step_id, received):
            return False
        part.hop, part.link, part.told, part.epoch = hop, new_link, _NOWHERE, -1
        part.proven_from = self._step_id + 1  # results of the step under way may have come through the first
        part.max_step_tokens, part.can_rollback = max_step_tokens, can_rollback
        if part.feed is not None:
            part.feed.connect(held=part.held, as_of=self._as_of, max_step_tokens=max_step_tokens)
        index = self._parts.index(part)
        for position in range(index, min(index + 2, len(self._parts))):
            self._feed_if_needed(position)
        return True

    def received(
        self,
        link: int,
        *,
        step_id: int,
        positions: Sequence[int],
        num_tokens: Sequence[int],
        hidden_states: torch.Tensor,
    ) -> int:
        """The server of `link` sent outputs [sum(num_tokens), hidden]; those known already are skipped.

        Returns:
            How many tokens were new.

        Raises:
            PeerMisbehaved: nobody asked for them.
        """
        part, step = self._find(link), self._step
        if part is None or step is None or step_id != self._step_id:
            return 0
        following = self._parts.index(part) + 1
        target = self._parts[following].feed if following < len(self._parts) else None
        if following < len(self._parts) and target is None:
            return 0  # sent before the server was told to push
        lengths = target.lengths if target is not None else [row.length for row in step.results]
        peer_id = part.hop.peer_id if part.hop is not None else None
        shape, rows = tuple(hidden_states.shape), (len(positions), len(num_tokens))
        if rows != (self.batch_size, self.batch_size) or shape != (sum(num_tokens), step.hidden_size):
            raise PeerMisbehaved(f"outputs of shape {shape} for {rows[1]} rows", peer_id=peer_id)
        for row, (position, count, length) in enumerate(zip(positions, num_tokens, lengths, strict=True)):
            if count and (position > length or position + count > self._lengths[row]):
                raise PeerMisbehaved(
                    f"outputs of row {row} at {position}:{position + count}, expected {length}:{self._lengths[row]}",
                    peer_id=peer_id,
                )
        for row, piece in enumerate(hidden_states.split_with_sizes(list(num_tokens))):
            if num_tokens[row] and target is not None:
                target.append(row, positions[row], piece)
            elif num_tokens[row]:
                step.results[row].append(piece[step.results[row].length - positions[row] :])
        ends = [position + count if count else 0 for position, count in zip(positions, num_tokens, strict=True)]
        return sum(max(0, end - length) for end, length in zip(ends, lengths, strict=True))

    def failed(self, link: int) -> None:
        """The server of `link` is lost: its blocks need another, and a replay."""
        part = self._find(link)
        if part is None:
            return
        if part.is_open and any(self._committed):
            self.num_replays += 1
        self._lose(self._parts.index(part))

    def link_down(self, link: int, epoch: int, fault: LinkFault) -> None:
        """The server of `link` can't send on, though it lives, and so does the next one."""
        part = self._find(link)
        if part is None or epoch != part.epoch:
            return
        index = self._parts.index(part)
        if fault is LinkFault.HISTORY_LOST:
            return self.failed(link)  # a server that can't feed the next one is of no use
        following = self._parts[index + 1] if index + 1 < len(self._parts) else None
        if following is not None and following.hop is not None and part.told == following.link:
            assert part.hop is not None
            self.fallbacks.add((part.hop.peer_id, following.hop.peer_id))
            self._feed_if_needed(index + 1)

    def abandon(self) -> None:
        """The driver gave up in the middle of a step (cancelled, out of time), which counts as never begun.

        Only a step that permuted rows can't be undone: the session is then empty.
        """
        step, self._step = self._step, None
        if step is None:
            return
        kept = step.base if step.order is None else self._nothing
        self._committed = tuple(map(min, self._committed, kept))
        for part in self._parts:
            part.held = tuple(map(min, part.held, kept))
        self._lose_each([part for part in self._parts if not part.can_rollback])
        self._lose_each([before for before, part in pairwise(self._parts) if self._lacks_history(part)])
        self._lengths = list(self._committed)

    # -- helpers ------------------------------------------------------------------------------------------------

    @property
    def _as_of(self) -> int:
        """The step after which the servers hold `_committed`."""
        return self._step_id if self._step is None else self._step_id - 1

    def _has(self, part: _Part, step_id: int, received: Sequence[int]) -> bool:
        """Whether a server that has so much has all that the hop's server surely held."""
        step = self._step
        held = part.held if step is None or step_id < self._step_id else self._translated(part.held, step)
        return len(received) == len(held) and all(has >= least for has, least in zip(received, held, strict=True))

    def _lacks_history(self, part: _Part) -> bool:
        """Whether the client feeds a hop, and what it has not received of that hop's history is on the way, or lost."""
        return part.feed is not None and any(a < b for a, b in zip(part.feed.lengths, self._committed, strict=True))

    def _finish(self, step: _Step) -> Done:
        self._committed, self._step = tuple(self._lengths), None
        for part in self._parts:
            part.held = self._proven(part, step)
        pieces: list[torch.Tensor] = []
        for row, length, wanted in zip(step.results, self._lengths, step.num_outputs, strict=True):
            pieces += row.slice(length - wanted, length)
        return Done(outputs=join(pieces))

    def _proven(self, part: _Part, step: _Step) -> tuple[int, ...]:
        """What a server surely holds after a step: all of each row whose results of this step came through it."""
        held = self._translated(part.held, step)
        if part.proven_from > self._step_id:
            return held
        return tuple(
            length if length > base else count
            for count, base, length in zip(held, step.base, self._lengths, strict=True)
        )

    def _translated(self, held: tuple[int, ...], step: _Step) -> tuple[int, ...]:
        """What a server holds once it has applied a step's order and rollback."""
        ordered = held if step.order is None else tuple(held[old] for old in step.order)
        return tuple(map(min, ordered, step.base))

    def _connect(self, index: int) -> Connect | None:
        """What the server of a hop has not been told yet of where its outputs go."""
        part = self._parts[index]
        if index + 1 == len(self._parts):
            return None
        following = self._parts[index + 1]
        target = following.link if following.feed is None else _CLIENT
        step = self._step
        if part.told == target or step is None:
            return None
        part.told, part.epoch = target, self._next_epoch
        self._next_epoch += 1
        if following.feed is not None:
            held, as_of = following.feed.lengths, self._step_id
        elif following.can_rollback:
            held, as_of = following.held, self._as_of
        else:  # it must not see what this step rolls back, so nothing may be sent to it before this step
            held, as_of = self._translated(following.held, step), self._step_id
        return Connect(
            link=part.link,
            epoch=part.epoch,
            target=None if target == _CLIENT else target,
            held=held,
            as_of=as_of,
            max_step_tokens=following.max_step_tokens,
        )

    def _can_push(self, index: int) -> bool:
        """Whether the hop before may feed this one, as far as is known."""
        before, part = self._parts[index - 1].hop, self._parts[index].hop
        pair = (before.peer_id, part.peer_id) if before is not None and part is not None else None
        return self._push and index > 0 and pair not in self.fallbacks

    def _feed_if_needed(self, index: int) -> None:
        """Let the client feed a hop that the one before it can't push to."""
        part = self._parts[index]
        if part.feed is not None or self._can_push(index):
            return
        part.feed = Link(self.batch_size, to_client=False)
        if self._step is not None:
            self._step.begin_at(part.feed, self._step_id)
        if part.is_open:
            part.feed.connect(held=part.held, as_of=self._as_of, max_step_tokens=part.max_step_tokens)

    def _lose(self, index: int) -> None:
        """A hop has no server any more; neighbours without one become one gap with it."""
        self._parts[index].lose_server(self._step_id)
        while index and self._parts[index - 1].hop is None:
            index -= 1
        while index + 1 < len(self._parts) and self._parts[index + 1].hop is None:
            gone = self._parts.pop(index + 1)
            part = self._parts[index]
            part.blocks = BlockRange(part.blocks.start, gone.blocks.end)
            part.is_replacement |= gone.is_replacement
            part.proven_from = max(part.proven_from, gone.proven_from)

    def _lose_each(self, parts: Sequence[_Part]) -> None:
        for link in [part.link for part in parts if part.hop is not None]:
            if (part := self._find(link)) is not None:
                self._lose(self._parts.index(part))

    def _find(self, link: int) -> _Part | None:
        """The hop of a link; None for one that is not in use any more."""
        return next((part for part in self._parts if part.link == link and part.hop is not None), None)

    def _check_step(
        self,
        hidden_states: torch.Tensor,
        positions: Sequence[int],
        num_tokens: Sequence[int],
        num_outputs: Sequence[int],
        lengths: Sequence[int],
    ) -> None:
        if self._step is not None:
            raise InvalidRequest("a step is under way")
        rows = {self.batch_size, len(positions), len(num_tokens), len(num_outputs), len(lengths)}
        if len(rows) != 1:
            raise InvalidRequest(f"the session has {self.batch_size} rows, the step speaks of {sorted(rows)}")
        if hidden_states.ndim != 2 or len(hidden_states) != sum(num_tokens) or not sum(num_outputs):
            shape = tuple(hidden_states.shape)
            raise InvalidRequest(f"need hidden states of {sum(num_tokens)} tokens and some output, got shape {shape}")
        for row, (position, count, wanted, length) in enumerate(
            zip(positions, num_tokens, num_outputs, lengths, strict=True)
        ):
            if not 0 <= position <= length:
                raise InvalidRequest(f"row {row} holds {length} tokens, cannot continue at position {position}")
            if not 0 <= wanted <= count or position + count > self.max_length:
                raise InvalidRequest(
                    f"row {row}: {count} tokens ({wanted} outputs) at {position}, session limit {self.max_length}"
                )
