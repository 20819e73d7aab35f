"""The process that carries packets between the namespaces of a `Wan`; also their warden.

    TUN of host a ─read─► Network.send ... Network.arrivals ─write─► TUN of host b
    stdin: one JSON object per line changes paths, routers; its end means: kill what is left in the namespaces, report

Whoever started it may die by SIGKILL: the pipe closes, and nothing of theirs lives on. Started with the command line
that `command_line` makes and the descriptors inherited.
"""

import ctypes
import json
import os
import select
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

from tests.wan.namespaces import kill_all_in
from tests.wan.nat import Nat
from tests.wan.paths import Network, Path

READ_BURST = 64
"""Packets read from one host before the others have their turn."""
MAX_PACKET_BYTES = 65536
PR_SET_TIMERSLACK = 29
REAL_TIME_PRIORITY = 10
NICENESS = -19
MAX_SAMPLES = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the pump is told on its command line; hosts are numbered from 0."""

    tun_fds: list[int]
    inodes: list[int]
    addresses: list[str]
    default: dict[str, float]
    paths: list[tuple[int, int, dict[str, float]]]
    seed: int
    nats: list[tuple[int, str, bool]]
    """Hosts behind routers: the address that others see, and whether they may begin."""


class Pump:
    """Moves packets until its input ends."""

    def __init__(self, settings: Settings):
        self._settings = settings
        paths = {(a, b): Path(**path) for a, b, path in settings.paths}
        self._network = Network(Path(**settings.default), paths, Random(settings.seed))
        self._hosts = {socket.inet_aton(address): host for host, address in enumerate(settings.addresses)}
        self._nats: dict[int, Nat] = {}
        for host, outside, is_open in settings.nats:
            inside = socket.inet_aton(settings.addresses[host])
            self._nats[host] = Nat(inside, socket.inet_aton(outside), is_open=is_open)
            del self._hosts[inside]
            self._hosts[socket.inet_aton(outside)] = host
        self._sources = {fd: host for host, fd in enumerate(settings.tun_fds)}
        self._late_s: list[float] = []
        self._commands = b""

    def run(self) -> None:
        """Pump; returns when stdin has ended."""
        waiting_for = [*self._sources, sys.stdin.fileno()]
        while True:
            readable, _, _ = select.select(waiting_for, [], [], self._patience())
            for fd in readable:
                if fd in self._sources:
                    self._read(fd)
                elif not self._read_commands(fd):
                    return
            self._deliver()

    def report(self) -> dict[str, Any]:
        """Packets, how many were dropped, and how late those were that were delivered, in seconds."""
        late = sorted(self._late_s) or [0.0]
        return {
            "packets": self._network.num_packets,
            "dropped": self._network.num_dropped,
            "late_median_s": late[len(late) // 2],
            "late_p99_s": late[len(late) * 99 // 100],
            "late_max_s": late[-1],
        }

    def _patience(self) -> float | None:
        due = self._network.next_arrival
        return None if due is None else max(0.0, due - time.monotonic())

    def _read(self, fd: int) -> None:
        for _ in range(READ_BURST):
            try:
                packet = os.read(fd, MAX_PACKET_BYTES)
            except BlockingIOError:
                return
            if packet[0] >> 4 == 4:
                self._send(self._sources[fd], packet)

    def _send(self, source: int, packet: bytes) -> None:
        """Through the router of either host, if it has one."""
        destination = self._hosts.get(packet[16:20])
        passed: bytes | None = packet
        if source in self._nats:
            passed = self._nats[source].out(packet)
        if destination in self._nats and passed is not None:
            passed = self._nats[destination].into(passed)
        if destination is not None and passed is not None:
            self._network.send(time.monotonic(), source, destination, passed)

    def _deliver(self) -> None:
        for due, destination, packet in self._network.arrivals(time.monotonic()):
            try:
                os.write(self._settings.tun_fds[destination], packet)
            except OSError:  # the device's queue is full: a packet lost
                self._network.num_dropped += 1
            if len(self._late_s) < MAX_SAMPLES:
                self._late_s.append(time.monotonic() - due)

    def _read_commands(self, fd: int) -> bool:
        """Carry out what stdin says, and confirm each; False at its end."""
        data = os.read(fd, MAX_PACKET_BYTES)
        *lines, self._commands = (self._commands + data).split(b"\n")
        for line in lines:
            self._obey(json.loads(line))
            print("done", flush=True)
        return bool(data)

    def _obey(self, command: dict[str, Any]) -> None:
        if "nat" in command:
            self._nats[command["nat"]].is_open = command["is_open"]
        elif command["pair"] is None:
            self._network.set_default(Path(**command["path"]))
        else:
            a, b = command["pair"]
            self._network.set_path(a, b, Path(**command["path"]))


def command_line(settings: Settings) -> list[str]:
    """What to run, from the root of the repository, for these settings."""
    return [sys.executable, "-c", "from tests.wan.pump import main; main()", json.dumps(asdict(settings))]


def take_priority() -> None:
    """Be run before others where the system permits it, and wake at the microsecond."""
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(REAL_TIME_PRIORITY))
    except OSError:
        with suppress(OSError):
            os.nice(NICENESS)


def main() -> None:
    """Pump, then clean up."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the terminal's Ctrl-C is for our parent; its end is ours
        signal.signal(number, signal.SIG_IGN)
    settings = Settings(**json.loads(sys.argv[1]))
    take_priority()
    pump = Pump(settings)
    print("ready", flush=True)
    try:
        pump.run()
    finally:
        kill_all_in(settings.inodes)
        with suppress(BrokenPipeError):
            print(json.dumps(pump.report()), flush=True)
