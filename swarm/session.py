"""The client's side of an inference session as a pure state machine: what to send next, whatever fails.

The blocks of a model are cut into segments, each run by one server through one link. A segment keeps its *history*:
every hidden state that entered it, row by row. A server that holds fewer tokens than the history has is behind, and
being behind is the only reason to send anything: a new token, a replay after a failure and a prompt in chunks are one
case.

    begin(step) ─► FindRoute ─routed()─► Send ─received()─► Send ... ─► Done(outputs)
                       ▲                   │
                       └──── failed() ─────┘     (the segment loses its server; its history stays)

The machine does no I/O and knows no clock: a driver carries out each action and reports what happened. Which error is
worth another try, how long to wait for one and whom to blame is the driver's policy.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from swarm.errors import InvalidRequest
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
class Send:
    """Send this step over link `link` (opening it when it is new) and report with `received` or `failed`.

    `positions`, `num_tokens`, `num_outputs` and `order` mean what they mean in `swarm.protocol.Step`; `hidden_states`
    is [sum(num_tokens), hidden], row after row, and the answer is [sum(num_outputs), hidden].
    """

    link: int
    hop: Hop
    positions: tuple[int, ...]
    num_tokens: tuple[int, ...]
    num_outputs: tuple[int, ...]
    order: tuple[int, ...] | None
    hidden_states: torch.Tensor
    is_replay: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The step is complete; `outputs` is [sum(num_outputs), hidden], row after row."""

    outputs: torch.Tensor


Action = FindRoute | Send | Done


class RowHistory:
    """The hidden states that one row has sent into one segment, as a list of pieces [n, hidden] that forks cheaply."""

    __slots__ = ("_pieces", "length")

    def __init__(self, pieces: Sequence[torch.Tensor] = (), length: int = 0):
        self._pieces = list(pieces)
        self.length = length

    def append(self, hidden_states: torch.Tensor) -> None:
        """Add the next hidden states [n, hidden]."""
        if len(hidden_states):
            self._pieces.append(hidden_states)
            self.length += len(hidden_states)

    def truncate(self, length: int) -> None:
        """Forget everything from position `length` on."""
        while self.length > length:
            last = self._pieces.pop()
            self.length -= len(last)
            if self.length < length:
                self.append(last[: length - self.length])

    def fork(self) -> "RowHistory":
        """An independent copy that shares the tensors."""
        return RowHistory(self._pieces, self.length)

    def slice(self, start: int, end: int) -> list[torch.Tensor]:
        """The pieces that hold positions [start, end), found from the end, where decoding looks."""
        found: list[torch.Tensor] = []
        piece_end = self.length
        for piece in reversed(self._pieces):
            if piece_end <= start:
                break
            piece_start = piece_end - len(piece)
            if piece_start < end:
                found.append(piece[max(start - piece_start, 0) : end - piece_start])
            piece_end = piece_start
        return found[::-1]


@dataclass(slots=True, kw_only=True)
class _Segment:
    """Consecutive blocks with one server, or none yet."""

    blocks: BlockRange
    history: list[RowHistory]
    held: list[int]
    hop: Hop | None = None
    link: int = -1
    order: tuple[int, ...] | None = None
    max_step_tokens: int = 1 << 16
    can_rollback: bool = True
    replay_until: list[int] = field(default_factory=list)

    @property
    def is_behind(self) -> bool:
        return any(row.length > held for row, held in zip(self.history, self.held, strict=True))

    def lose_server(self) -> None:
        self.hop, self.link, self.order = None, -1, None
        self.replay_until = list(self.held)
        self.held = [0] * len(self.held)

    def reorder(self, order: tuple[int, ...]) -> None:
        self.history = [self.history[old].fork() for old in order]
        self.replay_until = [self.replay_until[old] for old in order] if self.replay_until else []
        if self.hop is not None and any(self.held):
            self.order = order if self.order is None else tuple(self.order[old] for old in order)
        self.held = [self.held[old] for old in order]

    def truncate(self, positions: Sequence[int]) -> None:
        for history, position in zip(self.history, positions, strict=True):
            history.truncate(position)
        if any(held > position for held, position in zip(self.held, positions, strict=True)):
            if self.can_rollback:
                self.held = [min(held, position) for held, position in zip(self.held, positions, strict=True)]
            else:
                self.lose_server()


