"""Clients agree whose updates count, in any order of events and whoever vanishes; lies are caught or do little."""

import random
from hashlib import sha256

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from swarm.errors import PeerMisbehaved, RoundFailed
from swarm.federated.agreement import MAX_CLIENTS, Head, Round, Terms, best_head, contribute
from swarm.identity import Identity
from swarm.protocol import Contribution, FederatedBallot, decode, encode

RUN, BASE = "a" * 64, "b" * 64
HEAD = Head(3, BASE)
IDENTITIES = [Identity(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)) for number in range(1, 9)]


def digest_of(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def contribution(number: int, content: str = "", num_examples: int = 10) -> Contribution:
    identity = IDENTITIES[number]
    return contribute(identity, RUN, HEAD, digest_of(f"{number} {content}"), num_examples)


def terms(**changes) -> Terms:
    return Terms(**{"run": RUN, "head": HEAD, "min_clients": 2, "collect_until": 10.0, "ends_at": 20.0, **changes})


def make_round(number: int, **changes) -> Round:
    return Round(terms(**changes), contribution(number))


class Simulation:
    """Clients that talk, fetch, vanish and come late, in the order that a seed gives."""

    def __init__(self, seed: int, num_clients: int, num_late: int, num_crashes: int):
        self.random = random.Random(seed)
        self.now = 0.0
        self.rounds: dict[int, Round] = {}
        self.waiting = list(range(num_clients))
        self.random.shuffle(self.waiting)
        self.num_late, self.num_crashes = num_late, num_crashes
        self.gone: set[int] = set()
        self.in_flight: list[tuple[int, int, bytes, FederatedBallot]] = []
        self.everybody = {IDENTITIES[number].peer_id for number in range(num_clients)}

    def run(self) -> list[list[str]]:
        """What those who are there in the end have decided."""
        for _ in range(self.random.randrange(20, 400)):
            self.random.choice([self.enter, self.ask, self.ask, self.ask, self.deliver, self.crash, self.decide])()
        self.num_late = 0
        while self.waiting:
            self.enter()
        self.now = max(self.now, 11.0)  # nobody is waited for any more
        for _ in range(20):
            for one in self.alive:
                for other in list(self.rounds):
                    self.ask_one(one, other, is_prompt=True)
            for one in self.alive:
                self.rounds[one].decide(self.now)
        decided = [self.rounds[one].decide(self.now) for one in self.alive]
        return [[it.peer_id + it.digest for it in it or ()] for it in decided]

    @property
    def alive(self) -> list[int]:
        return [number for number in self.rounds if number not in self.gone]

    def enter(self) -> None:
        if len(self.waiting) > self.num_late:
            number = self.waiting.pop()
            self.rounds[number] = make_round(number)
            self.rounds[number].peers = self.everybody - {IDENTITIES[number].peer_id}
            self.rounds[number].expected = set(self.rounds[number].peers)
        elif self.alive and not self.random.randrange(10):
            self.now = 11.0

    def ask(self) -> None:
        if len(self.alive) > 1:
            self.ask_one(self.random.choice(self.alive), self.random.choice([*self.rounds, *self.waiting]))

    def ask_one(self, one: int, other: int, *, is_prompt: bool = False) -> None:
        if one == other:
            return
        if other in self.gone:
            self.rounds[one].unreachable.add(IDENTITIES[other].peer_id)
            return
        asked = self.rounds[one].ballot()
        if other in self.rounds:
            self.hear(other, one, encode(asked), None)
            answer = (one, other, encode(self.rounds[other].ballot()), asked)
        else:
            answer = (one, other, encode(replace(asked, contributions=(), is_final=False)), asked)
        if is_prompt:
            self.hear(*answer)
        else:
            self.in_flight.append(answer)
        if other in self.rounds:
            self.fetch(one, other)
            self.fetch(other, one)

    def fetch(self, one: int, other: int) -> None:
        for it in self.rounds[one].missing_from(IDENTITIES[other].peer_id, with_others=True):
            if self.random.random() < 0.7:
                self.rounds[one].hold(it.digest)

    def deliver(self) -> None:
        if self.in_flight:
            one, other, data, asked = self.in_flight.pop(self.random.randrange(len(self.in_flight)))
            if one not in self.gone:
                self.hear(one, other, data, asked)

    def hear(self, one: int, other: int, data: bytes, asked: FederatedBallot | None) -> None:
        ballot = decode(data)
        self.rounds[one].add(ballot.contributions)
        self.rounds[one].hear(IDENTITIES[other].peer_id, ballot, to=asked)

    def crash(self) -> None:
        if self.num_crashes and len(self.alive) > 2 and not self.random.randrange(5):
            self.num_crashes -= 1
            self.gone.add(self.random.choice(self.alive))

    def decide(self) -> None:
        if self.alive:
            self.rounds[self.random.choice(self.alive)].decide(self.now)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 1 << 40), st.integers(2, 6), st.integers(0, 2), st.integers(0, 4))
