"""Peers as child processes of this one, for the demo, tests and benchmarks: start, read what they print, end."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from swarm.errors import SwarmError

STOP_TIMEOUT_S = 8.0
_ADDRESS = re.compile(r"/ip4/127\.0\.0\.1/tcp/\d+/p2p/\w+")


class PeerProcessError(SwarmError):
    """A child process ended, or did not say in time what was waited for; the message holds the end of its output."""


class PeerProcess:
    """`python -m MODULE ARGS...` as a child process, with its output read line by line in the background."""

    def __init__(self, module: str, args: Sequence[str], *, env: dict[str, str] | None = None):
        self.command = [sys.executable, "-m", module, *args]
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._finished = False
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_for(self, pattern: str, timeout_s: float) -> re.Match[str]:
        """The first match of `pattern` in what the process prints.

        Raises:
            PeerProcessError: when it ends or `timeout_s` passes before.
        """
        with self._news:
            self._news.wait_for(lambda: self._search(pattern) or self._finished, timeout_s)
        match = self._search(pattern)
        if match is None:
            what = "ended" if self._finished else f"did not say {pattern!r} within {timeout_s:.0f} s"
            raise PeerProcessError(f"{' '.join(self.command[2:4])} {what}: {' | '.join(self.lines[-5:])}")
        return match

    def address(self, timeout_s: float = 60.0) -> str:
        """The loopback address under which the peer can be joined."""
        return self.wait_for(_ADDRESS.pattern, timeout_s)[0]

    def signal(self, number: int) -> None:
        """Send a signal to the process."""
        self.process.send_signal(number)

    def stop(self) -> int:
        """End it, politely first; returns its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
        status = self.process.wait()
        self._reader.join(STOP_TIMEOUT_S)
        return status

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _search(self, pattern: str) -> re.Match[str] | None:
        return next((match for line in self.lines if (match := re.search(pattern, line))), None)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self.lines.append(line.rstrip())
                self._news.notify_all()
        with self._news:
            self._finished = True
            self._news.notify_all()
        self.process.stdout.close()


def start_bootstrap() -> PeerProcess:
    """A peer that serves no blocks, on loopback."""
    return PeerProcess("swarm.bootstrap", ["--host", "127.0.0.1"])


def start_server(blocks: str, initial_peers: Sequence[str] = (), *args: str, model: str | None = None) -> PeerProcess:
    """A server of `blocks` on loopback; it joins `initial_peers`, or begins a swarm."""
    peers = ["--initial-peers", *initial_peers] if initial_peers else []
    return PeerProcess(
        "swarm.server", [*([model] if model else []), "--blocks", blocks, "--host", "127.0.0.1", *peers, *args]
    )


@contextmanager
def all_stopped(processes: Sequence[PeerProcess]) -> Iterator[None]:
    """End all of them, at once, when the block is left."""
    try:
        yield
    finally:
        for process in processes:
            if process.process.poll() is None:
                process.process.send_signal(signal.SIGCONT)
                process.process.terminate()
        for process in processes:
            process.stop()
