"""Tests of the emulated network; skipped where namespaces are not permitted."""

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.wan import Path, Wan, WanUnavailable
from tests.wan.namespaces import processes_in
from tests.wan.wan import ROOT

DELAY_S = 0.03
FOREVER = [sys.executable, "-c", "import signal; signal.pause()"]


@pytest.fixture(scope="module", autouse=True)
def _permitted() -> None:
    try:
        with Wan(1):
            pass
    except WanUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def wan() -> Iterator[Wan]:
    """Three hosts."""
    with Wan(3, delay_s=DELAY_S) as wan:
        yield wan


def udp(wan: Wan, host: int) -> socket.socket:
    """A UDP socket on a host; sockets stay where they were made."""
    with wan.inside(host):
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.bind((wan.address(host), 0))
    made.settimeout(5)
    return made


def round_trip_s(wan: Wan, a: int, b: int) -> float:
    """Seconds of a datagram from host a to host b and back."""
    with udp(wan, a) as near, udp(wan, b) as far:
        started = time.monotonic()
        near.sendto(b"ping", far.getsockname())
        data, sender = far.recvfrom(100)
        far.sendto(data, sender)
        near.recv(100)
        return time.monotonic() - started


def test_a_round_trip_takes_twice_the_delay(wan: Wan):
    """Never less; that it isn't much more is what bench_wan measures."""
    assert round_trip_s(wan, 0, 1) >= 2 * DELAY_S


def test_a_pair_can_have_a_path_of_its_own_which_can_change():
    """One pair is slower than the rest, then as fast."""
    with Wan(3, delay_s=0.0, paths={(0, 1): Path(delay_s=0.5)}) as wan:
        assert round_trip_s(wan, 1, 0) >= 1.0
        assert round_trip_s(wan, 0, 2) < 1.0
        wan.set_path(0, 1, Path())
        assert round_trip_s(wan, 0, 1) < 1.0
        wan.set_delay(0.1)
        assert round_trip_s(wan, 0, 2) >= 0.2


def test_a_cut_path_lets_nothing_through():
    """Two hosts that can't reach each other both reach a third."""
    with Wan(3, paths={(1, 2): Path(loss=1.0)}) as cut, udp(cut, 0) as other, udp(cut, 1) as near, udp(cut, 2) as far:
        near.sendto(b"lost", far.getsockname())
        near.sendto(b"arrives", other.getsockname())
        assert other.recv(100) == b"arrives"
        far.setblocking(False)
        with pytest.raises(BlockingIOError):
            far.recv(100)
    assert cut.report is not None and cut.report.dropped >= 1


def test_hosts_do_not_see_each_others_loopback(wan: Wan):
    """The same port of 127.0.0.1 is free on each host, and this thread is back where it was."""
    before = os.stat("/proc/thread-self/ns/net").st_ino
    with wan.inside(0):
        first = socket.create_server(("127.0.0.1", 0))
    with wan.inside(1):
        second = socket.create_server(first.getsockname())
    first.close()
    second.close()
    assert os.stat("/proc/thread-self/ns/net").st_ino == before


def test_bulk_data_arrives_whole_over_a_lossy_jittery_path():
    """TCP sees a network that loses and delays, not one that corrupts."""
    data = os.urandom(1 << 20)
    with Wan(2, delay_s=0.001, jitter_s=0.001, loss=0.001, rate_bps=1e9) as wan:
        with wan.inside(1):
            server = socket.create_server((wan.address(1), 0))
        received = bytearray()

        def receive() -> None:
            connection, _ = server.accept()
            with connection:
                while chunk := connection.recv(1 << 16):
                    received.extend(chunk)

        thread = threading.Thread(target=receive)
        thread.start()
        with wan.inside(0), socket.create_connection(server.getsockname()) as connection:
            connection.sendall(data)
        thread.join()
        server.close()
    assert bytes(received) == data
    assert wan.report is not None and wan.report.packets > len(data) / 1500


def test_nothing_is_left_after_an_error():
    """Processes on the hosts, and their children, end with the network."""
    wan = Wan(2)
    with suppress(KeyError), wan:
        child = wan.popen(1, FOREVER)
        parent = wan.popen(0, ["/bin/sh", "-c", "sleep 1000 & wait"])
        inodes = [namespace.inode for namespace in wan._namespaces]
        raise KeyError
    assert child.returncode == parent.returncode == -signal.SIGKILL
    assert processes_in(inodes) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_the_owner_is_killed(number: signal.Signals):
    """The pump outlives its owner for as long as it takes to clean up."""
    program = (
        "import signal, os\nfrom tests.wan import Wan\n"
        "with Wan(1) as wan:\n"
        f"    child = wan.popen(0, {FOREVER!r})\n"
        "    print(wan._pump.pid, child.pid, flush=True)\n"
        "    signal.pause()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        watches = [os.pidfd_open(pid) for pid in pids]
        owner.send_signal(number)
        for watch in watches:
            wait_for_end(watch)
    assert owner.returncode == -number


def wait_for_end(watch: int) -> None:
    """Until the process of this pidfd has ended."""
    ended, _, _ = select.select([watch], [], [], 20)
    os.close(watch)
    assert ended
