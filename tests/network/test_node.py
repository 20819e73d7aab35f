"""Nodes on loopback with real daemons: discovery, raw streams, bad settings, and recovery from every loss."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import uvloop

from swarm.errors import ConfigError, InvalidRequest, PeerError, PeerTimeout, PeerUnreachable
from swarm.identity import Identity
from swarm.network import Node, NodeConfig, dht, libp2p, node
from swarm.network.hive import P2PDaemonError
from swarm.network.libp2p import Libp2p

NOBODY = Identity.generate().peer_id


def start(*initial_peers: str, **options: object) -> "asyncio.Future[Node]":
    """A node on loopback."""
    config = NodeConfig(host="127.0.0.1", initial_peers=initial_peers, **options)  # type: ignore[arg-type]
    return asyncio.ensure_future(Node.start(config))


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer_id: str) -> None:
    """Send back who asks, then what comes."""
    writer.write(peer_id.encode() + b"\n")
    while data := await reader.read(1000):
        writer.write(data)


async def ask_echo(client: Node, peer_id: str) -> str:
    """The name by which the peer's echo handler knows us; checks that bytes come back."""
    reader, writer = await client.open_stream(peer_id, "/test/echo", 5)
    try:
        name = await reader.readline()
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        return name.decode().strip()
    finally:
        writer.close()


async def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Wait until `condition()` holds; the nodes have no event for it."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_peers_store_and_find_values():
    """A value is found by every peer under the id of who stored it; an older one does not replace it."""
    async with await start() as a, await start(*a.addresses) as b, await start(*a.addresses) as c:
        expires_at = time.time() + 60
        assert await b.dht_store("key", b.peer_id, b"of b", expires_at)
        assert await c.dht_store("key", c.peer_id, b"of c", expires_at)
        for peer in (a, b, c):
            assert await peer.dht_get("key") == {b.peer_id: b"of b", c.peer_id: b"of c"}
        assert not await b.dht_store("key", b.peer_id, b"older", expires_at - 1)
        assert await b.dht_store("key", b.peer_id, b"newer", expires_at + 1)
        assert await a.dht_get_many(["key", "other"]) == {
            "key": {b.peer_id: b"newer", c.peer_id: b"of c"},
            "other": {},
        }


async def test_only_small_values_of_our_own_are_stored():
    """Another's subkey and an oversized value are our own mistakes."""
    async with await start() as a:
        with pytest.raises(InvalidRequest, match="not our own peer id"):
            await a.dht_store("key", NOBODY, b"", time.time() + 60)
        with pytest.raises(InvalidRequest, match="70000 bytes, limit 1024"):
            await a.dht_store("key", a.peer_id, bytes(70000), time.time() + 60)
        assert not await a.dht_store("key", a.peer_id, b"", time.time() + 1e6)


async def test_raw_streams_name_the_authenticated_peer():
    """A handler learns who opened the stream, and bytes pass both ways, also to a peer known by its id only."""
    async with (
        await start() as a,
        await start(*a.addresses) as b,
        await start(*a.addresses, client_mode=True) as c,
    ):
        await b.add_stream_handler("/test/echo", echo)
        await c.add_stream_handler("/test/echo", echo)
        assert await ask_echo(c, b.peer_id) == c.peer_id
        assert await ask_echo(b, c.peer_id) == b.peer_id


async def test_a_stream_that_can_not_be_opened_says_why():
    """Unknown peers, ids and handlers are unreachable, at once."""
    async with await start() as a, await start(*a.addresses) as b:
        with pytest.raises(PeerUnreachable, match="protocols not supported"):
            await b.open_stream(a.peer_id, "/test/nothing", 5)
        with pytest.raises(PeerUnreachable, match="not a peer id"):
            await b.open_stream("0", "/test/echo", 5)
        with pytest.raises((PeerUnreachable, PeerTimeout)) as caught:
            await b.open_stream(NOBODY, "/test/echo", 2)
        assert caught.value.peer_id == NOBODY
        with pytest.raises(PeerUnreachable):
            await b.connect(f"/ip4/127.0.0.1/tcp/1/p2p/{NOBODY}")
        await b.connect(a.addresses[0])


async def test_a_peer_that_hangs_is_slow_not_gone():
    """Its machine may be busy: who looks after others must not take it for lost."""
    async with await start() as a, await start(*a.addresses) as b:
        stop(a.daemon_pid)
        try:
            with pytest.raises(PeerTimeout):  # the daemon's deadline, which is in whole seconds, passes before ours
                await b.open_stream(a.peer_id, "/test/new", 1.49)  # of those that it knows, it waits for no answer
        finally:
            os.kill(a.daemon_pid, signal.SIGCONT)


