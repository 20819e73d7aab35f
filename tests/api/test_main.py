"""The command line: one line for errors, an address when it serves, and a clean end."""

import signal
import socket
from pathlib import Path

import httpx2
import pytest

from swarm.api.__main__ import build_parser, main
from swarm.api.serving import listen, url
from swarm.client.processes import PeerProcess, all_stopped, start_server
from swarm.errors import ConfigError
from tests.api.conftest import needs_smollm2

ADDRESS = "/ip4/127.0.0.1/tcp/1/p2p/12D3"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--initial-peers is missing"),
        (["--initial-peers", ADDRESS, "--max-tokens", "0"], "--max-tokens is 0"),
        (["--initial-peers", ADDRESS, "--max-answers", "-1"], "--max-answers is -1"),
        (["--initial-peers", ADDRESS, "--api-keys", "/nowhere/keys"], "/nowhere/keys"),
        (["--initial-peers", ADDRESS, "--identity", "/nowhere/id"], "/nowhere/id"),
        (["--initial-peers", ADDRESS, "--adapters", "path"], "'path' is not NAME=PATH"),
        (["--initial-peers", ADDRESS, "--port", "99999"], "port 99999"),
        (["no-such-model", "--initial-peers", ADDRESS, "--port", "0"], "no-such-model"),
    ],
)
def test_errors_are_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """No traceback; the line names the argument and its value."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(arguments) == 2
    finally:
        signal.signal(signal.SIGTERM, before)
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.strip().splitlines()
    assert line.startswith("error: ") and message in line


def test_help_tells_defaults_and_units(capsys: pytest.CaptureFixture[str]) -> None:
    """Each option has a help text."""
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--help"])
    assert "(default: 8000)" in capsys.readouterr().out
    assert all(action.help for action in build_parser()._actions)


def test_a_port_in_use_is_an_error() -> None:
    """Told before anything is loaded."""
    with listen("127.0.0.1", 0) as sock, pytest.raises(ConfigError, match="can't listen"):
        listen("127.0.0.1", sock.getsockname()[1])


def test_addresses_are_urls() -> None:
    """Of both families."""
    with listen("127.0.0.1", 0) as sock:
        assert url(sock) == f"http://127.0.0.1:{sock.getsockname()[1]}"
    if socket.has_ipv6:
        with listen("::1", 0) as sock:
            assert url(sock) == f"http://[::1]:{sock.getsockname()[1]}"


@needs_smollm2
def test_it_serves_until_it_is_told_to_stop(tmp_path: Path) -> None:
    """A real server and a real gateway as processes: the right answer, and status 0 after SIGTERM."""
    processes: list[PeerProcess] = []
    with all_stopped(processes):
        processes.append(start_server("0:30"))
        processes[0].wait_for(r"^ONLINE", 240)
        identity = str(tmp_path / "gateway.key")
        gateway = PeerProcess(
            "swarm.api", ["--initial-peers", processes[0].address(), "--port", "0", "--identity", identity]
        )
        processes.append(gateway)
        where = gateway.wait_for(r"API at (http://\S+)", 240)[1]
        body = {
            "model": "smollm2-135m-instruct",
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "temperature": 0,
            "max_tokens": 12,
        }
        answer = httpx2.post(f"{where}/chat/completions", json=body, timeout=120).json()
        assert "Paris" in answer["choices"][0]["message"]["content"]
        assert gateway.stop() == 0
        assert len(gateway.lines) == 1, "nothing but the address was printed"
