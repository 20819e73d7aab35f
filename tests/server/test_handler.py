"""What a server admits: limits for all peers together, and a share for each."""

from types import SimpleNamespace

import pytest

from swarm.errors import PeerBusy
from swarm.server.handler import Handler, HandlerLimits


def make_handler(*, stateful: bool = False, hidden_size: int = 64, **limits) -> Handler:
    span = SimpleNamespace(stateful=stateful, hidden_size=hidden_size)
    executor = SimpleNamespace(span=span, total_tokens=1 << 20)
    return Handler(
        executor,
        model="0" * 64,
        model_name="m",
        quantization="none",
        max_positions=100,
        limits=HandlerLimits(**limits),
    )


def test_one_peer_gets_half_and_the_others_the_rest():
    """A peer with half of the sessions is refused another, while a second peer is let in."""
    handler = make_handler(max_sessions=8)
    for _ in range(4):
        handler._admit_rows(1, "greedy")
        handler._count("greedy", 1, 1)
    with pytest.raises(PeerBusy, match="you have 4 sessions"):
        handler._admit_rows(1, "greedy")
    handler._admit_rows(1, "other")
    for _ in range(4):
        handler._count("greedy", -1, -1)
    handler._admit_rows(1, "greedy")
    assert not handler._sessions_of and not handler._rows_of


def test_rows_with_recurrent_states_are_fewer():
    """Each has memory of its own that no page accounts for."""
    make_handler()._admit_rows(512, "a")
    with pytest.raises(PeerBusy, match="rows open"):
        make_handler(stateful=True)._admit_rows(512, "a")


def test_a_step_of_a_wide_model_fits_into_one_message():
    """Steps are limited in bytes, too: 1024 tokens of 65536 floats would not fit."""
    assert make_handler()._max_step_tokens == 1024
    assert make_handler(hidden_size=65536)._max_step_tokens * 65536 * 4 < 64 << 20
