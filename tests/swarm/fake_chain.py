"""A swarm without network or model, to shake the session machine: fake servers, wires between them, and trouble.

    Session ──action──► FakeChain ──Wire──► FakeServer: Intake ─► jobs ─► cache ─► Link ──Wire──► next server, or client
       ▲                    │
       └──────event─────────┘       each tick one thing happens: a wire delivers a message, or a server computes

Every stream is a wire of its own: order holds within it, and between two of them anything may overtake anything. What
a wire that breaks had not delivered is lost, and its sender learns of it later. All choices come from one seed, so a
failure comes again; what goes wrong and when is a list of `Fault`s, which hypothesis can shrink.
"""

import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from itertools import chain, pairwise

import torch

from swarm.errors import InvalidRequest
from swarm.intake import Accepted, Intake
from swarm.link import HistoryLost, Link
from swarm.protocol import LinkFault
from swarm.session import Session
from swarm.session_actions import Connect, Done, FindRoute, Open, Send, Wait
from swarm.step_chunk import StepChunk
from swarm.types import BlockRange, Hop

CLIENT = -1
"""The client's place in `FakeChain.tokens`, where servers go by their links."""
PRIME = 1009


class Trouble(Enum):
    """What can go wrong."""

    KILL = auto()
    """A server dies; of what it had sent, the end may be lost."""
    KILL_ALL = auto()
    GIVE_UP = auto()
    """The driver gives a server up that lives, and goes on sending for a while."""
    BREAK = auto()
    """A push stream breaks between two servers that live."""
    BLOCK = auto()
    """One peer can't reach another any more."""
    FORGET = auto()
    """A server drops its history."""
    REFUSE = auto()
    """The next session that is opened fails instead."""
    MOVE = auto()
    """A server takes nothing more, and gives what it has to another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Trouble at a tick; `pick` says whose, modulo how many there are."""

    at: int
    trouble: Trouble
    pick: int = 0


@dataclass(frozen=True, slots=True)
class Opened:
    """A server is ready."""


@dataclass(frozen=True, slots=True)
class Down:
    """A server can't send on."""

    epoch: int
    fault: LinkFault


@dataclass(frozen=True, slots=True)
class Ended:
    """A session stream is at its end, towards the server or towards the client."""


