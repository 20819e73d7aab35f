"""`python -m swarm.bootstrap`: what it prints, how it stops, and how it refuses."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest


def command(*args: str) -> list[str]:
    """The command line."""
    return [sys.executable, "-m", "swarm.bootstrap", "--host", "127.0.0.1", *args]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_prints_its_address_and_stops_on_a_signal(tmp_path: Path, number: signal.Signals):
    """The full address, ONLINE with the way to join, then a clean stop within 5 s."""
    args = command("--identity", str(tmp_path / "identity.key"))
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address.startswith("/ip4/127.0.0.1/tcp/") and "/p2p/12D3KooW" in address
        online = process.stdout.readline()
        assert "ONLINE" in online and f"--initial-peers {address}" in online
        joined = subprocess.Popen(command("--initial-peers", address), stdout=subprocess.PIPE, text=True)
        assert joined.stdout is not None
        joined.stdout.readline()
        assert "ONLINE" in joined.stdout.readline()
        for peer in (joined, process):
            peer.send_signal(number)
            out, err = peer.communicate(timeout=5)
            assert peer.returncode == 0 and "stopping" in out and not err


def refusal(*args: str) -> str:
    """What a run that must fail with status 2 says, in one line."""
    done = subprocess.run(command(*args), capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    return done.stderr


def test_what_can_not_work_is_said_in_one_line(tmp_path: Path):
    """A port in use, a bad identity file, a bad address and peers that don't answer: status 2 and the reason."""
    bad = tmp_path / "identity.key"
    bad.write_bytes(b"nonsense")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        assert f"port {port}: Address already in use" in refusal("--port", port)
    assert str(bad) in refusal("--identity", str(bad))
    assert "/ip4/HOST/tcp/PORT/p2p/PEER_ID" in refusal("--initial-peers", "somewhere")
    nobody = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWSTo9HLMm1hcZG7MTKnXAbRYwVnJZ5URUvXrBkyGbjPQX"
    assert "none of 1 initial peers answered" in refusal("--initial-peers", nobody)