def test_all_who_are_left_agree(seed, num_clients, num_late, num_crashes):
    """Whoever crashes when, comes late, and whatever order messages have: one decision, the same for all."""
    decided = Simulation(seed, num_clients, min(num_late, num_clients - 2), num_crashes).run()
    assert decided and all(decided), "somebody has not decided"
    assert all(it == decided[0] for it in decided)
    assert len(decided[0]) >= 2


def talk(one: Round, other: Round) -> None:
    """Both hear of each other, and fetch what they lack."""
    for receiver, sender in ((one, other), (other, one)):
        ballot = sender.ballot()
        receiver.add(ballot.contributions)
        receiver.hear(sender.me, ballot)
        for it in receiver.missing_from(sender.me, with_others=True):
            receiver.hold(it.digest)


def names(decision) -> set[str]:
    return {it.peer_id for it in decision}


def test_a_client_waits_for_those_it_expects_until_its_deadline():
    """And not for one that it can't reach."""
    one, other, third = make_round(0), make_round(1), IDENTITIES[2].peer_id
    one.expected = {other.me, third}
    talk(one, other)
    talk(one, other)
    assert one.decide(9.9) is None
    assert names(one.decide(10.0)) == {one.me, other.me}
    again, other = make_round(0), make_round(1)
    again.expected = {other.me, third}
    talk(again, other)
    talk(again, other)
    again.unreachable.add(third)
    assert names(again.decide(0.0)) == {again.me, other.me}


def test_who_comes_late_takes_over_what_the_others_have():
    """Its own update doesn't count."""
    one, other, late = make_round(0), make_round(1), make_round(2)
    talk(one, other)
    talk(one, other)
    assert one.decide(0.0) and other.decide(0.0)
    for early in (one, other):
        talk(late, early)
    assert names(late.decide(0.0)) == {one.me, other.me}


def test_one_liar_can_not_end_a_round_without_us():
    """A final ballot that we have never held, of a minority, is not believed."""
    one, other, liar = make_round(0), make_round(1), make_round(2, min_clients=1)
    assert names(liar.decide(0.0)) == {liar.me}
    talk(one, other)
    talk(one, liar)
    assert one.decide(0.0) is None or names(one.decide(0.0)) != {liar.me}


def test_who_signs_two_contributions_counts_in_none():
    """Both ends show it to each other, and agree."""
    one, other = make_round(0), make_round(1)
    twice = [contribution(2, "a"), contribution(2, "b")]
    for its, mine in zip((one, other), twice, strict=True):
        its.add([mine])
        its.hold(mine.digest)
        its.unreachable.add(mine.peer_id)
    for _ in range(3):
        talk(one, other)
    assert names(one.decide(0.0)) == names(other.decide(0.0)) == {one.me, other.me}
    assert one.view[IDENTITIES[2].peer_id] == other.view[IDENTITIES[2].peer_id] == ""


def test_the_same_update_with_two_weights_is_two_contributions():
    """Or clients would weigh it differently."""
    one = make_round(0)
    one.add([contribution(1, num_examples=1), contribution(1, num_examples=1000)])
    one.hold(contribution(1).digest)
    assert one.view[IDENTITIES[1].peer_id] == ""


@pytest.mark.parametrize(
    "change",
    [
        {"peer_id": IDENTITIES[2].peer_id},
        {"num_examples": 11},
        {"digest": "c" * 64},
        {"signature": bytes(64)},
        {"peer_id": "x"},
    ],
)
def test_what_is_not_signed_so_is_refused(change):
    """Another name, number or digest than was signed."""
    good = contribution(1)
    fields = {name: getattr(good, name) for name in ("peer_id", "digest", "num_examples", "signature")}
    one = make_round(0)
    with pytest.raises(PeerMisbehaved, match="not signed"):
        one.add([Contribution(**{**fields, **change})])
    assert not one.contributors


