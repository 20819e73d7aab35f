"""Whose updates count in a round: clients that all may vanish come to the same answer, without a coordinator. Pure.

    signed contributions ─add─► known ─ bytes fetched and checked: hold ─► View: who counts, with which digest
                                                     │
    ballots: what others hold ─hear─► all reachable contributors have the same view? ─► decision, for good

Each client tells the others what it holds, and takes over what they hold: views only grow. Collecting ends when all
whom the client expects are there, or at its deadline. Then the first to see that all whom it can reach have just its
view, or have answered this view that they hold nothing yet, makes it final, and never changes it. Nobody else can make
another view final, unless it can't reach that client, which would have to answer with that view. Whoever hears of a
final view takes it over: it has had just this view itself, or it came late, and then most whom the view names say so.
So clients that reach each other agree, also when some vanish. One moment is left: who vanishes just after it has made
a view final, when one has heard of that and another takes a larger view for all, leaves two results behind.

When a client stays silent but reachable until the last deadline, the view that is there is taken. Then, or when a
network falls apart, groups may have different results; their next ballots show it (`head`), and most of them win
(`best_head`); where no more than half are at one place, nobody moves. This is agreement under crashes and lost
connections. A client that lies about what it holds can split a round, or end it early for those who have shown a view
of enough clients. Who signs two contributions of a round counts in none of them.

Knows nothing of bytes, transports and clocks: `now` comes in.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from swarm.errors import PeerMisbehaved, RoundFailed
from swarm.identity import Identity, verify
from swarm.protocol import MAX_CONTRIBUTIONS, Contribution, FederatedBallot

MAX_CLIENTS = MAX_CONTRIBUTIONS // 2
MAX_ROUND = 1 << 32
"""Nobody comes there; who says so doesn't count."""
TWICE = ""
"""In a view: the client has signed two contributions."""
_DOMAIN = b"swarm federated contribution 1"

View = Mapping[str, str]
"""Peer -> what it has contributed (`_what`), or TWICE; values only change from nothing to that to TWICE."""


class Head(NamedTuple):
    """Where a client is: the round that it trains for, and the adapter with which that begins."""

    round: int
    base: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a round is about, and how long it may take. Times are in seconds of the caller's clock."""

    run: str
    head: Head
    min_clients: int
    """Fewer make no round."""
    collect_until: float
    """Who isn't here then is not waited for ..."""
    ends_at: float
    """... and then the round is over, whatever is missing."""
    members: frozenset[str] | None = None
    """Who may contribute; None for anybody."""


def statement(run: str, head: Head, digest: str, num_examples: int) -> bytes:
    """What a contribution's signature is for."""
    numbers = head.round.to_bytes(8, "big") + num_examples.to_bytes(8, "big")
    return _DOMAIN + bytes.fromhex(run) + bytes.fromhex(head.base) + bytes.fromhex(digest) + numbers


def contribute(identity: Identity, run: str, head: Head, digest: str, num_examples: int) -> Contribution:
    """Our own contribution, signed."""
    signature = identity.sign(statement(run, head, digest, num_examples))
    return Contribution(identity.peer_id, digest, num_examples, signature)


def best_head(ours: Head, others: Iterable[Head], *, is_in_run: bool = True) -> Head:
    """Where to go on.

    Who is in the run goes elsewhere only where more than half of all are, itself and those before their first round
    counted, and never back to the beginning: so one that lies takes nobody along. Who is not in it yet has nothing to
    lose, and goes where most of the others are; of equally many, to the beginning if that is one, else to the latest.
    """
    votes = Counter(head for head in others if head.round <= MAX_ROUND)
    if not is_in_run:
        return max(votes, key=lambda head: (votes[head], head == ours, head), default=ours)
    votes[ours] += 1
    found = max(votes, key=lambda head: votes[head])
    return found if found.round and 2 * votes[found] > votes.total() else ours