@pytest.mark.parametrize(
    ("says", "kind"),
    [
        ("failed to dial: context deadline exceeded", PeerTimeout),
        ("dial tcp4 192.0.2.1:31337: i/o timeout", PeerTimeout),
        ("dial tcp4 192.0.2.1:31337: connect: connection refused", PeerUnreachable),
        ("protocols not supported: [/test/echo]", PeerUnreachable),
    ],
)
async def test_what_the_daemon_says_of_a_peer_tells_silence_from_refusal(says: str, kind: type[PeerError]):
    """One that does not answer may be asked again."""

    async def fails(*_: object, **__: object) -> None:
        raise P2PDaemonError(says)

    underlay = Libp2p.__new__(Libp2p)
    underlay.caller = SimpleNamespace(open_stream=fails)  # type: ignore[assignment]
    with pytest.raises(PeerError, match="can't open /test/echo") as caught:
        await underlay.open_stream(NOBODY, "/test/echo", asyncio.Protocol(), timeout_s=1.0)
    assert type(caught.value) is kind and caught.value.peer_id == NOBODY


async def test_an_identity_file_keeps_the_peer_id(tmp_path: Path):
    """The same file gives the same peer id and address again."""
    path = tmp_path / "identity.key"
    async with await start(identity_path=path) as a:
        first, port = a.peer_id, int(a.addresses[0].split("/")[4])
    async with await start(identity_path=path, port=port) as a:
        assert a.peer_id == first and a.addresses == (f"/ip4/127.0.0.1/tcp/{port}/p2p/{first}",)


async def test_announced_addresses_replace_those_found():
    """Hosts get our port; multiaddrs are taken as they are."""
    async with await start(announce=("203.0.113.7", "/ip4/198.51.100.1/tcp/7")) as a:
        assert {address.split("/p2p/")[0].rsplit("/", 1)[0] for address in a.addresses} == {
            "/ip4/203.0.113.7/tcp",
            "/ip4/198.51.100.1/tcp",
        }


async def test_a_node_that_becomes_hidden_leaves_the_tables_of_others_and_comes_back():
    """Under the same identity and port; it stores and finds meanwhile, but nobody asks it."""
    async with await start() as a, await start(*a.addresses) as b, await start(*a.addresses) as c:
        await b.add_stream_handler("/test/echo", echo)
        before = b.addresses
        assert await c.dht_store("key", c.peer_id, b"of c", time.time() + 60)
        await until(lambda: a.knows(b.peer_id))
        await b.present(is_hidden=True)
        assert b.addresses == () and b.listening == before
        await a.dht_get("anything")  # whoever asks it learns that it is gone
        await until(lambda: not a.knows(b.peer_id))
        assert await b.dht_store("key", b.peer_id, b"of b", time.time() + 60)
        for node in (a, b, c):
            assert await node.dht_get("key") == {c.peer_id: b"of c", b.peer_id: b"of b"}
        assert not a.knows(b.peer_id)
        assert await ask_echo(a, b.peer_id) == a.peer_id
        await b.present()
        assert b.addresses == before
        await until(lambda: a.knows(b.peer_id))
        assert await ask_echo(c, b.peer_id) == c.peer_id


async def test_the_first_node_of_a_swarm_stays_in_it_when_it_is_hidden():
    """It was told of no others, but it knows them by then."""
    async with await start() as a, await start(*a.addresses) as b:
        await until(lambda: a.knows(b.peer_id))
        await a.present(is_hidden=True)
        assert await a.dht_store("key", a.peer_id, b"of a", time.time() + 60)
        assert await b.dht_get("key") == {a.peer_id: b"of a"}


async def test_nobody_waits_for_ever_for_a_daemon_that_announces_something_else(monkeypatch):
    """It comes when it can, and is what was asked for; until then that is said."""
    async with await start() as a, await start(*a.addresses) as b:
        with monkeypatch.context() as patch:
            patch.setattr(libp2p, "RENEWAL_TIMEOUT_S", 0.0)
            with pytest.raises(PeerTimeout, match="no libp2p daemon announces"):
                await b.present(["127.0.0.2"])
        await until(lambda: b.num_restarts == 1 and "/127.0.0.2/" in b.addresses[0])


