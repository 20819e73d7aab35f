"""The session machine against simulated servers that fail, restart and refuse to roll back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import InvalidRequest
from swarm.session import Done, FindRoute, Hop, RowHistory, Send, Session
from swarm.types import BlockRange

HIDDEN = 2


def run_blocks(inputs: torch.Tensor, blocks: BlockRange) -> torch.Tensor:
    """A stand-in for causal blocks: each output depends on all inputs so far and on the block index."""
    for block in blocks:
        inputs = (inputs.cumsum(0) * 0.5 + block) % 97.0
    return inputs


class FakeServer:
    """Holds the inputs of one link, as a server's KV cache would, and checks every step like a hostile one."""

    def __init__(self, blocks: BlockRange, batch_size: int):
        self.blocks = blocks
        self.rows = [torch.zeros(0, HIDDEN, dtype=torch.float64) for _ in range(batch_size)]

    def step(self, send: Send) -> torch.Tensor:
        if send.order is not None:
            self.rows = [self.rows[old] for old in send.order]
        outputs = []
        pieces = send.hidden_states.split(list(send.num_tokens))
        for row, (position, wanted, piece) in enumerate(zip(send.positions, send.num_outputs, pieces, strict=True)):
            assert position <= len(self.rows[row])
            self.rows[row] = torch.cat([self.rows[row][:position], piece])
            outputs.append(run_blocks(self.rows[row], self.blocks)[len(self.rows[row]) - wanted :])
        return torch.cat(outputs)


class Driver:
    """Carries out actions; `choose` decides routes, failures and chunk sizes."""

    def __init__(self, session: Session, choose, max_failures: int = 6):
        self.session, self.choose, self.failures_left = session, choose, max_failures
        self.servers: dict[int, FakeServer] = {}
        self.sent_tokens: list[int] = []

    def run(self, action) -> torch.Tensor:
        while not isinstance(action, Done):
            action = self.find_route(action) if isinstance(action, FindRoute) else self.send(action)
        return action.outputs

    def find_route(self, action: FindRoute):
        hops, start = [], action.blocks.start
        while start < action.blocks.end:
            end = self.choose(st.integers(start + 1, action.blocks.end))
            hops.append(Hop(peer_id=f"peer-{start}-{end}", blocks=BlockRange(start, end)))
            start = end
        return self.session.routed(hops)

    def send(self, action: Send):
        if action.link not in self.servers:
            self.servers[action.link] = FakeServer(action.hop.blocks, self.session.batch_size)
            limit = self.choose(st.sampled_from([3, 7, 1000]))
            self.session.opened(action.link, max_step_tokens=limit, can_rollback=self.choose(st.booleans()))
            return self.session.resend()
        if self.failures_left and self.choose(st.integers(0, 4)) == 0:
            self.failures_left -= 1
            if self.choose(st.booleans()):
                self.servers[action.link].step(action)  # it did the work, and its answer was lost
            return self.session.failed(action.link)
        self.sent_tokens.append(len(action.hidden_states))
        return self.session.received(action.link, self.servers[action.link].step(action))