@dataclass(frozen=True, slots=True)
class Broken:
    """What a server learns of its push stream."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Moved:
    """Another server has the session; what was for the client was sent before."""

    link: int


Message = StepChunk | Connect | Opened | Down | Ended | Broken | Moved


@dataclass(slots=True, kw_only=True, eq=False)
class Wire:
    """One direction of a stream; None stands for the client."""

    source: "FakeServer | None"
    target: "FakeServer | None"
    messages: deque[Message] = field(default_factory=deque)
    is_broken: bool = False

    def put(self, message: Message) -> None:
        if not self.is_broken:
            self.messages.append(message)

    def break_off(self, num_delivered: int) -> None:
        """Only the first messages of those under way still arrive, and none that is sent later."""
        self.is_broken = True
        while len(self.messages) > num_delivered:
            self.messages.pop()


def run_blocks(tokens: Sequence[int], blocks: BlockRange, cache: list[tuple[int, ...]]) -> list[int]:
    """A stand-in for causal blocks: an output depends on all tokens so far, their positions, and each block."""
    outputs = []
    for token in tokens:
        sums = []
        before = cache[-1] if cache else (0,) * len(blocks)
        for block, total in zip(range(blocks.start, blocks.end), before, strict=True):
            sums.append((token * (len(cache) + 1) + total) % PRIME)
            token = (token * 3 + block + sums[-1]) % PRIME
        cache.append(tuple(sums))
        outputs.append(token)
    return outputs


def to_tensor(tokens: Sequence[int]) -> torch.Tensor:
    return torch.tensor(list(tokens), dtype=torch.float64).view(-1, 1)


class FakeServer:
    """One session on one server, built as the real one is, with sums for a model."""

    def __init__(self, link: int, hop: Hop, num_rows: int, *, is_last: bool, max_step_tokens: int, can_rollback: bool):
        self.link, self.hop, self.is_last = link, hop, is_last
        self.max_step_tokens, self.can_rollback = max_step_tokens, can_rollback
        self.is_up = True
        self.is_frozen = self.is_gone = False
        self.intake = Intake(num_rows, max_length=10_000)
        self.out = Link(num_rows, to_client=is_last)
        self.jobs: deque[Accepted] = deque()
        self.epoch = -1
        self.push: Wire | None = None
        self._cache: list[list[tuple[int, ...]]] = [[] for _ in range(num_rows)]

    def accept(self, chunk: StepChunk) -> None:
        """Take a chunk from the client or from another server; InvalidRequest is a bug of theirs."""
        assert self.can_rollback or not self.intake.rolls_back(chunk), "a recurrent server cannot roll back"
        if (accepted := self.intake.accept(chunk)) is not None:
            self.jobs.append(accepted)

    def succeed(self, other: "FakeServer") -> None:
        """Go on where another server was."""
        self.intake.resume(other.intake.save())
        self.out.resume(other.out.save())
        self._cache = [list(row) for row in other._cache]

    def compute(self) -> None:
        """Run the next job; its outputs belong to the receiver then."""
        job = self.jobs.popleft()
        if job.is_new_step:
            assert job.base is not None
            if job.order is not None:
                self._cache = [list(self._cache[old]) for old in job.order]
            for row, base in zip(self._cache, job.base, strict=True):
                del row[base:]
            self.out.begin(job.step_id, order=job.order, base=job.base, outputs_from=job.outputs_from)
        for index, piece in enumerate(job.hidden_states.split(list(job.num_tokens))):
            position = len(self._cache[index])
            outputs = run_blocks([int(token) for token in piece], self.hop.blocks, self._cache[index])
            if outputs:
                self.out.append(index, position, to_tensor(outputs))


class FakeChain:
    """Carries out a session's actions, and lets the rest of the world happen in any order.

    Args:
        session: the machine.
        seed: of all choices.
        faults: what goes wrong.
        find_route: hops for a range of blocks; random ones by default.
        max_step_tokens: what each server says of itself, one of these.
        recurrent: how many of the servers can't roll back.
        duplicates: how many of the chunks and results arrive a second time, at any later time.
    """

    def __init__(
        self,
        session: Session,
        *,
        seed: int = 0,
        faults: Sequence[Fault] = (),
        find_route: Callable[[BlockRange], list[Hop]] | None = None,
        max_step_tokens: Sequence[int] = (1000,),
        recurrent: float = 0.0,
        duplicates: float = 0.0,
    ):
        self.session = session
        self.servers: dict[int, FakeServer] = {}
        """All that were ever opened, by link."""
        self.tokens: Counter[tuple[int, int]] = Counter()
        """Hidden states sent, by sender and receiver."""
        self.messages: Counter[tuple[int, int]] = Counter()
        """Steps and results sent, by sender and receiver."""
        self.happened: Counter[Trouble] = Counter()
        self.targets: dict[int, int | None] = {}
        """Where each epoch leads."""
        self.epochs: dict[int, int] = {}
        """The last epoch that each server was told of."""
        self.clock = 0
        self.num_moves = 0
        self._rng = random.Random(seed)
        self._faults = deque(sorted(faults, key=lambda fault: fault.at))
        self.find_route = find_route or self._random_route
        self._max_step_tokens, self._recurrent, self._duplicates = max_step_tokens, recurrent, duplicates
        self._wires: list[Wire] = []
        self._up: dict[int, Wire] = {}
        self._down: dict[int, Wire] = {}
        self._held: dict[int, deque[Message]] = {}
        self._outputs: torch.Tensor | None = None
        self._blocked: set[tuple[str, str]] = set()
        self._num_refusals = 0

    # -- the driver ---------------------------------------------------------------------------------------------

    def run(self, *, max_ticks: int | None = None) -> torch.Tensor | None:
        """Carry out the step that was begun; None when it took more than `max_ticks`, and was abandoned."""
        start = self.clock
        for _ in range(50_000):
            if self._outputs is not None:
                outputs, self._outputs = self._outputs, None
                return outputs
            if max_ticks is not None and self.clock - start > max_ticks:
                self.session.abandon()
                self._close_unused()
                return None
            self.advance()
        raise AssertionError("the step does not end")

    def advance(self) -> None:
        """Carry out one action of the session, or let one thing happen."""
        if (self._outputs is not None or self._rng.random() < 0.6) and self.tick():
            return
        if self._outputs is not None:
            return
        action = self.session.next_action()
        self._close_unused()
        if isinstance(action, Done):
            self._outputs = action.outputs
        elif not self._carry_out(action):
            assert self.tick() or self._held, f"{action} with nothing under way"

    def tick(self) -> bool:
        """Let one thing happen; False when nothing can."""
        self.clock += 1
        self._cause_trouble()
        self._wires = [wire for wire in self._wires if wire.messages or not wire.is_broken]
        happenings = [partial(self._deliver, wire) for wire in self._wires if wire.messages]
        happenings += [partial(self._compute, server) for server in self.servers.values() if server.jobs]
        happenings += [partial(self._hand_over, server) for server in self.servers.values() if self._can_go(server)]
        if not happenings:
            return False
        self._rng.choice(happenings)()
        self._close_unused()
        return True

    def settle(self) -> None:
        """Let everything that is under way arrive."""
        while self.tick():
            pass

    def _carry_out(self, action: FindRoute | Open | Connect | Send | Wait) -> bool:
        """Do what the machine wants; False when there is nothing to do but wait."""
        if isinstance(action, FindRoute):
            self.session.routed(self.find_route(action.blocks))
        elif isinstance(action, Open):
            return self._start_opens()
        elif isinstance(action, Connect):
            self.targets[action.epoch] = action.target
            self.epochs[action.link] = action.epoch
            self._held.get(action.link, self._up[action.link].messages).append(action)
        elif isinstance(action, Send):
            assert self.servers[action.link].hop == action.hop
            self._send(self._up[action.link], action.chunk)
        return not isinstance(action, Wait)

    def _start_opens(self) -> bool:
        self._cause_trouble()
        fresh = [opening for opening in self.session.pending_opens if opening.link not in self.servers]
        for opening in fresh:
            server = self.servers[opening.link] = FakeServer(
                opening.link,
                opening.hop,
                self.session.batch_size,
                is_last=opening.is_last,
                max_step_tokens=self._rng.choice(self._max_step_tokens),
                can_rollback=self._rng.random() >= self._recurrent,
            )
            self._up[opening.link] = self._wire(None, server)
            self._down[opening.link] = self._wire(server, None)
            if self._num_refusals:
                self._num_refusals -= 1
                self._kill(server)
            else:
                self._down[opening.link].put(Opened())
        return bool(fresh)

    def _close_unused(self) -> None:
        for link in self._up.keys() - self.session.hops.keys():
            self._up.pop(link).put(Ended())

    def _random_route(self, blocks: BlockRange) -> list[Hop]:
        cuts = range(blocks.start + 1, blocks.end)
        edges = [blocks.start, *sorted(self._rng.sample(cuts, self._rng.randint(0, min(2, len(cuts))))), blocks.end]
        return [Hop(peer_id=f"peer{self._rng.randrange(6)}", blocks=BlockRange(a, b)) for a, b in pairwise(edges)]

    # -- what happens -------------------------------------------------------------------------------------------

    def _wire(self, source: FakeServer | None, target: FakeServer | None) -> Wire:
        self._wires.append(Wire(source=source, target=target))
        return self._wires[-1]

    def _send(self, wire: Wire, chunk: StepChunk) -> None:
        ends = tuple(CLIENT if end is None else end.link for end in (wire.source, wire.target))
        self.tokens[ends[0], ends[1]] += sum(chunk.num_tokens)
        self.messages[ends[0], ends[1]] += 1
        wire.put(chunk)

    def _deliver(self, wire: Wire) -> None:
        message = wire.messages.popleft()
        if isinstance(message, StepChunk) and self._rng.random() < self._duplicates:
            self._wire(wire.source, wire.target).put(message)
        if wire.target is not None:
            self._deliver_to_server(wire, wire.target, message)
        elif wire.source is not None:
            self._deliver_to_client(wire.source, message)

    def _deliver_to_client(self, source: FakeServer, message: Message) -> None:
        if isinstance(message, StepChunk):
            self.session.received(
                source.link,
                step_id=message.step_id,
                positions=message.positions,
                num_tokens=message.num_tokens,
                hidden_states=message.hidden_states,
            )
        elif isinstance(message, Opened):
            limits = {"max_step_tokens": source.max_step_tokens, "can_rollback": source.can_rollback}
            self.session.opened(source.link, **limits)
        elif isinstance(message, Ended):
            self.session.failed(source.link)
        elif isinstance(message, Moved):
            self._replace(source, self.servers[message.link])
        elif isinstance(message, Down):
            target = self.targets[message.epoch]
            if message.fault is LinkFault.UNREACHABLE and target is not None and not self.servers[target].is_up:
                self.session.failed(target)  # it doesn't answer the driver either
            else:
                self.session.link_down(source.link, message.epoch, message.fault)

    def _deliver_to_server(self, wire: Wire, server: FakeServer, message: Message) -> None:
        if not server.is_up:
            return
        if isinstance(message, StepChunk):
            self._take(wire, server, message)
        elif isinstance(message, Connect):
            self._forward(server, message)
        elif isinstance(message, Ended):
            self._stop(server)
        elif isinstance(message, Broken) and message.epoch == server.epoch:
            server.out.disconnect()
            self._down[server.link].put(Down(server.epoch, LinkFault.UNREACHABLE))

    def _take(self, wire: Wire, server: FakeServer, chunk: StepChunk) -> None:
        """A chunk that doesn't fit ends its push stream; only what was given up in favour of another may not fit."""
        if server.is_frozen:
            return
        try:
            server.accept(chunk)
        except InvalidRequest:
            if wire.source is None or (wire.source.push is wire and wire.source.link in self.session.hops):
                raise
            self._break(wire, num_delivered=0)

    def _forward(self, server: FakeServer, forward: Connect) -> None:
        server.epoch, server.push = forward.epoch, None
        target = None if forward.target is None else self.servers[forward.target]
        try:
            server.out.connect(
                held=forward.held,
                as_of=forward.as_of,
                max_step_tokens=forward.max_step_tokens,
                to_client=target is None,
            )
        except HistoryLost:
            self._down[server.link].put(Down(server.epoch, LinkFault.HISTORY_LOST))
            return
        if target is not None:
            if not target.is_up or (server.hop.peer_id, target.hop.peer_id) in self._blocked:
                server.out.disconnect()
                self._down[server.link].put(Down(server.epoch, LinkFault.UNREACHABLE))
                return
            server.push = self._wire(server, target)
        self._pump(server)

    def _compute(self, server: FakeServer) -> None:
        server.compute()
        self._pump(server)

    def _pump(self, server: FakeServer) -> None:
        while (chunk := server.out.next_chunk()) is not None:
            self._send(server.push or self._down[server.link], chunk)

    # -- moves --------------------------------------------------------------------------------------------------

    def move(self, link: int) -> None:
        """Let a server give what it has to another one, as soon as it has nothing to do."""
        self.servers[link].is_frozen = True

    def _can_go(self, server: FakeServer) -> bool:
        return server.is_frozen and server.is_up and not server.is_gone and not server.jobs

    def _hand_over(self, server: FakeServer) -> None:
        """What the other server has is fixed from now on; the client hears of it later."""
        server.is_gone = True
        link, hop = self.session.new_link(), Hop(peer_id=f"peer{self._rng.randrange(6)}", blocks=server.hop.blocks)
        heir = self.servers[link] = FakeServer(
            link,
            hop,
            self.session.batch_size,
            is_last=server.is_last,
            max_step_tokens=self._rng.choice(self._max_step_tokens),
            can_rollback=server.can_rollback,
        )
        heir.succeed(server)
        self._down[server.link].put(Moved(link))

    def _replace(self, server: FakeServer, heir: FakeServer) -> None:
        """The client knows where its session is."""
        is_moved = self.session.moved(
            server.link,
            heir.link,
            heir.hop,
            max_step_tokens=heir.max_step_tokens,
            can_rollback=heir.can_rollback,
            step_id=heir.intake.step_id,
            received=heir.intake.lengths,
        )
        if is_moved:
            self.num_moves += 1
            self._up[heir.link], self._down[heir.link] = self._wire(None, heir), self._wire(heir, None)
        else:
            self.session.failed(server.link)

    # -- trouble ------------------------------------------------------------------------------------------------

    def hold(self, link: int) -> None:
        """Words of where to send don't get through to this server."""
        self._held[link] = deque()

    def release(self, link: int) -> None:
        """They do, at last."""
        self._up[link].messages.extend(self._held.pop(link))

    def cut(self, source: int, target: int) -> None:
        """Break the push stream between two servers, by their links; nothing that is under way arrives."""
        push = self.servers[source].push
        assert push is not None and push.target is self.servers[target]
        self._break(push, num_delivered=0)

    def kill(self, link: int) -> None:
        """End a server; nothing that it has sent and that is under way arrives."""
        self._kill(self.servers[link], keeps_sent=False)

    def _cause_trouble(self) -> None:
        while self._faults and self._faults[0].at <= self.clock:
            self._cause(self._faults.popleft())

    def _cause(self, fault: Fault) -> None:
        self.happened[fault.trouble] += 1
        in_use = [self.servers[link] for link in self.session.hops if link in self.servers]
        pushes = [server.push for server in in_use if server.push is not None and not server.push.is_broken]
        if fault.trouble is Trouble.REFUSE:
            self._num_refusals += 1
        elif fault.trouble is Trouble.KILL_ALL:
            for server in in_use:
                self._kill(server)
        elif fault.trouble in (Trouble.BREAK, Trouble.BLOCK):
            if pushes:
                push = pushes[fault.pick % len(pushes)]
                assert push.source is not None and push.target is not None
                self._break(push, num_delivered=self._rng.randint(0, len(push.messages)))
                if fault.trouble is Trouble.BLOCK:
                    self._blocked.add((push.source.hop.peer_id, push.target.hop.peer_id))
        elif in_use:
            server = in_use[fault.pick % len(in_use)]
            if fault.trouble is Trouble.KILL:
                self._kill(server)
            elif fault.trouble is Trouble.MOVE:
                self.move(server.link)
            elif fault.trouble is Trouble.GIVE_UP:
                self.session.failed(server.link)
            else:
                server.out.drop_history()

    def _break(self, push: Wire, *, num_delivered: int) -> None:
        push.break_off(num_delivered)
        if push.source is not None and push.source.push is push:
            self._wire(push.target, push.source).put(Broken(push.source.epoch))

    def _kill(self, server: FakeServer, *, keeps_sent: bool = True) -> None:
        if not server.is_up:
            return
        self._stop(server)
        for wire in self._wires:
            if wire.source is server:
                wire.break_off(self._rng.randint(0, len(wire.messages)) if keeps_sent else 0)
        self._wire(server, None).put(Ended())

    def _stop(self, server: FakeServer) -> None:
        server.is_up = False
        server.jobs.clear()
        for wire in list(self._wires):
            if wire.target is server:
                self._break(wire, num_delivered=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What a caller does in a step, in numbers that mean something for any lengths; one of each per row."""

    order: tuple[int, ...] | None = None
    rolled_back: tuple[int, ...]
    num_tokens: tuple[int, ...]
    num_outputs: tuple[int, ...]
    max_ticks: int | None = None
    """When the caller loses patience."""

    @staticmethod
    def of(*num_tokens: int) -> "Turn":
        """So many tokens per row, of which the last output is wanted."""
        ones = tuple(min(1, count) for count in num_tokens)
        return Turn(rolled_back=(0,) * len(ones), num_tokens=num_tokens, num_outputs=ones)


class Caller:
    """Drives a session through a chain, and knows what must come out."""

    def __init__(self, chain: FakeChain, *, seed: int = 0):
        self.chain, self.session = chain, chain.session
        self.rows: list[list[int]] = [[] for _ in range(self.session.batch_size)]
        self._rng = random.Random(seed)
        self._abandoned_rows = self.rows
        self._wanted: list[int] = []

    def prompt(self, *num_tokens: int) -> None:
        """A step with so many tokens per row, of which the last output is wanted."""
        self.take(Turn.of(*num_tokens))

    def decode(self) -> None:
        """A step of one token per row."""
        self.prompt(*(1 for _ in self.rows))

    def take(self, turn: Turn) -> bool:
        """Take a step and compare all that comes out; False when it was abandoned."""
        self.begin(turn)
        return self.finish(max_ticks=turn.max_ticks)

    def begin(self, turn: Turn) -> None:
        """Begin a step."""
        order = None if turn.order is None else [old % len(self.rows) for old in turn.order]
        old_rows = self.rows if order is None else [self.rows[old] for old in order]
        base = [max(0, len(row) - count) for row, count in zip(old_rows, turn.rolled_back, strict=True)]
        num_tokens = list(turn.num_tokens)
        if not sum(num_tokens):
            num_tokens[0] = 1
        wanted = list(map(min, turn.num_outputs, num_tokens))
        if not sum(wanted):
            wanted[num_tokens.index(max(num_tokens))] = 1
        new = [[self._rng.randrange(PRIME) for _ in range(count)] for count in num_tokens]
        hidden_states = to_tensor(list(chain.from_iterable(new)))
        self.session.begin(hidden_states, positions=base, num_tokens=num_tokens, num_outputs=wanted, order=order)
        kept = [row[:position] for row, position in zip(old_rows, base, strict=True)]
        self._abandoned_rows = kept if order is None else [[] for _ in kept]
        self.rows = [row + added for row, added in zip(kept, new, strict=True)]
        self._wanted = wanted

    def finish(self, *, max_ticks: int | None = None) -> bool:
        """Carry the step out and compare all that comes out; False when it was abandoned."""
        outputs = self.chain.run(max_ticks=max_ticks)
        if outputs is None:
            self.rows = self._abandoned_rows
        else:
            assert outputs.flatten().tolist() == self._expected(self._wanted)
        assert self.session.lengths == tuple(map(len, self.rows))
        return outputs is not None

    def _expected(self, wanted: Sequence[int]) -> list[int]:
        outputs: list[int] = []
        for row, count in zip(self.rows, wanted, strict=True):
            outputs += run_blocks(row, self.session.blocks, [])[len(row) - count :]
        return outputs