async def test_addresses_that_are_announced_can_change():
    """Nothing happens where they are what they were; others are told of them, streams that were open end."""
    async with await start() as a, await start(*a.addresses) as b:
        await b.add_stream_handler("/test/echo", echo)
        reader, writer = await a.open_stream(b.peer_id, "/test/echo", 5)
        writer.write(b"hello")
        assert (await reader.readline()).decode().strip() == a.peer_id
        await b.present()
        assert b.num_restarts == 0
        port = b.addresses[0].split("/")[4]
        await asyncio.gather(b.present(["127.0.0.2"]), b.present(["192.0.2.1", "127.0.0.1"]))
        hosts = ("127.0.0.1", "192.0.2.1")
        assert sorted(b.addresses) == [f"/ip4/{host}/tcp/{port}/p2p/{b.peer_id}" for host in hosts]
        while await reader.read(100):
            pass
        writer.close()
        assert await ask_echo(a, b.peer_id) == a.peer_id


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"port": 65536}, "port 65536"),
        ({"host": "no such host"}, "no such host"),
        ({"host": "203.0.113.1"}, "can't listen on 203.0.113.1"),
        ({"initial_peers": ("127.0.0.1:4000",)}, "names no peer"),
        ({"initial_peers": ("/ip4/127.0.0.1/tcp/x/p2p/" + NOBODY,)}, "malformed"),
        ({"initial_peers": ("/ip4/127.0.0.1/tcp/1/p2p/0OIl",)}, "malformed"),
        ({"announce": ("/nonsense/1",)}, "/nonsense/1"),
        ({"identity_path": "/dev/null"}, "not an Ed25519 key"),
    ],
)
async def test_settings_that_can_not_work_are_named(options: dict[str, object], reason: str):
    """One clear line for each bad setting, before any process is started."""
    with pytest.raises(ConfigError, match=reason):
        await Node.start(NodeConfig(**{"host": "127.0.0.1", **options}))  # type: ignore[arg-type]


async def test_a_port_in_use_is_named():
    """A second node on a port is refused, be it taken by a node or by another program."""
    async with await start() as a:
        port = int(a.addresses[0].split("/")[4])
        with pytest.raises(ConfigError, match=f"port {port}: Address already in use"):
            await start(port=port)
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(ConfigError, match="already in use"):
        await start(port=server.getsockname()[1])


async def test_without_any_initial_peer_there_is_no_swarm():
    """When none answers, the error lists each with its reason; one that answers is enough."""
    nobody = f"/ip4/127.0.0.1/tcp/1/p2p/{NOBODY}"
    with pytest.raises(PeerUnreachable, match=r"none of 1 initial peers answered: .*connection refused") as caught:
        await start(nobody)
    assert "\n" not in str(caught.value)
    async with await start() as a, await start(nobody, *a.addresses) as b:
        assert b.num_peers == 1


async def test_an_initial_peer_that_is_slow_is_asked_again(monkeypatch: pytest.MonkeyPatch):
    """It takes the connection and answers late: that says nothing of what it is."""
    monkeypatch.setattr(dht, "CALL_TIMEOUT_S", 0.2)
    call_ping, num_slow = dht.DHTProtocol.call_ping, 2

    async def slow(protocol: object, *args: object, **options: object) -> object:
        nonlocal num_slow
        if num_slow:
            num_slow -= 1
            await asyncio.sleep(0.21)
            return None
        return await call_ping(protocol, *args, **options)

    async with await start() as a:
        monkeypatch.setattr(dht.DHTProtocol, "call_ping", slow)
        async with await start(*a.addresses) as b:
            assert not num_slow and b.knows(a.peer_id)


async def test_closing_leaves_nothing_behind():
    """The daemon has ended and its directory is gone; so it is after a start that failed."""
    a = await start()
    pid, directory = a.daemon_pid, a._underlay.settings.directory
    assert directory.stat().st_mode & 0o077 == 0
    await a.close()
    assert not directory.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    before = set(directory.parent.glob(f"swarm-{os.getpid()}-*"))
    with pytest.raises(PeerUnreachable):
        await start(f"/ip4/127.0.0.1/tcp/1/p2p/{NOBODY}")
    assert set(directory.parent.glob(f"swarm-{os.getpid()}-*")) == before