def draw_step(choose, lengths, max_new):
    """A random step: rows reordered, rolled back, and extended by a few tokens each."""
    rows = len(lengths)
    order = choose(st.none() | st.lists(st.integers(0, rows - 1), min_size=rows, max_size=rows))
    kept = [lengths[old] for old in order] if order is not None else list(lengths)
    positions = [choose(st.integers(max(0, length - 2), length)) for length in kept]
    counts = [choose(st.integers(0, max_new)) for _ in range(rows)]
    if not sum(counts):
        counts[0] = 1
    outputs = [choose(st.integers(0, count)) for count in counts]
    if not sum(outputs):
        outputs[max(range(rows), key=lambda row: counts[row])] = 1
    return order, positions, counts, outputs


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_failure_schedule_yields_each_rows_own_outputs(data):
    """Failures, splits, chunks, beams and rollbacks never change what comes out."""
    choose = data.draw
    blocks = BlockRange(0, choose(st.integers(1, 5)))
    rows = choose(st.integers(1, 3))
    session = Session(blocks, batch_size=rows, max_length=1000)
    driver = Driver(session, choose)
    truth = [torch.zeros(0, HIDDEN, dtype=torch.float64) for _ in range(rows)]
    token = 0.0
    for _ in range(choose(st.integers(1, 4))):
        order, positions, counts, wanted = draw_step(choose, [len(row) for row in truth], max_new=5)
        new = torch.arange(token, token + sum(counts) * HIDDEN, dtype=torch.float64).view(-1, HIDDEN)
        token += 1.0
        if order is not None:
            truth = [truth[old] for old in order]
        pieces = zip(truth, positions, new.split(counts), strict=True)
        truth = [torch.cat([row[:position], piece]) for row, position, piece in pieces]
        outputs = driver.run(
            session.begin(new, positions=positions, num_tokens=counts, num_outputs=wanted, order=order)
        )
        expected = [run_blocks(row, blocks)[len(row) - count :] for row, count in zip(truth, wanted, strict=True)]
        torch.testing.assert_close(outputs, torch.cat(expected))
    assert session.lengths == tuple(len(row) for row in truth)


def serve(session: Session, action, servers: dict[int, FakeServer], route=None) -> tuple[torch.Tensor, list[Send]]:
    """Run actions without failures over one server for all blocks (or the given route); returns outputs and sends."""
    sends = []
    while not isinstance(action, Done):
        if isinstance(action, FindRoute):
            hops = route or [Hop(peer_id="spare", blocks=action.blocks)]
            action = session.routed([hop for hop in hops if action.blocks.covers(hop.blocks)])
            continue
        server = servers.setdefault(action.link, FakeServer(action.hop.blocks, session.batch_size))
        sends.append(action)
        action = session.received(action.link, server.step(action))
    return action.outputs, sends


def two_hops() -> list[Hop]:
    return [Hop(peer_id="a", blocks=BlockRange(0, 2)), Hop(peer_id="b", blocks=BlockRange(2, 4))]


def test_replay_sends_history_once_and_only_to_the_replacement():
    """After the second server dies its replacement gets all tokens in one message; the first gets only the new one."""
    session = Session(BlockRange(0, 4), batch_size=1, max_length=100)
    servers: dict[int, FakeServer] = {}
    serve(session, session.begin(torch.ones(5, HIDDEN), positions=[0], num_tokens=[5]), servers, two_hops())
    serve(session, session.begin(torch.ones(1, HIDDEN), positions=[5], num_tokens=[1]), servers)
    dead = max(session.hops)
    session.failed(dead)
    _, sends = serve(session, session.begin(torch.ones(1, HIDDEN), positions=[6], num_tokens=[1]), servers)
    assert [(send.hop.peer_id, len(send.hidden_states), send.is_replay) for send in sends] == [
        ("a", 1, False),
        ("spare", 7, True),
    ]
    assert session.num_replays == 1
    assert repr(session) == "<Session 2 hops | position 7/100 | 1 replayed>"


def test_decoding_sends_one_token_to_each_hop():
    """Without failures nothing is sent twice."""
    session = Session(BlockRange(0, 4), batch_size=2, max_length=100)
    servers: dict[int, FakeServer] = {}
    serve(session, session.begin(torch.ones(7, HIDDEN), positions=[0, 0], num_tokens=[5, 2]), servers, two_hops())
    _, sends = serve(session, session.begin(torch.ones(2, HIDDEN), positions=[5, 2], num_tokens=[1, 1]), servers)
    assert [(send.hop.peer_id, send.num_tokens, send.positions) for send in sends] == [
        ("a", (1, 1), (5, 2)),
        ("b", (1, 1), (5, 2)),
    ]


