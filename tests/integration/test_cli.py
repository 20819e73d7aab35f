"""The commands as a person meets them: addresses, ONLINE, clean stops, and errors in one line."""

import signal
import socket
import time

import pytest

from swarm.client.processes import PeerProcess, start_server


def run(*args: str) -> tuple[int, list[str]]:
    """Exit status and output lines of a server command that ends by itself."""
    process = PeerProcess("swarm.server", args)
    process.process.wait(60)
    return process.stop(), process.lines


def assert_one_line_error(result: tuple[int, list[str]], words: str) -> None:
    status, lines = result
    assert status == 2
    assert [line for line in lines if line.startswith("error:") and words in line], lines
    assert not [line for line in lines if "Traceback" in line]


def test_a_server_prints_how_to_join_and_stops_within_five_seconds(tiny_llama):
    """Addresses, the join command and ONLINE are printed; SIGTERM ends it with status 0."""
    with start_server("0:6", model=str(tiny_llama)) as server:
        address = server.address()
        server.wait_for("^ONLINE", 180)
        assert any(f"--initial-peers {address}" in line for line in server.lines)
        started = time.monotonic()
        server.signal(signal.SIGTERM)
        assert server.process.wait(10) == 0
        assert time.monotonic() - started < 5.0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["no/such-model-here", "--blocks", "0:2"], "no/such-model-here"),
        (["MODEL", "--blocks", "0:7"], "0:7 are outside"),
        (["MODEL", "--blocks", "3:3"], "3:3 is empty"),
        (["MODEL", "--blocks", "x"], "START:END"),
        (["MODEL", "--kv-cache", "lots"], "cache size"),
        (["MODEL", "--device", "cuda:7"], "cuda:7"),
        (["MODEL", "--device", "meta"], "meta"),
        (["MODEL", "--threads", "0"], "--threads"),
        (["MODEL", "--initial-peers", "nonsense"], "nonsense"),
    ],
)
def test_bad_settings_end_in_one_line(tiny_llama, args, words, monkeypatch):
    """Unknown model, impossible range, size, device and address: status 2 and one line that names them."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    args = [str(tiny_llama) if arg == "MODEL" else arg for arg in args]
    assert_one_line_error(run(*args, "--host", "127.0.0.1"), words)


def test_a_port_in_use_ends_in_one_line(tiny_llama):
    """The port is named."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert_one_line_error(run(str(tiny_llama), "--host", "127.0.0.1", "--port", port), port)


def test_an_unreachable_swarm_ends_in_one_line(tiny_llama):
    """No initial peer answers: one line, soon."""
    address = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWA1bysvV5nRqkEcKQPY1Z2oW7RjvqCJ4wJ4m6Xb6Yt4bA"
    status, lines = run(str(tiny_llama), "--host", "127.0.0.1", "--initial-peers", address)
    assert status == 2 and [line for line in lines if line.startswith("error:")], lines
