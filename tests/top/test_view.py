"""What the terminal shows, on a narrow one, too."""

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from swarm.top.scrape import Sample, parse
from swarm.top.view import MAX_ROWS, draw_blocks, draw_server, draw_swarm
from tests.health.fakes import random_model

METRICS = """
# TYPE swarm_server_state gauge
swarm_server_state 2.0
# TYPE swarm_server_info gauge
swarm_server_info{model="tiny",peer_id="12D3KooWabcdefgh",blocks="0:6",quantization="none",dtype="float32"} 1.0
# TYPE swarm_server_tokens counter
swarm_server_tokens_total %d
# TYPE swarm_server_batch_seconds histogram
swarm_server_batch_seconds_bucket{le="1.0"} %d
swarm_server_batch_seconds_bucket{le="+Inf"} %d
swarm_server_batch_seconds_count %d
swarm_server_batch_seconds_sum %f
# TYPE swarm_server_network_bytes counter
swarm_server_network_bytes_total{direction="received"} %d
# TYPE swarm_server_kv_tokens_total gauge
swarm_server_kv_tokens_total 1000
# TYPE swarm_server_kv_tokens_free gauge
swarm_server_kv_tokens_free 250
"""


def text_of(renderable, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(renderable)
    return console.file.getvalue()


def sample(tokens: int, batches: int, seconds: float, received: int) -> Sample:
    return parse(METRICS % (tokens, batches, batches, batches, seconds, received))


def test_a_swarm_shows_models_and_servers():
    """Verdict, reason, every server; of very many only the first."""
    model = random_model(8)
    text = text_of(draw_swarm([model], num_peers=3))
    assert model.name in text and model.verdict in text and model.reason in text
    assert all(server.label in text for server in model.servers)
    assert f"{120 - MAX_ROWS} more" in text_of(draw_swarm([random_model(120)], num_peers=3))


def test_an_empty_swarm_is_said_to_be_empty():
    """And how many peers there are nevertheless."""
    assert "nobody announces a model yet; 3 peers" in text_of(draw_swarm([], num_peers=3))


@settings(max_examples=20)
@given(st.integers(0, 30), st.integers(1, 300), st.integers(20, 200))
def test_every_terminal_has_room(num_servers: int, num_blocks: int, width: int):
    """However many servers, blocks and columns: no line is longer than the terminal."""
    text = text_of(draw_swarm([random_model(num_servers, num_blocks=num_blocks)], num_peers=1), width)
    assert max(map(len, text.splitlines())) <= width


@given(st.lists(st.integers(0, 9), min_size=1, max_size=500))
def test_the_line_of_blocks_hides_no_gap(replicas: list[int]):
    """A block that nobody serves shows, also where several blocks share a sign."""
    line = draw_blocks(replicas).plain
    assert len(line) <= 96 and ("·" in line) == (0 in replicas)


def test_a_server_shows_what_it_did_between_two_looks():
    """Rates and means of the interval, not since the start; nothing done is a dash, not zero milliseconds."""
    before, now = sample(100, 10, 5.0, 0), sample(150, 30, 5.4, 2048)
    text = text_of(draw_server(before, now, seconds=2.0))
    assert "25.0" in text and "20 ms" in text and "in 1.0 KiB/s" in text and "750 of 1000 tokens" in text
    assert "online" in text and "0:6, none, float32" in text and "…abcdefgh" in text
    idle = text_of(draw_server(now, now, seconds=2.0))
    assert "step       –" in idle


def test_a_restarted_server_has_no_negative_rates():
    """Counters that fell count as nothing."""
    text = text_of(draw_server(sample(100, 10, 5.0, 9999), sample(1, 1, 0.1, 1), seconds=1.0))
    assert "-" not in text.replace("–", "")


@pytest.mark.parametrize("text", ["", "hello {", "up 1", "a{b=} c", "# TYPE x counter\nx nan nan nan"])
def test_what_is_no_servers_metrics_is_refused(text: str):
    """Another program's metrics, or none."""
    from swarm.errors import PeerMisbehaved

    with pytest.raises(PeerMisbehaved):
        parse(text)