class Session:
    """State of one inference session over `blocks`, for `batch_size` rows of at most `max_length` tokens.

    Call `begin` with a step, then carry out the returned actions until `Done`. After an exception that the driver
    raised out of a step, `abandon` makes the session ready to go on from any position it has reached.
    """

    def __init__(self, blocks: BlockRange, *, batch_size: int, max_length: int):
        self.blocks = blocks
        self.batch_size = batch_size
        self.max_length = max_length
        self.num_replays = 0
        self._segments = [self._new_segment(blocks)]
        self._lengths = [0] * batch_size
        self._next_link = 0
        self._outputs: list[RowHistory] = []
        self._outputs_from: list[int] = []
        self._in_flight: Send | None = None

    # -- what it is ---------------------------------------------------------------------------------------------

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens in each row after the last completed step."""
        return tuple(self._lengths)

    @property
    def route(self) -> tuple[Hop, ...]:
        """The hops in use, in order; segments without a server are left out."""
        return tuple(segment.hop for segment in self._segments if segment.hop is not None)

    @property
    def hops(self) -> dict[int, Hop]:
        """Links in use and where they lead; the driver closes all others."""
        return {segment.link: segment.hop for segment in self._segments if segment.hop is not None}

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
    ) -> Action:
        """Start a step.

        Args:
            hidden_states: [sum(num_tokens), hidden], inputs of the first block, row after row.
            positions: tokens that each row keeps; fewer than it has is a rollback.
            num_tokens: new tokens of each row, 0 allowed.
            num_outputs: how many trailing outputs of each row are wanted; all by default.
            order: for each row, which old row it continues (beam search); applied first.

        Raises:
            InvalidRequest: for lengths that do not fit the session.
        """
        outputs = tuple(num_tokens if num_outputs is None else num_outputs)
        lengths = [self._lengths[old] for old in order] if order is not None else list(self._lengths)
        self._check_step(hidden_states, positions, num_tokens, outputs, lengths)
        for segment in self._segments:
            if order is not None:
                segment.reorder(tuple(order))
            segment.truncate(positions)
        for row, piece in enumerate(hidden_states.split(list(num_tokens))):
            self._segments[0].history[row].append(piece)
        self._lengths = [position + count for position, count in zip(positions, num_tokens, strict=True)]
        self._outputs = [RowHistory() for _ in num_tokens]
        self._outputs_from = [length - count for length, count in zip(self._lengths, outputs, strict=True)]
        return self._advance()

    def routed(self, hops: Sequence[Hop]) -> Action:
        """The driver found servers for the segment of the last FindRoute.

        Raises:
            InvalidRequest: when the hops do not cover exactly those blocks in order.
        """
        index = next(i for i, segment in enumerate(self._segments) if segment.hop is None)
        segment = self._segments[index]
        edges = [segment.blocks.start, *(hop.blocks.end for hop in hops)]
        if edges[-1] != segment.blocks.end or [hop.blocks.start for hop in hops] != edges[:-1]:
            raise InvalidRequest(f"route {[str(hop.blocks) for hop in hops]} does not cover blocks {segment.blocks}")
        fresh = [self._new_segment(hop.blocks) for hop in hops]
        fresh[0].history = segment.history
        for part, hop in zip(fresh, hops, strict=True):
            part.replay_until = segment.replay_until
            part.hop, part.link = hop, self._next_link
            self._next_link += 1
        self._segments[index : index + 1] = fresh
        return self._advance()

    def opened(self, link: int, *, max_step_tokens: int, can_rollback: bool) -> None:
        """What the server of a new link said of itself."""
        segment = self._segment_of(link)
        segment.max_step_tokens, segment.can_rollback = max_step_tokens, can_rollback

    def resend(self) -> Action:
        """The pending Send again, cut to what `opened` allows."""
        self._in_flight = None
        return self._advance()

    def received(self, link: int, outputs: torch.Tensor) -> Action:
        """The server of `link` answered the last Send with `outputs` [sum(num_outputs), hidden]."""
        sent = self._in_flight
        if sent is None or sent.link != link:
            raise InvalidRequest(f"nothing was sent over link {link}")
        index = self._index_of(link)
        segment = self._segments[index]
        segment.order = None
        segment.held = [held + count for held, count in zip(sent.positions, sent.num_tokens, strict=True)]
        for target, piece in zip(self._targets(index), outputs.split(list(sent.num_outputs)), strict=True):
            target.append(piece)
        self._in_flight = None
        return self._advance()

    def failed(self, link: int) -> Action:
        """The server of `link` is lost: its segment needs another, and a replay."""
        segment = self._segment_of(link)
        if any(segment.held):
            self.num_replays += 1
        segment.lose_server()
        self._in_flight = None
        return self._advance()

    def lose(self, link: int) -> None:
        """Give up a link between steps: it was never opened, or broke unnoticed."""
        self._segment_of(link).lose_server()

    def abandon(self) -> None:
        """The driver gave up in the middle of a step (cancelled, out of time): whatever was in flight is uncertain."""
        if self._in_flight is not None:
            self._segment_of(self._in_flight.link).lose_server()
            self._in_flight = None

    # -- helpers ------------------------------------------------------------------------------------------------

    def _advance(self) -> Action:
        for index, segment in enumerate(self._segments):
            if segment.hop is None:
                return FindRoute(blocks=segment.blocks)
            if segment.is_behind:
                self._in_flight = self._catch_up(index)
                return self._in_flight
        pieces = [piece for row in self._outputs for piece in row.slice(0, row.length)]
        return Done(outputs=pieces[0] if len(pieces) == 1 else torch.cat(pieces))

    def _catch_up(self, index: int) -> Send:
        """The next chunk that the segment's server lacks."""
        segment = self._segments[index]
        assert segment.hop is not None
        budget = segment.max_step_tokens
        num_tokens, num_outputs, pieces = [], [], []
        is_replay = False
        for row, (history, held, wanted) in enumerate(
            zip(segment.history, segment.held, self._wanted_from(index), strict=True)
        ):
            end = min(history.length, held + budget)
            budget -= end - held
            num_tokens.append(end - held)
            num_outputs.append(max(0, end - max(held, wanted)))
            pieces += history.slice(held, end)
            is_replay |= bool(segment.replay_until) and end > held and held < segment.replay_until[row]
        return Send(
            link=segment.link,
            hop=segment.hop,
            positions=tuple(segment.held),
            num_tokens=tuple(num_tokens),
            num_outputs=tuple(num_outputs),
            order=segment.order,
            hidden_states=pieces[0] if len(pieces) == 1 else torch.cat(pieces),
            is_replay=is_replay,
        )

    def _targets(self, index: int) -> list[RowHistory]:
        """Where the outputs of a segment go: into the next one's history, or into the step's result."""
        return self._segments[index + 1].history if index + 1 < len(self._segments) else self._outputs

    def _wanted_from(self, index: int) -> list[int]:
        """First position of each row whose output is still missing behind a segment."""
        lengths = [target.length for target in self._targets(index)]
        if index + 1 < len(self._segments):
            return lengths
        return [start + length for start, length in zip(self._outputs_from, lengths, strict=True)]

    def _segment_of(self, link: int) -> _Segment:
        return self._segments[self._index_of(link)]

    def _index_of(self, link: int) -> int:
        for index, segment in enumerate(self._segments):
            if segment.link == link and segment.hop is not None:
                return index
        raise InvalidRequest(f"link {link} is not part of this session")

    def _new_segment(self, blocks: BlockRange) -> _Segment:
        rows = self.batch_size
        return _Segment(blocks=blocks, history=[RowHistory() for _ in range(rows)], held=[0] * rows)

    def _check_step(
        self,
        hidden_states: torch.Tensor,
        positions: Sequence[int],
        num_tokens: Sequence[int],
        num_outputs: Sequence[int],
        lengths: Sequence[int],
    ) -> None:
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
