"""The client's side of an inference session as a pure state machine: what to do next, whatever fails.

The blocks of a model are cut into hops, each run by one server. The client sends a step to the first hop; each hop
sends its outputs straight to the next, and the last one sends what is wanted back. Where two servers can't reach each
other, or pushing is off, the hop behind the gap is fed by the client instead.

    begin(step) ─► next_action ─► FindRoute | Open | Connect | Send | Wait | Done  (`swarm.session_actions`)
                        ▲                           │
                        └── routed, opened, received, failed, link_down ◄── driver

Who feeds a hop keeps the history of its inputs (`swarm.link.Link`): the client for the hops that it feeds, a server for
the next one. So replacing a lost hop is: find a server, open it, and tell its feeder that it holds nothing. Which hop
has which server and holds what is kept in `swarm.session_chain`, what a step does to the rows in `swarm.session_steps`.

The machine does no I/O and knows no clock: a driver carries out each action and reports what happened. Which error is
worth another try, how long to wait for one and whom to blame is the driver's policy.
"""

from collections.abc import Sequence

import torch

from swarm.errors import InvalidRequest
from swarm.protocol import LinkFault
from swarm.rows import RowChange
from swarm.session_actions import Action, Done, FindRoute, Open, Send, Wait
from swarm.session_chain import Chain
from swarm.session_steps import Step, Steps
from swarm.types import BlockRange, Hop


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
        self._steps = Steps(batch_size, max_length=max_length, adapter_of=adapter_of)
        self._chain = Chain(blocks, self._steps, push=push)

    # -- what it is ---------------------------------------------------------------------------------------------

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens in each row after the last step that was begun and not abandoned."""
        return self._steps.lengths

    @property
    def step_id(self) -> int:
        """The step under way, or the last one."""
        return self._steps.step_id

    @property
    def fallbacks(self) -> set[tuple[str, str]]:
        """Pairs of peers of which the first can't send to the second; the driver may add some."""
        return self._chain.fallbacks

    @property
    def route(self) -> tuple[Hop, ...]:
        """The hops in use, in order; blocks without a server are left out."""
        return tuple(part.hop for part in self._chain if part.hop is not None)

    @property
    def hops(self) -> dict[int, Hop]:
        """Links in use, in order, and where they lead; the driver closes all others."""
        return {part.link: part.hop for part in self._chain if part.hop is not None}

    @property
    def fed(self) -> tuple[tuple[int, ...] | None, ...]:
        """For each of `hops` the tokens of each row that are here for it; None where the hop before feeds it."""
        return tuple(None if part.feed is None else part.feed.lengths for part in self._chain if part.hop is not None)

    @property
    def num_pushes(self) -> int:
        """Hops that are fed by the hop before them."""
        return sum(part.feed is None for part in self._chain)

    @property
    def history_bytes(self) -> int:
        """Memory of what is kept for replays here."""
        return sum(part.feed.history_bytes for part in self._chain if part.feed is not None)

    @property
    def pending_opens(self) -> tuple[Open, ...]:
        """All sessions to open now; they may be opened at once."""
        return tuple(
            Open(link=part.link, hop=part.hop, is_last=part is self._chain.last)
            for part in self._chain
            if part.hop is not None and not part.is_open
        )

    def __repr__(self) -> str:
        replays = f" | {self.num_replays} replayed" if self.num_replays else ""
        return f"<Session {len(self.route)} hops | position {max(self.lengths)}/{self.max_length}{replays}>"

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
        outputs = num_tokens if num_outputs is None else num_outputs
        change = RowChange(tuple(order) if order is not None else None, tuple(positions))
        self._steps.check(hidden_states, change, num_tokens, outputs)
        if self._steps.rolls_back(change):
            self._chain.lose_those_that_cannot_roll_back()
        step = self._steps.begin(change, num_tokens, outputs, hidden_size=hidden_states.shape[1])
        self._chain.begin(step)
        for row, piece in enumerate(hidden_states.split_with_sizes(list(num_tokens))):
            self._chain.first_feed.append(row, positions[row], piece)

    def next_action(self) -> Action:
        """What the driver has to do now.

        Raises:
            InvalidRequest: no step is under way.
        """
        step = self._steps.current
        if step is None:
            raise InvalidRequest("no step is under way")
        for part in self._chain:
            if part.hop is None:
                return FindRoute(blocks=part.blocks)
        if opens := self.pending_opens:
            return opens[0]
        if (connect := self._chain.redirect(step)) is not None:
            return connect
        for part in self._chain:
            if part.feed is not None and (chunk := part.feed.next_chunk()) is not None:
                assert part.hop is not None
                return Send(link=part.link, hop=part.hop, chunk=chunk)
        return self._finish(step) if self._is_complete(step) else Wait()

    def _is_complete(self, step: Step) -> bool:
        """Whether all results are here, and the histories of those hops that the client has begun to feed."""
        if any(has < length for has, length in zip(step.received, step.lengths, strict=True)):
            return False
        return all(part.feed is None or part.feed.lengths == step.lengths for part in self._chain)

    def _finish(self, step: Step) -> Done:
        self._chain.prove(step)
        self._steps.commit()
        return Done(outputs=step.take_outputs())

    def routed(self, hops: Sequence[Hop]) -> None:
        """The driver found servers for the blocks of the last FindRoute.

        Raises:
            InvalidRequest: when the hops do not cover exactly those blocks in order.
        """
        self._chain.fill(hops)

    def opened(self, link: int, *, max_step_tokens: int, can_rollback: bool) -> None:
        """What the server of a new link said of itself."""
        if (part := self._chain.find(link)) is not None:
            part.opened(max_step_tokens=max_step_tokens, can_rollback=can_rollback, as_of=self._steps.as_of)

    def new_link(self) -> int:
        """A number for a link that may take the place of another; see `moved`."""
        return self._chain.new_link()

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
        part = self._chain.find(link)
        if part is None or not part.is_open or hop.blocks != part.blocks:
            return False
        if not self._chain.has_all(part, step_id, received):
            return False
        self._chain.replace(part, hop, new_link, max_step_tokens=max_step_tokens, can_rollback=can_rollback)
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
        part, step = self._chain.find(link), self._steps.current
        if part is None or part.hop is None or step is None or step_id != step.step_id:
            return 0
        following = self._chain.following(part)
        target = following.feed if following is not None else None
        if following is not None and target is None:
            return 0  # sent before the server was told to push
        known = target.lengths if target is not None else step.received
        step.check_outputs(
            hidden_states, positions=positions, num_tokens=num_tokens, known=known, peer_id=part.hop.peer_id
        )
        for row, piece in enumerate(hidden_states.split_with_sizes(list(num_tokens))):
            if num_tokens[row] and target is not None:
                target.append(row, positions[row], piece)
            elif num_tokens[row]:
                step.results[row].append(piece[known[row] - positions[row] :])
        ends = [position + count if count else 0 for position, count in zip(positions, num_tokens, strict=True)]
        return sum(max(0, end - length) for end, length in zip(ends, known, strict=True))

    def failed(self, link: int) -> None:
        """The server of `link` is lost: its blocks need another, and a replay."""
        part = self._chain.find(link)
        if part is None:
            return
        if part.is_open and any(self._steps.committed):
            self.num_replays += 1
        self._chain.lose(part)

    def link_down(self, link: int, epoch: int, fault: LinkFault) -> None:
        """The server of `link` can't send on, though it lives, and so does the next one."""
        part = self._chain.find(link)
        if part is None or epoch != part.epoch:
            return
        if fault is LinkFault.HISTORY_LOST:
            return self.failed(link)  # a server that can't feed the next one is of no use
        self._chain.cannot_push(part)

    def abandon(self) -> None:
        """The driver gave up in the middle of a step (cancelled, out of time), which counts as never begun.

        Only a step that permuted rows can't be undone: the session is then empty.
        """
        kept = self._steps.abandon()
        if kept is None:
            return
        self._chain.forget(kept)
        self._chain.lose_those_that_cannot_roll_back()
        self._chain.lose_those_that_feed_in_vain()