async def test_a_killed_daemon_is_replaced_with_everything_as_before():
    """Identity, address, handlers and the DHT are back after kill -9, in both directions."""
    async with await start() as a, await start(*a.addresses) as b:
        await b.add_stream_handler("/test/echo", echo)
        await a.add_stream_handler("/test/echo", echo)
        addresses = b.addresses
        os.kill(b.daemon_pid, signal.SIGKILL)
        await until(lambda: b.num_restarts == 1 and b.num_peers == 1)
        assert b.addresses == addresses
        assert await ask_echo(a, b.peer_id) == a.peer_id
        assert await ask_echo(b, a.peer_id) == b.peer_id
        assert await b.dht_store("key", b.peer_id, b"value", time.time() + 60)
        assert await a.dht_get("key") == {b.peer_id: b"value"}


def stop(pid: int) -> None:
    """SIGSTOP a child, and return when all its threads have stopped: one may still answer when `kill` returns."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)


async def test_a_daemon_that_hangs_is_replaced(monkeypatch: pytest.MonkeyPatch):
    """A daemon that is stopped (SIGSTOP) answers nothing; another takes its place, and calls fail meanwhile."""
    monkeypatch.setattr(libp2p, "HANG_TIMEOUT_S", 1.0)
    monkeypatch.setattr(libp2p, "WATCH_PERIOD_S", 0.2)
    async with await start() as a, await start(*a.addresses) as b:
        await b.add_stream_handler("/test/echo", echo)
        b._underlay.caller.timeout_s = 0.5
        stop(b.daemon_pid)
        with pytest.raises((PeerTimeout, PeerUnreachable)):  # the latter while it is being replaced
            await b.open_stream(a.peer_id, "/test/echo", 0.5)
        await until(lambda: b.num_restarts == 1)
        assert await ask_echo(a, b.peer_id) == a.peer_id


@asynccontextmanager
async def bootstrap_process(*args: str) -> AsyncIterator[tuple[subprocess.Popen[str], str]]:
    """`python -m swarm.bootstrap` in a process of its own, and its address."""
    command = [sys.executable, "-m", "swarm.bootstrap", "--host", "127.0.0.1", *args]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220
    assert process.stdout is not None
    try:
        yield process, (await asyncio.to_thread(process.stdout.readline)).strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


async def test_peers_come_back_to_a_bootstrap_peer_that_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The only known peer is killed, and comes back with its identity and port: the others find it and each other."""
    monkeypatch.setattr(node, "GREET_PERIOD_S", 1.0)
    identity = str(tmp_path / "identity.key")
    async with bootstrap_process("--identity", identity) as (_, address):
        a, b = await start(address), await start(address)
    async with a, b:
        peer_id = address.split("/")[-1]
        await until(lambda: not a.knows(peer_id) and not b.knows(peer_id))
        async with bootstrap_process("--identity", identity, "--port", address.split("/")[4]) as (_, again):
            assert again == address
            await until(lambda: a.knows(peer_id) and b.knows(peer_id))
            assert await a.dht_store("key", a.peer_id, b"value", time.time() + 60)
            assert await b.dht_get("key") == {a.peer_id: b"value"}


async def test_a_peer_that_lost_everybody_for_ten_seconds_is_back():
    """Everyone else freezes for 10 s and the routing table empties; when they wake, values are found again."""
    async with bootstrap_process() as (process, address), await start(address, client_mode=True) as a:
        stop(process.pid)
        thawed = asyncio.get_running_loop().call_later(10.0, os.kill, process.pid, signal.SIGCONT)
        while asyncio.get_running_loop().time() < thawed.when() - 1:
            assert not await a.dht_store("key", a.peer_id, b"value", time.time() + 60)
        await until(lambda: a.num_peers == 0)
        await until(lambda: a.num_peers == 1)
        assert await a.dht_store("key", a.peer_id, b"value", time.time() + 60)
        assert await a.dht_get("key") == {a.peer_id: b"value"}


def test_a_node_lives_on_uvloop_in_a_thread():
    """The client runs its node on a uvloop in a background thread."""

    async def main() -> None:
        async with await start() as a, await start(*a.addresses) as b:
            await b.add_stream_handler("/test/echo", echo)
            results.append(await ask_echo(a, b.peer_id) == a.peer_id)

    results: list[bool] = []
    thread = threading.Thread(target=lambda: uvloop.run(main()))
    thread.start()
    thread.join()
    assert results == [True]


async def test_a_node_shows_its_state():
    """The repr is for operators."""
    async with await start() as a:
        assert repr(a) == f"<Node {a.peer_id} | 0 peers | 0 daemon restarts>"
