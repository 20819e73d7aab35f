"""`swarm.top` on a real server: once, and what it refuses."""

from pathlib import Path

import pytest

from swarm.top.__main__ import main
from tests.integration.conftest import LocalSwarm, save_tiny_llama


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory):
    """One server that shows its metrics."""
    path: Path = save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")
    swarm = LocalSwarm(path)
    swarm.add_server("0:6", public_name="the-one", metrics_port=0)
    yield swarm
    swarm.close()


def test_a_swarm_is_shown_once(swarm: LocalSwarm, capsys: pytest.CaptureFixture[str]):
    """The model, its server, and that it answered."""
    assert main(["--initial-peers", swarm.address, "--once"]) == 0
    text = capsys.readouterr().out
    assert "tiny-llama" in text and "the-one" in text and "at risk" in text and " ms" in text


def test_a_server_is_shown_once_by_its_metrics(swarm: LocalSwarm, capsys: pytest.CaptureFixture[str]):
    """From the URL that the server printed."""
    assert main(["--metrics", swarm.servers[0].metrics_url or "", "--once", "--period", "0.2"]) == 0
    text = capsys.readouterr().out
    assert "tiny-llama" in text and "0:6, none, float32" in text and "2048 tokens" in text


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "--initial-peers or --credentials for a swarm, or --metrics for a server"),
        (["--metrics", "http://127.0.0.1:9/metrics", "--initial-peers", "x"], "either"),
        (["--metrics", "localhost:9100"], "is no URL"),
        (["--metrics", "file:///etc/passwd"], "is no URL"),
        (["--metrics", "http://127.0.0.1:9/metrics"], "does not answer"),
        (["--initial-peers", "nonsense"], "nonsense"),
        (["--metrics", "http://127.0.0.1:9/metrics", "--period", "0"], "--period"),
    ],
)
def test_bad_settings_end_in_one_line(args: list[str], words: str, capsys: pytest.CaptureFixture[str]):
    """Status 2 and one line."""
    assert main([*args, "--once"]) == 2
    said = capsys.readouterr().err
    assert words in said and said.startswith("error: ") and said.count("\n") == 1