def test_last_hop_returns_only_the_outputs_that_are_wanted():
    """A prompt of five tokens whose last logits are needed brings one hidden state back from the last hop."""
    session = Session(BlockRange(0, 4), batch_size=1, max_length=100)
    action = session.begin(torch.ones(5, HIDDEN), positions=[0], num_tokens=[5], num_outputs=[1])
    outputs, sends = serve(session, action, {}, two_hops())
    assert [send.num_outputs for send in sends] == [(5,), (1,)] and outputs.shape == (1, HIDDEN)


def test_a_server_that_cannot_roll_back_is_replayed():
    """A recurrent server is given up on rollback, and the kept tokens are replayed from the start."""
    session = Session(BlockRange(0, 2), batch_size=1, max_length=100)
    servers: dict[int, FakeServer] = {}
    serve(session, session.begin(torch.ones(5, HIDDEN), positions=[0], num_tokens=[5]), servers)
    session.opened(min(session.hops), max_step_tokens=100, can_rollback=False)
    _, sends = serve(session, session.begin(torch.ones(1, HIDDEN), positions=[3], num_tokens=[1]), servers)
    assert [(send.positions, send.num_tokens) for send in sends] == [((0,), (4,))]


def test_abandoned_step_can_be_tried_again():
    """After a cancelled step the session replays what is uncertain and gives the right outputs."""
    session = Session(BlockRange(0, 2), batch_size=1, max_length=100)
    servers: dict[int, FakeServer] = {}
    serve(session, session.begin(torch.ones(3, HIDDEN), positions=[0], num_tokens=[3]), servers)
    session.begin(torch.ones(1, HIDDEN), positions=[3], num_tokens=[1])
    session.abandon()
    outputs, _ = serve(session, session.begin(torch.ones(1, HIDDEN), positions=[3], num_tokens=[1]), servers)
    expected = run_blocks(torch.ones(4, HIDDEN, dtype=torch.float64), BlockRange(0, 2))[3:]
    torch.testing.assert_close(outputs, expected)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"positions": [4], "num_tokens": [1]}, "holds 3 tokens, cannot continue at position 4"),
        ({"positions": [3], "num_tokens": [2]}, "need hidden states of 2 tokens"),
        ({"positions": [3, 3], "num_tokens": [1]}, "has 1 rows"),
        ({"positions": [3], "num_tokens": [1], "num_outputs": [2]}, "2 outputs"),
    ],
)
def test_steps_that_do_not_fit_are_refused(step, words):
    """Wrong positions, shapes and counts are the caller's fault, and named."""
    session = Session(BlockRange(0, 2), batch_size=1, max_length=4)
    serve(session, session.begin(torch.ones(3, HIDDEN), positions=[0], num_tokens=[3]), {})
    with pytest.raises(InvalidRequest, match=words):
        session.begin(torch.ones(1, HIDDEN), **step)


def test_route_must_cover_the_blocks():
    """A route with a hole is refused."""
    session = Session(BlockRange(0, 4), batch_size=1, max_length=4)
    session.begin(torch.ones(1, HIDDEN), positions=[0], num_tokens=[1])
    with pytest.raises(InvalidRequest, match="does not cover"):
        session.routed([Hop(peer_id="a", blocks=BlockRange(0, 3))])


@given(st.lists(st.integers(1, 4), max_size=6), st.data())
def test_row_history_slices_and_truncates_like_one_tensor(sizes, data):
    """Pieces behave as their concatenation."""
    whole = torch.arange(float(sum(sizes))).view(-1, 1)
    history = RowHistory()
    for piece in whole.split(sizes):
        history.append(piece)
    fork = history.fork()
    length = data.draw(st.integers(0, len(whole)))
    history.truncate(length)
    start = data.draw(st.integers(0, length))
    end = data.draw(st.integers(start, length))
    assert history.length == length and fork.length == len(whole)
    assert torch.equal(torch.cat([whole[:0], *history.slice(start, end)]), whole[start:end])
