"""Who counts as serving, which blocks are covered, what follows; and no claim of a stranger breaks it."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.adapters.notes import AdapterNote
from swarm.health.compose import (
    CANARY_VALID_S,
    GONE_S,
    Answer,
    clean,
    compose_model,
    count_replicas,
    judge,
)
from swarm.health.state import Model, Reach, Status, Verdict
from swarm.registry import ServerRecord
from swarm.types import ServerState
from tests.health.fakes import NOW, make_answer, make_canary, make_entry, make_record, peer_ids

BLOCKS = 6
A, B, C = peer_ids(3)


def compose(records: list[ServerRecord], answers: dict[str, Answer] | None = None, **fields) -> Model:
    """A model of six blocks; every server has answered unless told otherwise."""
    answered = {record.peer_id: make_answer(record) for record in records}
    given = {"canary": None, "before": None, "now": NOW}
    return compose_model(make_entry(BLOCKS), records, answered if answers is None else answers, **{**given, **fields})


spans = st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, BLOCKS)).filter(lambda span: span[0] < span[1])


@given(st.lists(st.tuples(spans, st.sampled_from(ServerState), st.sampled_from(Reach)), max_size=8))
def test_a_block_is_covered_by_those_who_are_online_and_answer(servers):
    """Replicas are what counting by hand gives; the verdict follows from them."""
    peers = peer_ids(len(servers))
    records = [
        make_record(peer, f"{span[0]}:{span[1]}", state=state)
        for peer, (span, state, _) in zip(peers, servers, strict=True)
    ]
    answers = {
        record.peer_id: make_answer(record, reach=reach)
        for record, (_, _, reach) in zip(records, servers, strict=True)
        if reach is not Reach.UNKNOWN
    }
    model = compose(records, answers)
    expected = [
        sum(
            span[0] <= block < span[1] and state is ServerState.ONLINE and reach is not Reach.NONE
            for span, state, reach in servers
        )
        for block in range(BLOCKS)
    ]
    assert list(model.replicas) == expected == list(count_replicas(model.servers, BLOCKS))
    assert model.is_usable == (min(expected) > 0)
    assert (model.verdict is Verdict.USABLE) == (min(expected) > 1)
    assert bool(model.missing) == (min(expected) == 0)
    assert model.room_tokens == min(expected) * 8192


def test_what_a_server_says_itself_is_newer_than_its_record():
    """Load and room come from the answer; without one, from the record, and the rest is unknown."""
    record = make_record(A, "0:6", load=0.1, kv_free_tokens=100)
    asked = compose([record], {A: make_answer(record, load=0.7, kv_free_tokens=50)}).servers[0]
    assert (asked.load, asked.kv_free_tokens, asked.queue_ms, asked.rtt_ms) == (0.7, 50, 0.8, 12.0)
    silent = compose([record], {}).servers[0]
    assert (silent.load, silent.kv_free_tokens, silent.queue_ms, silent.rtt_ms) == (0.1, 100, None, None)
    assert silent.status is Status.ONLINE and silent.reach is Reach.UNKNOWN


def test_an_answer_about_another_model_is_not_believed():
    """A server whose record and Info contradict each other keeps what it announced."""
    record = make_record(A, "0:6", load=0.1)
    server = compose([record], {A: make_answer(record, model="ab" * 32, load=0.9)}).servers[0]
    assert server.load == 0.1 and server.num_sessions is None


def test_a_server_that_does_not_answer_serves_nothing():
    """It is shown, with the reason, and its blocks are missing."""
    record = make_record(A, "0:3")
    model = compose([record], {A: Answer(asked_at=0.0, reach=Reach.NONE, trouble="refused")})
    assert model.servers[0].status is Status.UNREACHABLE and model.servers[0].trouble == "refused"
    assert model.missing == "0:6" and model.verdict is Verdict.INCOMPLETE


def test_a_server_that_vanished_is_shown_as_gone_for_a_while():
    """It keeps its name and blocks, serves nothing, and is forgotten later."""
    before = compose([make_record(A, "0:6", public_name="gpu7"), make_record(B, "0:6")])
    after = compose([make_record(B, "0:6")], before=before, now=NOW + 60)
    gone = next(server for server in after.servers if server.peer_id == A)
    assert (gone.status, gone.name, gone.tokens_per_s) == (Status.GONE, "gpu7", None)
    assert after.replicas == (1,) * BLOCKS
    still = compose([make_record(B, "0:6")], before=after, now=NOW + GONE_S - 1)
    assert len(still.servers) == 2
    assert len(compose([make_record(B, "0:6")], before=still, now=NOW + GONE_S + 1).servers) == 1
    back = compose([make_record(A, "0:6")], before=after, now=NOW + 90)
    assert [server.status for server in back.servers if server.peer_id == A] == [Status.ONLINE]


def test_tokens_are_counted_once_however_many_servers_they_pass():
    """Three servers in a row that each saw 20 tokens/s: 20, not 60; and one liar among them changes nothing."""
    records = [make_record(A, "0:2"), make_record(B, "2:4"), make_record(C, "4:6")]
    answers = {record.peer_id: make_answer(record, tokens_per_s=20.0, num_sessions=3) for record in records}
    model = compose(records, answers)
    assert (model.tokens_per_s, model.num_sessions) == (20.0, 3)
    answers[C] = make_answer(records[2], tokens_per_s=1e12, num_sessions=1 << 24)
    assert compose(records, answers).tokens_per_s == pytest.approx(20.0, rel=1e-3)


def test_blocks_beyond_the_model_are_not_believed():
    """A record that ends after the last block is left out."""
    assert compose([make_record(A, "0:7")]).servers == ()


def test_a_canary_that_did_not_come_back_is_a_failure_until_it_is_old():
    """All blocks are there, and yet nothing comes through; but an old canary says nothing."""
    lost = make_canary([], NOW, ok=False)
    assert judge((2, 2), lost, NOW)[0] is Verdict.FAILING
    assert judge((2, 2), lost, NOW + CANARY_VALID_S + 60)[0] is Verdict.USABLE
    assert judge((2, 0), lost, NOW)[0] is Verdict.INCOMPLETE
    assert judge((2, 1), make_canary([], NOW), NOW) == (Verdict.AT_RISK, "one server only for block 1:2")


@given(st.text(max_size=400))
def test_a_strangers_text_is_printable_and_short(text: str):
    """No control characters for terminals, no pages of text."""
    cleaned = clean(text)
    assert len(cleaned) <= 200 and all(char.isprintable() or char == "\N{REPLACEMENT CHARACTER}" for char in cleaned)


def test_the_name_of_a_model_is_a_strangers_text_too():
    """An escape sequence in a name does not reach a terminal."""
    entry = make_entry(BLOCKS, name="evil\x1b[2J")
    model = compose_model(entry, [], {}, canary=None, before=None, now=NOW)
    assert "\x1b" not in model.name


def test_a_digest_finds_its_model_only_when_it_is_clear_which():
    """The beginning is enough, unless two begin so."""
    from tests.health.fakes import make_state

    one, two = (replace_digest(compose([]), digest) for digest in ("ab" * 32, "ac" * 32))
    state = make_state(one, two)
    assert state.model("ab") is one and state.model("a") is None and state.model("ff") is None


def replace_digest(model: Model, digest: str) -> Model:
    import msgspec

    return msgspec.structs.replace(model, digest=digest)


def test_records_are_dataclasses_of_the_registry():
    """The fakes are made of what the registry really gives."""
    assert replace(make_record(A, "0:1"), load=0.5).load == 0.5


def test_adapters_are_those_that_servers_announce():
    """Hash, rank and place of each; a server that is gone has none."""
    notes = tuple(AdapterNote.of(f"{number:02x}" * 32, 12, on_device=number == 7) for number in (7, 8))
    record = make_record(A, "0:1", adapters=notes)
    before = compose([record])
    (server,) = before.servers
    assert [(it.short, it.max_rank, it.on_device) for it in server.adapters] == [
        ("07070707", 16, True),
        ("08080808", 16, False),
    ]
    assert server.num_attached == 1
    gone = compose([], before=before).servers[0]
    assert gone.status is Status.GONE and gone.adapters == ()
