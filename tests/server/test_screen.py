"""What an operator sees: always the same lines in a pipe, something friendlier on a terminal."""

import io
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from swarm.server.config import ServerConfig
from swarm.server.screen import Screen
from swarm.types import BlockRange
from tests.swarm.private.labs import lab_now

ADDRESS = "/ip4/192.0.2.7/tcp/31337/p2p/12D3KooWA1bysvV5nRqkEcKQPY1Z2oW7RjvqCJ4wJ4m6Xb6Yt4bA"


def show(
    *,
    terminal: bool,
    blocks: str = "0:16",
    metrics_url: str | None = None,
    reason: str = "",
    relays: Sequence[str] | None = None,
    **config,
) -> str:
    """All that a server's start prints, on a narrow terminal or into a pipe."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=60, color_system=None, highlight=False)
    plan = SimpleNamespace(
        checkpoint=SimpleNamespace(name="tiny[bold]", digest="ab" * 32),
        blocks=BlockRange.parse(blocks),
        num_blocks=30,
        quantization="none",
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    screen = Screen(ServerConfig(model="tiny", **config), plan, console)
    screen.joined([ADDRESS] if relays is None else [], plan, reason, relays=relays)
    for done in range(1, 4):
        screen.loaded(done, 3)
    serving = SimpleNamespace(executor=SimpleNamespace(total_tokens=4096), adapters={})
    screen.online(SimpleNamespace(plan=plan, metrics_url=metrics_url, serving=serving))
    screen.stopped()
    return console.file.getvalue()


def test_a_pipe_gets_the_lines_that_programs_wait_for():
    """Whole lines whatever the width: addresses, the way to join, ONLINE, the end."""
    lines = show(terminal=False).splitlines()
    assert f"  {ADDRESS}" in lines and "stopped" in lines and "loaded 3/3 blocks" in lines
    assert "ONLINE: blocks 0:16, unquantised float32 on cpu, KV cache for 4096 tokens" in lines
    assert any(f"--initial-peers {ADDRESS}" in line for line in lines)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_server_that_nobody_can_connect_to_says_who_carries_its_connections(terminal: bool):
    """It has no addresses of its own; others join at the peer at which it has joined."""
    text = show(terminal=terminal, relays=["12D3KooWRelay"], initial_peers=(ADDRESS,))
    assert "obody can connect to this machine" in text and "  12D3KooWRelay" in text and "listening" not in text
    assert not terminal or f"--initial-peers {ADDRESS}" in text


def test_a_hidden_member_says_at_which_peer_of_its_invitation_others_join():
    """Where it was told of no other."""
    credentials = lab_now().invite(peers=("10.0.0.1:31337",))
    text = show(terminal=True, relays=["12D3KooWRelay"], credentials=credentials)
    assert "--initial-peers 10.0.0.1:31337" in text and "my-lab, as gpu1 (server)" in text


def test_a_server_that_joined_says_no_join_command_in_a_pipe():
    """Only the first server of a swarm does."""
    assert "--initial-peers" not in show(terminal=False, initial_peers=(ADDRESS,))


def test_a_terminal_shows_what_to_type_in_one_piece():
    """Commands are never wrapped by us, so that they can be copied; names are shown, not obeyed."""
    text = show(terminal=True, metrics_url="http://127.0.0.1:9100/metrics")
    lines = [line.strip() for line in text.splitlines()]
    assert f"python -m swarm.server tiny --blocks 16:30 --initial-peers {ADDRESS}" in lines
    assert any(line.startswith("python -m swarm.client") and line.endswith(ADDRESS) for line in lines)
    assert any(line.startswith("python -m swarm.health") for line in lines)
    assert "tiny[bold]" in text and "metrics on http://127.0.0.1:9100/metrics" in text and "ONLINE" in text


@pytest.mark.parametrize(
    ("blocks", "wanted"), [("0:16", "16:30"), ("20:30", "0:20"), ("0:30", "0:30"), ("10:18", "18:30")]
)
def test_the_blocks_proposed_are_those_that_are_missing(blocks: str, wanted: str):
    """The larger part that this server doesn't hold."""
    assert f"--blocks {wanted} --initial" in show(terminal=False, blocks=blocks)
