"""One client's part in the rounds of a run: it talks with the others until all know whose updates count, and has them.

    Exchange.round(update) ─► Round (pure) ◄─ ballots ─► a conversation with each peer, until there is a decision
                                              what they list ─► Delivery.fetch, checked ─► Round.hold
    peers' streams ─► a ballot for a ballot, an adapter's bytes for its digest (Delivery.send)

It talks over the project's transport, so whom it hears is authenticated, and in a private swarm a member. What others
may have is what belongs to this round and the last, and the adapter that the round began with, for those who come late.
It knows bytes and numbers of LoRA adapters, and neither PEFT nor how they are trained.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from swarm.adapters.peft import LoadedAdapter
from swarm.errors import InvalidRequest, PeerBusy, PeerMisbehaved, PeerTimeout, PeerUnreachable, SwarmError
from swarm.federated.aggregate import Update
from swarm.federated.agreement import MAX_CLIENTS, Head, Round, Terms, best_head, contribute
from swarm.federated.delivery import Bytes, Delivery
from swarm.federated.roll import PERIOD_S, Roll
from swarm.federated.updates import Rules
from swarm.identity import Identity
from swarm.network.tasks import TaskSet
from swarm.protocol import FEDERATED_SERVICE, AdapterRequest, Contribution, FederatedBallot, Message
from swarm.transport import Stream, Transport

log = logging.getLogger(__name__)

POLL_S = 0.2
"""How long a conversation rests where nothing has changed."""
ASK_TIMEOUT_S = 5.0
MAX_REST_S = 2.0
"""How long a busy peer is left alone, whatever it asks for."""
TRIES = 2
"""A peer that fails so often in a row is taken for gone until the next round."""
OTHERS_AFTER_S = 3.0
"""An update is fetched from its own client; after so long in a round, from whoever has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """An update that counts."""

    peer_id: str
    num_examples: int
    update: Update


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a round has come to."""

    taken: Sequence[Taken]
    """In the order of peer ids; the same for all clients that were in it or heard of it."""
    refused: Mapping[str, str]
    """Peer -> why its update doesn't count."""


@dataclass(frozen=True, slots=True)
class _Given:
    """What we have contributed to a round, when others may know it: a second one would disqualify us."""

    head: Head
    own: LoadedAdapter
    update: Update
    num_examples: int


class Behind(Exception):
    """Most clients are elsewhere, at `head`."""

    def __init__(self, head: Head):
        super().__init__(f"most clients are in round {head.round}")
        self.head = head