def test_a_signature_is_for_one_round_of_one_run():
    """It can't be used again later."""
    for other in (Head(4, BASE), Head(3, "c" * 64)):
        with pytest.raises(PeerMisbehaved, match="not signed"):
            make_round(0).add([contribute(IDENTITIES[1], RUN, other, "d" * 64, 1)])
    with pytest.raises(PeerMisbehaved, match="not signed"):
        make_round(0).add([contribute(IDENTITIES[1], "c" * 64, HEAD, "d" * 64, 1)])


def test_only_members_may_contribute():
    """Where the run has a list of them."""
    one = make_round(0, members=frozenset({IDENTITIES[0].peer_id, IDENTITIES[1].peer_id}))
    one.add([contribution(1)])
    with pytest.raises(PeerMisbehaved, match="no member"):
        one.add([contribution(2)])


def test_a_round_has_room_for_so_many():
    """The next one is refused, so memory is bounded."""
    one = make_round(0)
    more = [Identity(Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big"))) for number in range(100, 200)]
    with pytest.raises(PeerMisbehaved, match=f"more than {MAX_CLIENTS} clients"):
        one.add(contribute(identity, RUN, HEAD, "d" * 64, 1) for identity in more)
    assert len(one.contributors) == MAX_CLIENTS - 1


def test_too_few_make_no_round():
    """Both numbers are in the message, and the end of the round is its end."""
    one = make_round(0, min_clients=3)
    other = make_round(1, min_clients=3)
    talk(one, other)
    assert one.decide(19.9) is None
    with pytest.raises(RoundFailed, match="2 clients came to round 3, need 3"):
        one.decide(20.0)


def test_a_silent_contributor_stops_no_round():
    """One that is reachable and never says what it holds delays it to its end."""
    one = make_round(0)
    silent = contribution(1)
    one.add([silent])
    one.hold(silent.digest)
    assert one.decide(19.9) is None
    assert names(one.decide(20.0)) == {one.me, silent.peer_id}


def test_most_clients_say_where_a_run_is():
    """More than half of all, the one that asks counted; nobody goes back to the beginning, or nowhere."""
    here, there, begin = Head(2, "a" * 64), Head(3, "b" * 64), Head(0, "c" * 64)
    assert best_head(here, [here, there]) == here
    assert best_head(here, [there, there]) == there
    assert best_head(here, [there, there, begin]) == here
    assert best_head(here, [begin, begin, begin]) == here
    assert best_head(begin, [here, here]) == here
    assert best_head(here, [Head(1 << 62, "f" * 64)] * 3) == here


@pytest.mark.parametrize("ours", [Head(0, "c" * 64), Head(2, "a" * 64)])
def test_one_that_lies_about_where_it_is_takes_nobody_along(ours):
    """In a run of two or more, before the first round as later."""
    for num_honest in range(3):
        assert best_head(ours, [Head(ours.round + 1, "f" * 64), *[ours] * num_honest]) == ours


def test_who_is_not_in_a_run_yet_goes_where_most_are():
    """Its own place is no vote; of equally many, the beginning wins, else the latest."""
    here, there, begin = Head(2, "a" * 64), Head(3, "b" * 64), Head(0, "c" * 64)
    for others, expected in (([], begin), ([here], here), ([here, there], there), ([here, begin], begin)):
        assert best_head(begin, others, is_in_run=False) == expected
    assert best_head(begin, [here, here, there, begin], is_in_run=False) == here


@pytest.mark.parametrize("is_echo", [True, False])
def test_a_final_view_of_too_few_is_not_believed(is_echo):
    """Our own contribution, sent back as the end of the round, is none; nor are others'."""
    one, liar = make_round(0), make_round(1, min_clients=1)
    if not is_echo:
        liar.decide(0.0)
    ballot = replace(one.ballot() if is_echo else liar.ballot(), is_final=True)
    one.add(ballot.contributions)
    one.hold(contribution(1).digest)
    one.hear(liar.me, ballot, to=one.ballot())
    one.unreachable.add(IDENTITIES[2].peer_id)
    decided = one.decide(0.0)
    assert decided is None or len(decided) >= 2