class Round:
    """See the module docstring.

    Args:
        terms: of the round.
        own: our contribution, whose bytes are here.
    """

    def __init__(self, terms: Terms, own: Contribution):
        self.terms = terms
        self.me = own.peer_id
        self.peers: set[str] = set()
        """The others in the run, as far as known."""
        self.expected: set[str] = set()
        """Those of them who may still contribute, and are waited for."""
        self.unreachable: set[str] = set()
        self.refused: dict[str, str] = {}
        """Peer -> what is wrong with its update."""
        self._known: dict[str, list[Contribution]] = {}
        """Of each peer, one, or two that differ."""
        self._held: set[str] = {own.digest}
        self._views: dict[str, dict[str, str]] = {}
        """By peer, what it was heard to hold."""
        self._absent: dict[str, View] = {}
        """By peer that holds nothing yet, which of our views it has answered so."""
        self._others_final: dict[str, View] = {}
        self._shown: list[View] = []
        """Views that others may have seen as ours."""
        self._final: View | None = None
        self.add([own])

    # -- what happens ---------------------------------------------------------------------------------------------

    def add(self, contributions: Iterable[Contribution]) -> None:
        """Contributions that somebody has told of.

        Raises:
            PeerMisbehaved: one is not signed by whom it names, or who may not contribute, or there are too many; those
                before it are kept.
        """
        for it in contributions:
            known = self._known.get(it.peer_id, [])
            if _what(it) in map(_what, known) or len(known) == 2 or self._final is not None:
                continue
            if self.terms.members is not None and it.peer_id not in self.terms.members:
                raise PeerMisbehaved(f"{it.peer_id} is no member of the run", peer_id=it.peer_id)
            if not verify(
                it.peer_id, statement(self.terms.run, self.terms.head, it.digest, it.num_examples), it.signature
            ):
                raise PeerMisbehaved(f"a contribution of {it.peer_id} that it has not signed", peer_id=it.peer_id)
            if it.peer_id not in self._known and len(self._known) >= MAX_CLIENTS:
                raise PeerMisbehaved(f"more than {MAX_CLIENTS} clients in a round", peer_id=it.peer_id)
            self._known[it.peer_id] = [*known, it]

    def hear(self, peer_id: str, ballot: FederatedBallot, *, to: FederatedBallot | None = None) -> None:
        """What a peer holds for this round; what it lists was added before.

        Args:
            peer_id: who says so.
            ballot: what it says.
            to: our ballot, which this answers; None where the peer speaks first.
        """
        if not ballot.contributions:
            if to is not None:
                self._absent[peer_id] = _view(to.contributions)
            return
        seen = _view(ballot.contributions)
        view = self._views.setdefault(peer_id, {})
        for name, what in seen.items():  # answers may overtake each other
            view[name] = what if view.get(name, what) == what else TWICE
        if ballot.is_final:
            self._others_final[peer_id] = seen

    def hold(self, digest: str) -> None:
        """An update's bytes are here, and good."""
        self._held.add(digest)

    def refuse(self, contribution: Contribution, why: str) -> None:
        """An update's bytes are not good, and the peer itself has named them: they are in nobody's view."""
        self.refused[contribution.peer_id] = why

    # -- what is so -----------------------------------------------------------------------------------------------

    @property
    def view(self) -> View:
        """Who counts with what, by what is here; for good once there is a decision."""
        if self._final is not None:
            return self._final
        usable = {
            peer_id: its if len(its) == 2 else [it for it in its if it.digest in self._held]
            for peer_id, its in self._known.items()
        }
        return _view(it for its in usable.values() for it in its)

    @property
    def contributors(self) -> frozenset[str]:
        """Peers that have contributed, as far as known, without us."""
        return frozenset(self._known) - {self.me}

    @property
    def was_heard(self) -> bool:
        """Whether anybody else is in this round, and so may know of our contribution, and tell of it."""
        return bool(self._views)

    def ballot(self) -> FederatedBallot:
        """What to tell others."""
        view = self.view
        if view not in self._shown:
            self._shown.append(view)
        listed = [it for peer_id in sorted(view) for it in self._known[peer_id] if view[peer_id] in (_what(it), TWICE)]
        head = self.terms.head
        return FederatedBallot(
            run=self.terms.run, round=head.round, base=head.base, contributions=tuple(listed),
            is_final=self._final is not None, head_round=head.round, head_base=head.base,
        )  # fmt: skip

    def missing_from(self, peer_id: str, *, with_others: bool) -> list[Contribution]:
        """Updates that a peer has and we don't: its own, and those of others where that is asked for."""
        has = self._views.get(peer_id, {})
        return [
            its[0]
            for owner, its in sorted(self._known.items())
            if len(its) == 1
            and its[0].digest not in self._held
            and owner not in self.refused
            and has.get(owner) == _what(its[0])
            and (with_others or owner == peer_id)
        ]

    def decide(self, now: float) -> Sequence[Contribution] | None:
        """The contributions that count, in the order of their peers' ids; None while that is not known.

        Raises:
            RoundFailed: the round has ended with fewer than it needs.
        """
        if self._final is None:
            self._final = self._decision(now)
        if self._final is None:
            return None
        final = self._final
        return [it for peer_id in sorted(final) for it in self._known[peer_id] if _what(it) == final[peer_id]]

    # -- details --------------------------------------------------------------------------------------------------

    def _decision(self, now: float) -> View | None:
        view = self.view
        num_clients = _num_counting(view)
        finals = self._finals()
        for final in finals:
            if self._has_all(final):
                return final
        if now >= self.terms.ends_at:
            if num_clients >= self.terms.min_clients:
                return view
            raise RoundFailed(
                f"{num_clients} clients came to round {self.terms.head.round}, need {self.terms.min_clients}"
            )
        if num_clients < self.terms.min_clients or finals:
            return None
        waits = (self.expected | self.contributors) - self.unreachable - set(view) - set(self.refused)
        if waits and now < self.terms.collect_until:
            return None
        return view if all(self._agrees(peer_id, view) for peer_id in self._partners(view)) else None

    def _partners(self, view: View) -> set[str]:
        """Whom we have to hear: all but those whose updates aren't good."""
        refused = set(self.refused) - set(view)
        return (self.peers | self.contributors) - refused - self.unreachable - {self.me}

    def _agrees(self, peer_id: str, view: View) -> bool:
        return (self._views.get(peer_id) if peer_id in view else self._absent.get(peer_id)) == view

    def _finals(self) -> list[View]:
        """Final views of others that we believe: of enough clients, and we have had them ourselves, or most whom they
        name say so."""
        found: dict[tuple[tuple[str, str], ...], set[str]] = {}
        for peer_id, final in self._others_final.items():
            found.setdefault(tuple(sorted(final.items())), set()).add(peer_id)
        return [dict(final) for final, by in sorted(found.items()) if self._is_believed(dict(final), by)]

    def _is_believed(self, final: View, said_by: set[str]) -> bool:
        if _num_counting(final) < self.terms.min_clients:
            return False
        named = {peer_id for peer_id, what in final.items() if what != TWICE} - self.unreachable - {self.me}
        return final in self._shown or 2 * len(said_by & named) > len(named)

    def _has_all(self, view: View) -> bool:
        """Whether all that counts in a view is here."""
        return all(
            what == TWICE or any(_what(it) == what and it.digest in self._held for it in self._known.get(peer_id, ()))
            for peer_id, what in view.items()
        )


def _what(contribution: Contribution) -> str:
    return f"{contribution.digest}:{contribution.num_examples}"


def _view(contributions: Iterable[Contribution]) -> dict[str, str]:
    view: dict[str, str] = {}
    for it in contributions:
        what = _what(it)
        view[it.peer_id] = what if view.get(it.peer_id, what) == what else TWICE
    return view


def _num_counting(view: View) -> int:
    return sum(what != TWICE for what in view.values())