class Exchange:
    """See the module docstring.

    Args:
        transport: to the others, started.
        identity: of its node; signs our contributions.
        roll: finds the others.
        run: digest of all that clients must agree about.
        head: where we are.
        base: the adapter that the round begins with.
        members: who may take part; None for anybody.
    """

    def __init__(
        self, transport: Transport, identity: Identity, roll: Roll, *, run: str, head: Head, base: LoadedAdapter,
        members: frozenset[str] | None = None,
    ):  # fmt: skip
        self._transport, self._identity, self._roll, self._run, self._members = transport, identity, roll, run, members
        self.head = head
        self._delivery = Delivery(transport)
        self._delivery.offer(base)
        self._round: Round | None = None
        self._rules: Rules | None = None
        self._last_final: FederatedBallot | None = None
        """Of the round before, for those who still ask."""
        self._read: dict[str, Update] = {}
        """Updates of this round that were checked, by digest."""
        self._fetching: set[str] = set()
        self._heads: dict[str, Head] = {}
        self._is_in_run = False
        """Whether we have announced ourselves: others may count us, and so do we."""
        self._given: _Given | None = None
        self._may_know: set[str] = set()
        """Peers that were asked in this round, and may have heard of our contribution, but have not answered."""
        self._complaints: dict[str, str] = {}
        """Peer -> what was wrong with what it has told in this round."""
        self._changed = asyncio.Event()
        self._talking: dict[str, asyncio.Task[None]] = {}
        self._tasks = TaskSet()

    @property
    def bytes(self) -> Bytes:
        """Of adapters, sent and received until now."""
        return self._delivery.bytes

    async def start(self) -> None:
        """Answer others."""
        self._transport.serve(FEDERATED_SERVICE, self._answer)
        self._tasks.spawn(self._stay_on_roll(), name="announce that we take part in a federated run")

    async def announce(self) -> None:
        """Be found by others: from now on they wait for us."""
        self._is_in_run = True
        await self._roll.announce()

    async def close(self) -> None:
        """Leave the run; others don't wait for us any more."""
        await self._tasks.close()
        try:
            await self._roll.announce(is_leaving=True)
        except SwarmError as error:
            log.debug("could not say that we leave: %s", error)

    # -- what a client does ---------------------------------------------------------------------------------------

    async def round(
        self, own: LoadedAdapter, update: Update, num_examples: int, rules: Rules, *, min_clients: int, timeout_s: float
    ) -> Outcome:
        """Put in our update, and find out whose count.

        Who tries again after a failed round, and has told somebody of its update, puts in the same one again.

        Args:
            own: our update as bytes.
            update: the same as numbers.
            num_examples: that it was trained on.
            rules: what an update of this round looks like.
            min_clients: fewer make no round.
            timeout_s: longest that it may take; who hasn't come after three quarters of it is left out.

        Raises:
            RoundFailed: too few have come. Behind: the others are in another round.
        """
        if self._given is not None and self._given.head == self.head:
            own, update, num_examples = self._given.own, self._given.update, self._given.num_examples
        contribution = contribute(self._identity, self._run, self.head, own.digest, num_examples)
        now = _now()
        terms = Terms(
            run=self._run, head=self.head, min_clients=min_clients, collect_until=now + 0.75 * timeout_s,
            ends_at=now + timeout_s, members=self._members,
        )  # fmt: skip
        self._delivery.offer(own)
        self._read = {own.digest: update}
        self._round, self._rules = Round(terms, contribution), rules
        self._round.peers |= set(self._heads)
        self._heads.clear()
        self._complaints.clear()
        self._may_know.clear()
        given = _Given(self.head, own, update, num_examples)
        try:
            await self._look_for_others(self._round)
            counted = await self._decided(self._round)
            await self._tell_all(self._round)
            return self._outcome(self._round, counted)
        finally:
            self._end_conversations()
            if self._may_know or self._round.was_heard:
                self._given = given
            if (ballot := self._round.ballot()).is_final:
                self._last_final = ballot
            else:
                kept = {self.head.base} if self._given is None else {self.head.base, self._given.own.digest}
                self._delivery.keep(kept)
            self._round, self._rules, self._read = None, None, {}

    def advance(self, head: Head, base: LoadedAdapter) -> None:
        """We have aggregated a round, or caught up, and train for the next one now."""
        self._delivery.turn()
        self._delivery.offer(base)
        self.head, self._given = head, None

    async def find_head(self) -> Head:
        """Where most clients are (`best_head`); where we are, if nobody answers.

        Raises:
            PeerTimeout: the DHT does not answer, and we are not in the run yet; later, those that are known are asked.
        """
        try:
            peers = await self._roll.peers()
        except SwarmError as error:
            if not self._is_in_run:
                raise
            log.info("the DHT does not say who takes part, %d clients are known: %s", len(self._heads), error)
            peers = sorted(self._heads)
        asking = (self._ask(peer_id, self._idle_ballot()) for peer_id in peers)
        answers = await asyncio.gather(*asking, return_exceptions=True)
        self._heads.clear()
        for peer_id, answer in zip(peers, answers, strict=True):
            if isinstance(answer, FederatedBallot):
                self._heads[peer_id] = Head(answer.head_round, answer.head_base)
            elif not isinstance(answer, SwarmError):
                raise answer
            else:
                log.info("%s does not say where it is: %s", peer_id, answer)
        return self._best_head()

    async def fetch_base(self, head: Head, rules: Rules) -> tuple[LoadedAdapter, Update]:
        """The adapter that a round begins with, from those who are in it.

        Raises:
            PeerError: nobody has sent it whole.
        """
        for peer_id in sorted(peer_id for peer_id, its in self._heads.items() if its == head):
            try:
                return await self._delivery.fetch(peer_id, head.base, rules)
            except SwarmError as error:
                log.info("the adapter of round %d does not come from %s: %s", head.round, peer_id, error)
        raise PeerTimeout(
            f"nobody has sent the adapter that round {head.round} begins with; {len(self._heads)} were asked"
        )

    # -- a round --------------------------------------------------------------------------------------------------

    async def _decided(self, this: Round) -> Sequence[Contribution]:
        while True:
            self._changed.clear()
            if (counted := this.decide(_now())) is not None:
                return counted
            if self._is_behind(self._best_head()) and self._is_behind(head := await self.find_head()):
                raise Behind(head)  # not only the first that were heard say so
            for peer_id in sorted((this.peers | this.contributors) - this.unreachable - set(self._talking)):
                task = self._tasks.spawn(self._converse(this, peer_id), name=f"round with {peer_id}")
                self._talking[peer_id] = task
            await _event_or(self._changed, POLL_S)

    def _best_head(self) -> Head:
        return best_head(self.head, self._heads.values(), is_in_run=self._is_in_run)

    def _is_behind(self, best: Head) -> bool:
        """Whether those who are there have nothing for our round any more; those who have just ended it tell of it."""
        return best.round > self.head.round + 1 or (best.round == self.head.round and best != self.head)

    def _outcome(self, this: Round, counted: Sequence[Contribution]) -> Outcome:
        taken = [
            Taken(peer_id=it.peer_id, num_examples=it.num_examples, update=self._read[it.digest]) for it in counted
        ]
        counting = {it.peer_id for it in counted}
        complaints = {peer_id: why for peer_id, why in self._complaints.items() if peer_id not in counting}
        return Outcome(taken=taken, refused={**complaints, **this.refused})

    async def _look_for_others(self, this: Round) -> None:
        """Who is there now is waited for; who comes later counts if it is in time."""
        while _now() < this.terms.collect_until:
            try:
                found = set(await self._roll.peers())
                this.peers |= found
                this.expected |= found
                return
            except SwarmError as error:
                log.info("the DHT does not say who takes part, %d clients are known: %s", len(this.peers), error)
                if this.peers:
                    this.expected |= this.peers
                    return
                await asyncio.sleep(POLL_S)

    async def _converse(self, this: Round, peer_id: str) -> None:
        """Tell a peer what we hold, hear what it holds, and fetch that; until it is gone or the round is over."""
        failures, started = 0, _now()
        while failures < TRIES:
            ballot = this.ballot()
            try:
                self._may_know.add(peer_id)
                answer = await self._ask(peer_id, ballot)
                self._may_know.discard(peer_id)
                failures = 0
                self._hear(peer_id, answer, to=ballot)
                await self._fetch_missing(this, peer_id, with_others=_now() - started > OTHERS_AFTER_S)
            except PeerBusy as error:
                self._may_know.discard(peer_id)
                await asyncio.sleep(min(error.retry_after_s, MAX_REST_S))
            except SwarmError as error:
                failures += 1
                if isinstance(error, PeerUnreachable):
                    self._may_know.discard(peer_id)
                log.info("round %d with %s: %s", this.terms.head.round, peer_id, error)
            if this.ballot() == ballot:
                await asyncio.sleep(POLL_S)
        this.unreachable.add(peer_id)
        self._changed.set()

    async def _tell_all(self, this: Round) -> None:
        """Nobody has to find out by itself that the round is over."""
        told = sorted(this.contributors - this.unreachable)
        await asyncio.gather(*(self._ask(peer_id, this.ballot()) for peer_id in told), return_exceptions=True)

    def _end_conversations(self) -> None:
        for task in self._talking.values():
            task.cancel()
        self._talking.clear()
        self._fetching.clear()

    async def _ask(self, peer_id: str, ballot: FederatedBallot) -> FederatedBallot:
        answer = await self._transport.call(peer_id, FEDERATED_SERVICE, ballot, timeout_s=ASK_TIMEOUT_S)
        if not isinstance(answer, FederatedBallot) or answer.run != self._run or answer.round != ballot.round:
            raise PeerMisbehaved(f"expected a ballot of round {ballot.round}, got {_name(answer)}", peer_id=peer_id)
        return answer

    def _hear(self, peer_id: str, ballot: FederatedBallot, *, to: FederatedBallot | None = None) -> None:
        """Take over what a peer says of our round, and where it is.

        Raises:
            PeerMisbehaved: it lists what can't be. PeerBusy: so many others have spoken already.
        """
        this = self._round
        is_known = peer_id in self._heads or (this is not None and peer_id in this.peers)
        if not is_known and len(self._heads) >= MAX_CLIENTS:
            raise PeerBusy(f"{len(self._heads)} clients are heard, limit {MAX_CLIENTS}", retry_after_s=MAX_REST_S)
        head = self._heads[peer_id] = Head(ballot.head_round, ballot.head_base)
        if this is None:
            return
        this.peers.add(peer_id)
        if head != this.terms.head:
            this.expected.discard(peer_id)  # it is elsewhere
        if peer_id in this.unreachable:
            this.unreachable.discard(peer_id)
            self._talking.pop(peer_id, None)
        if Head(ballot.round, ballot.base) == this.terms.head:
            try:
                this.add(ballot.contributions)
            except PeerMisbehaved as error:
                log.warning("what %s says of round %d is refused: %s", peer_id, ballot.round, error)
                self._complaints[peer_id] = str(error)
                raise
            this.hear(peer_id, ballot, to=to)
        self._changed.set()

    # -- adapters of others -----------------------------------------------------------------------------------------

    async def _fetch_missing(self, this: Round, peer_id: str, *, with_others: bool) -> None:
        with_others = with_others or bool(this.unreachable)
        for it in this.missing_from(peer_id, with_others=with_others):
            if it.digest in self._fetching or self._rules is None:
                continue
            self._fetching.add(it.digest)
            try:
                adapter, self._read[it.digest] = await self._delivery.fetch(peer_id, it.digest, self._rules)
                self._delivery.offer(adapter)
                this.hold(it.digest)
            except InvalidRequest as error:
                log.warning("the update of %s is refused: %s", it.peer_id, error)
                this.refuse(it, str(error))
            finally:
                self._fetching.discard(it.digest)
                self._changed.set()

    # -- what others ask ---------------------------------------------------------------------------------------------

    async def _answer(self, stream: Stream) -> None:
        """A stream of a peer."""
        if self._members is not None and stream.peer_id not in self._members:
            raise InvalidRequest(f"{stream.peer_id} is no member of the run")
        message, _ = await stream.receive(ASK_TIMEOUT_S)
        if isinstance(message, FederatedBallot):
            await stream.send(self._answer_ballot(stream.peer_id, message), timeout_s=ASK_TIMEOUT_S)
        elif isinstance(message, AdapterRequest):
            await self._delivery.send(stream, message)
        else:
            raise InvalidRequest(f"expected FederatedBallot or AdapterRequest, got {_name(message)}")

    def _answer_ballot(self, peer_id: str, ballot: FederatedBallot) -> FederatedBallot:
        if ballot.run != self._run:
            raise InvalidRequest(f"a ballot of run {ballot.run[:12]}, this is {self._run[:12]}")
        self._hear(peer_id, ballot)
        asked = Head(ballot.round, ballot.base)
        if self._round is not None and asked == self._round.terms.head:
            return self._round.ballot()
        last = self._last_final
        if last is not None and asked == Head(last.round, last.base) and last.is_final:
            return replace(last, head_round=self.head.round, head_base=self.head.base)
        return self._idle_ballot(asked)

    def _idle_ballot(self, asked: Head | None = None) -> FederatedBallot:
        """Nothing about a round, only where we are."""
        about = asked or self.head
        return FederatedBallot(
            run=self._run, round=about.round, base=about.base, contributions=(), is_final=False,
            head_round=self.head.round, head_base=self.head.base,
        )  # fmt: skip

    async def _stay_on_roll(self) -> None:
        while True:
            await asyncio.sleep(PERIOD_S)
            try:
                await self._roll.announce()
            except SwarmError as error:
                log.warning("can't tell others that we take part: %s", error)


async def _event_or(event: asyncio.Event, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        pass


def _now() -> float:
    return asyncio.get_running_loop().time()


def _name(message: Message) -> str:
    return type(message).__name__
