"""Servers that start in a fraction of a second: forks of a process that has imported everything already.

    ServerFactory.start(args) ──socket: args, write end of a pipe──► template process ─fork─► swarm.server.main(args)
                                                                          └─ pid ─► ForkedServer

A fork prints into the pipe and dies with the template, which dies with its owner; so a benchmark that kills servers by
the hundred leaves nothing behind. Linux only.
"""

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from swarm.client.processes import PeerProcessError

PR_SET_PDEATHSIG = 1
MAX_REQUEST_BYTES = 1 << 16
START_TIMEOUT_S = 240.0


class ForkedServer:
    """One running server, with its output read in the background."""

    def __init__(self, pid: int, output: int):
        self.pid = pid
        self.lines: list[str] = []
        self.times: list[float] = []
        """When each line came, by the monotonic clock."""
        self._news = threading.Condition()
        self.ended_at = float("inf")
        """When its output ended, by the monotonic clock."""
        self._finished = False
        self._reader = threading.Thread(target=self._read, args=(output,), daemon=True)
        self._reader.start()

    @property
    def peer_id(self) -> str:
        """Its identity in the network; known once it listens."""
        return self.wait_for(r"/p2p/(\w+)")[1]

    def wait_for(self, pattern: str, timeout_s: float = START_TIMEOUT_S) -> re.Match[str]:
        """The first match in what it prints.

        Raises:
            PeerProcessError: when it ends or `timeout_s` passes before.
        """
        with self._news:
            self._news.wait_for(lambda: self._search(pattern) or self._finished, timeout_s)
            match = self._search(pattern)
        if match is None:
            raise PeerProcessError(f"server {self.pid} did not say {pattern!r}: {' | '.join(self.lines[-8:])}")
        return match

    def signal(self, number: int, *, whole_tree: bool = False) -> None:
        """Send a signal to the server alone, or also to what it has started."""
        for pid in process_tree(self.pid) if whole_tree else [self.pid]:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def kill(self) -> None:
        """End it and what it has started, now; may be called twice."""
        if not self._finished:
            self.signal(signal.SIGKILL, whole_tree=True)
            self._reader.join(START_TIMEOUT_S)

    def _search(self, pattern: str) -> re.Match[str] | None:
        return next((match for line in self.lines if (match := re.search(pattern, line))), None)

    def _read(self, output: int) -> None:
        with open(output, errors="replace") as lines:
            for line in lines:
                with self._news:
                    self.lines.append(line.rstrip())
                    self.times.append(time.monotonic())
                    self._news.notify_all()
        with self._news:
            self._finished, self.ended_at = True, time.monotonic()
            self._news.notify_all()


class ServerFactory:
    """Owns the template process; a context manager. Leaving it ends all servers."""

    def __init__(self) -> None:
        self._servers: list[ForkedServer] = []

    def __enter__(self) -> Self:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._template = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())], stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in self._servers:
            server.kill()
        self._socket.close()
        self._template.wait()

    def start(self, args: Sequence[str]) -> ForkedServer:
        """Start `python -m swarm.server ARGS`; returns before it is online."""
        output, theirs = os.pipe()
        try:
            socket.send_fds(self._socket, [json.dumps(list(args)).encode()], [theirs])
        finally:
            os.close(theirs)
        answer = self._socket.recv(MAX_REQUEST_BYTES)
        if not answer:
            raise PeerProcessError("the template of the servers has ended")
        server = ForkedServer(int(answer), output)
        self._servers.append(server)
        return server


def process_tree(pid: int) -> list[int]:
    """A process and all that descend from it; none if it has ended."""
    try:
        children = [task.read_text().split() for task in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return []
    return [pid, *(descendant for part in children for child in part for descendant in process_tree(int(child)))]


def main() -> None:
    """The template: import what a server needs, then fork one per request until the socket closes."""
    from swarm.server.lean import import_transformers_lean

    import_transformers_lean()
    import swarm.server.__main__
    import swarm.server.server  # noqa: F401

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    requests = socket.socket(fileno=int(sys.argv[1]))
    while True:
        request, fds, _, _ = socket.recv_fds(requests, MAX_REQUEST_BYTES, 1)
        if not request:
            return
        pid = os.fork()
        if pid == 0:
            requests.close()
            _become_server(json.loads(request), fds[0])
        os.close(fds[0])
        requests.send(str(pid).encode())


def _become_server(args: list[str], output: int) -> None:
    from swarm.server.__main__ import main as serve

    status = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        status = serve(args)
    except BaseException:  # noqa: BLE001, the outermost frame of this process
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
