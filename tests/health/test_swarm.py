"""A page on a real swarm: what it sees of servers that come, die and leave, and that its own peers may die, too."""

import json
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from swarm.client.processes import PeerProcess
from swarm.health.history import History
from swarm.health.state import Model, Reach, Status, Verdict
from swarm.network import Node, NodeConfig
from tests.health.conftest import LocalPage

NOBODY = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWSTo9HLMm1hcZG7MTKnXAbRYwVnJZ5URUvXrBkyGbjPQX"


def look_until(page: LocalPage, is_so: Callable[[Model], bool], timeout_s: float = 60.0) -> Model:
    """Look again and again until the model is so."""
    late = threading.Event()
    timer = threading.Timer(timeout_s, late.set)
    timer.start()
    try:
        while True:
            models = page.refresh().models
            if models and is_so(models[0]):
                return models[0]
            assert not late.wait(0.05), f"it never came: {models}"
    finally:
        timer.cancel()


def test_it_sees_servers_come_die_and_leave(make_swarm, make_page):
    """Online with their numbers; unreachable when killed; gone when they said so. The verdict follows."""
    swarm = make_swarm("0:3", "3:6", "0:6")
    page = make_page(swarm.address)
    model = look_until(page, lambda it: all(server.rtt_ms is not None for server in it.servers))
    assert (model.name, model.num_blocks, model.verdict) == ("tiny-llama", 6, Verdict.USABLE)
    assert model.replicas == (2,) * 6 and model.room_tokens == 2 * 2048
    server = model.servers[0]
    assert (server.name, server.status, server.reach) == ("server-0:3", Status.ONLINE, Reach.DIRECT)
    assert server.kv_total_tokens == 2048 and server.uptime_s is not None and server.decode_tps > 0

    swarm.remove_server(swarm.servers[2], politely=False)
    model = look_until(page, lambda it: it.verdict is Verdict.AT_RISK)
    dead = next(it for it in model.servers if it.name == "server-0:6")
    assert dead.status is Status.UNREACHABLE and dead.trouble

    swarm.remove_server(swarm.servers[1])
    model = look_until(page, lambda it: it.verdict is Verdict.INCOMPLETE)
    assert model.missing == "3:6" and "3:6" in model.reason
    assert next(it for it in model.servers if it.name == "server-3:6").status is Status.GONE


def test_work_shows(make_swarm, make_page):
    """Tokens, sessions and links between servers, as a client's session goes through two of them."""
    import torch

    swarm = make_swarm("0:3", "3:6")
    page = make_page(swarm.address)
    service = swarm.connect()
    with service.open_session(batch_size=1, max_length=64) as session:
        session.step(torch.randn(20, 64), positions=[0], num_tokens=[20], num_outputs=[1])
        model = look_until(page, lambda it: it.num_sessions == 1 and any(server.links for server in it.servers))
        assert all(server.num_tokens == 20 for server in model.servers) and model.tokens_per_s > 0
        first, second = model.servers  # one connection carries both directions; who made it tells of it
        links = [(server.peer_id, link.peer_id) for server in model.servers for link in server.links]
        assert links in ([(first.peer_id, second.peer_id)], [(second.peer_id, first.peer_id)])
    service.close()
    assert look_until(page, lambda it: it.num_sessions == 0).servers[0].num_failed == 0


@pytest.mark.parametrize("has_files", [True, False])
def test_a_canary_comes_back_with_or_without_the_models_files(make_swarm, make_page, tiny_llama: Path, has_files: bool):
    """Real tokens where the checkpoint is here, made-up hidden states where it isn't; and it notices a gap."""
    swarm = make_swarm("0:3", "3:6")
    files = (str(tiny_llama),) if has_files else ()
    page = make_page(swarm.address, has_canary=True, checkpoints=files, canary_period_s=1.0)
    model = look_until(page, lambda it: it.canary is not None and it.canary.ok)
    canary = model.canary
    assert canary.has_text is has_files and (canary.text is not None) is has_files
    assert [(hop.name, hop.start, hop.end) for hop in canary.route] == [("server-0:3", 0, 3), ("server-3:6", 3, 6)]
    assert canary.first_ms > 0 and canary.next_ms > 0
    assert page.monitor.canaries.num_sent[model.digest] >= 1 and not page.monitor.canaries.num_lost[model.digest]


