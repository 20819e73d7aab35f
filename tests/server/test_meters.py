"""What a server counts: histograms add up, batches and sessions are told apart."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import InvalidRequest, PeerBusy, PeerDisconnected
from swarm.protocol import Forwarding, LinkDown, LinkFault, Waiting
from swarm.server.host_pages import CopyPage, SwapIn, SwapOut, Swapped
from swarm.server.meters import SECONDS, BatchMeter, Histogram, SessionMeter
from swarm.server.work import Produced


@given(st.lists(st.floats(0, 100)))
def test_a_histogram_says_how_many_values_were_at_most_each_edge(values: list[float]):
    """As Prometheus wants it: cumulative, the last edge holds all, and the sum is theirs."""
    histogram = Histogram(SECONDS)
    for value in values:
        histogram.observe(value)
    expected = [(str(edge), sum(value <= edge for value in values)) for edge in SECONDS]
    assert histogram.cumulative() == [*expected, ("+Inf", len(values))]
    assert histogram.count == len(values) and histogram.sum == pytest.approx(sum(values))


def produced(num_tokens: int, *, queue_s: float = 0.01) -> Produced:
    return Produced(step_id=0, rows=(), num_tokens=num_tokens, queue_s=queue_s, compute_s=0.02, batch_tokens=9)


def make_batch(*, num_rows: int = 3, num_tokens: int = 10, num_decode: int = 2, notices=(), moves=()):
    return SimpleNamespace(
        rows=[None] * num_rows, num_tokens=num_tokens, num_decode=num_decode, notices=list(notices), moves=list(moves)
    )


def test_batches_are_counted_by_tokens_rows_and_time():
    """Prompt and decode tokens apart; a batch that only moves pages is no batch."""
    meter = BatchMeter()
    meter.ran(make_batch(), 0.03)
    meter.ran(make_batch(num_rows=0, num_tokens=0, num_decode=0), 9.0)
    assert (meter.tokens.count, meter.tokens.sum, meter.rows.sum, meter.step_s.sum) == (1, 10, 3, 0.03)
    assert (meter.num_decode, meter.num_prompt, meter.num_failed) == (2, 8, 0)
    meter.failed()
    assert meter.num_failed == 1


def test_batches_of_nothing_but_decoding_are_counted_by_their_size():
    """By rows and blocks; not those with prompts, adapters, or rows that leave the span elsewhere."""

    def batch(*ways, num_adapters=0, num_tokens=None):
        rows = [SimpleNamespace(chunk=SimpleNamespace(entry=entry, exit=end)) for entry, end in ways]
        made = make_batch(num_tokens=num_tokens or len(rows), num_decode=len(rows))
        made.rows, made.adapters = rows, SimpleNamespace(num_adapters=num_adapters)
        return made

    meter = BatchMeter()
    for seconds in (0.5, 0.25):
        meter.ran(batch((2, 6), (2, 6)), seconds)
    meter.ran(batch((3, 6)), 0.125)
    for other in (batch((2, 6), (3, 6)), batch((2, 6), num_adapters=1), batch((2, 6), num_tokens=7)):
        meter.ran(other, 9.0)
    assert meter.plain == {(2, 4): (2, 0.75), (1, 3): (1, 0.125)}


def test_pages_that_move_and_prompts_that_are_known_are_counted():
    """From what the scheduler decided before a batch."""
    swapped = Swapped(num_pages=4, layouts=(), num_bytes=1)
    moves = [
        CopyPage(source=1, destination=2),
        SwapOut(session=None, swapped=swapped, pages=(1, 2, 3, 4)),
        SwapIn(session=None, swapped=swapped, pages=(5, 6)),
    ]
    meter = BatchMeter()
    meter.scheduled(make_batch(notices=[(None, produced(32))], moves=moves))
    assert (meter.num_cached, meter.num_copied, meter.num_swapped_out, meter.num_swapped_in) == (32, 1, 4, 2)


def test_sessions_that_somebody_left_did_not_fail():
    """Errors of the work are failures; a client that went away is none."""
    meter = SessionMeter()
    for error in (None, PeerDisconnected("gone"), InvalidRequest("wrong"), PeerBusy("full")):
        meter.opened()
        meter.end(error)
    assert (meter.num_opened, meter.num_failed) == (4, 2)
    assert meter.ended == {"done": 1, "PeerDisconnected": 1, "InvalidRequest": 1, "PeerBusy": 1}


def test_what_clients_are_told_is_counted_by_kind():
    """Links made and lost, and waits for room."""
    meter = SessionMeter()
    meter.told(Forwarding(epoch=0))
    meter.told(LinkDown(epoch=0, fault=LinkFault.HISTORY_LOST, text=""))
    meter.told(Waiting(step_id=0, expected_s=1.0))
    assert (meter.num_hops, meter.links_down, meter.num_waits) == (1, {"HISTORY_LOST": 1}, 1)


def test_a_batchs_part_goes_into_load_and_counts():
    """Tokens, and how long they waited."""
    meter = SessionMeter()
    meter.record(1.0, produced(5, queue_s=0.5))
    meter.record(1.0, produced(2, queue_s=0.0))
    assert meter.num_tokens == 7 and meter.queue_s.sum == 0.5 and meter.queue_s.count == 2
    assert meter.load.mean_s(1.0) == pytest.approx((0.25, 0.02))