def test_dead_bootstraps_do_not_matter(make_swarm, make_page, tmp_path: Path):
    """Some initial peers are dead from the start; then the only living one dies; then the page is started anew."""
    swarm = make_swarm("0:6")
    bootstrap = swarm.loop.run(Node.start(NodeConfig(host="127.0.0.1", initial_peers=(swarm.address,))), 30)
    given = (NOBODY, bootstrap.addresses[0])
    page = make_page(*given)
    look_until(page, lambda it: it.is_usable)
    swarm.loop.run(bootstrap.close(), 30)
    look_until(page, lambda it: it.is_usable)
    page.monitor._recorded_minute = -1
    page.refresh()
    again = LocalPage(given, tmp_path / "history-0")
    try:
        assert look_until(again, lambda it: it.is_usable).servers[0].name == "server-0:6"
    finally:
        again.close()


def test_pages_are_independent_of_each_other(make_swarm, make_page):
    """Two at once see the same; when one is closed the other goes on."""
    swarm = make_swarm("0:6")
    one, two = make_page(swarm.address), make_page(swarm.address)
    assert look_until(one, lambda it: it.is_usable).digest == look_until(two, lambda it: it.is_usable).digest
    assert one.monitor.state.peer_id != two.monitor.state.peer_id


def test_reachability_of_real_peers(make_swarm, make_page):
    """A server answers both ways; a peer that is nowhere on neither."""
    swarm = make_swarm("0:6")
    page = make_page(swarm.address)
    look_until(page, lambda it: it.is_usable)
    report = _get(f"{page.url}api/v1/reachable/{swarm.servers[0].node.peer_id}")
    assert report["ok"] and report["direct"]["ok"] and report["p2p"]["ok"] and report["direct"]["ms"] > 0
    nowhere = _get(f"{page.url}api/v1/reachable/{NOBODY.rpartition('/')[2]}")
    assert not nowhere["ok"] and nowhere["direct"]["message"]


def test_who_watches_is_told_of_every_new_state_and_sent_away_at_the_end(make_swarm, make_page):
    """The stream of news has a line per look, and ends with the page."""
    swarm = make_swarm("0:6")
    page = make_page(swarm.address, period_s=30.0)
    with urllib.request.urlopen(f"{page.url}events", timeout=20) as news:
        first = int(_next_line(news))
        page.refresh()
        assert int(_next_line(news)) > first
        page.run(_dismiss(page))
        assert all(line == b"\n" or line.startswith(b"data: ") for line in news)  # and then it ends


async def _dismiss(page: LocalPage) -> None:
    page.monitor.dismiss()


def _next_line(news) -> str:
    line = news.readline().decode()
    assert line.startswith("data: ") and news.readline() == b"\n"
    return line.removeprefix("data: ")


def test_a_swarm_that_never_answers_is_reported_as_such(make_swarm, make_page, monkeypatch: pytest.MonkeyPatch):
    """The DHT is silent: what was seen stays, and is called old."""
    from swarm.errors import PeerTimeout
    from swarm.health import census

    swarm = make_swarm("0:6")
    page = make_page(swarm.address)
    look_until(page, lambda it: it.is_usable)

    async def silent(*_: object) -> None:
        raise PeerTimeout("nobody answers")

    monkeypatch.setattr(census.Registry, "lookup", silent)
    page.monitor._census.read_at -= 60
    state = page.refresh()
    assert state.stale_s > 59 and state.models[0].name == "tiny-llama"


def test_the_command_prints_its_address_and_stops_cleanly(make_swarm, tmp_path: Path):
    """ONLINE with the URL; SIGTERM ends it with status 0; the history is a file that can be read."""
    swarm = make_swarm("0:6")
    args = ["--initial-peers", swarm.address, "--port", "0", "--history", str(tmp_path / "h"), "--no-canary"]
    with PeerProcess("swarm.health", [*args, "--period", "1"]) as process:
        url = process.wait_for(r"ONLINE (http://127\.0\.0\.1:\d+/)", 60)[1]
        assert b"Swarm" in urllib.request.urlopen(url).read()
        assert process.stop() == 0 and process.lines[-1] == "stopped"
    History(tmp_path / "h").close()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "--initial-peers is missing"),
        (["--initial-peers", "nonsense"], "nonsense"),
        (["--initial-peers", NOBODY], "none of 1 initial peers answered"),
        (["--initial-peers", NOBODY, "--period", "0"], "--period is 0 s"),
        (["--initial-peers", NOBODY, "--port", "99999"], "99999"),
        (["--initial-peers", NOBODY, "--history", "/proc/nowhere/h"], "history file"),
    ],
)
def test_bad_settings_end_in_one_line(args: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Status 2 and one line that names what is wrong."""
    from swarm.health.__main__ import main

    rest = [] if "--history" in args else ["--history", str(tmp_path / "h")]
    port = [] if "--port" in args else ["--port", "0"]
    assert main([*args, *rest, *port]) == 2
    said = capsys.readouterr().err
    assert words in said and said.startswith("error: ") and said.count("\n") == 1


def _get(url: str) -> dict:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)
