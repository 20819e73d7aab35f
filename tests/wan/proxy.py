"""The delay of a wide-area network without its packets: TCP proxies in front of each listening port, for machines
where network namespaces are not permitted.

    peer ──► 127.0.1.H:port (proxy of host H) ── delay ──► 127.0.0.1:port (what runs on host H)
         ◄─────────────────────────────────── delay ──

A host announces the proxy's address, so whoever connects to it comes through the delay, in both directions, whether
client or server. What this leaves out: the delay of the TCP handshake and of acknowledgements, loss, windows.
"""

import asyncio
import contextlib
import json
import selectors
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, ClassVar, Self

from tests.wan.namespaces import WanUnavailable
from tests.wan.wan import ROOT, STOP_TIMEOUT_S, Wan

PROGRAM = "from tests.wan.proxy import main; main()"
READ_BYTES = 65536
NUM_PORTS = 2
"""Ports of a host: discovery and data."""


class DelayProxies:
    """The interface of `Wan` for servers of this project, with delays alone; a context manager."""

    kind: ClassVar[str] = "delaying proxies"
    report = None

    def __init__(self, hosts: int, *, delay_s: float = 0.0):
        self.num_hosts, self._delay_s = hosts, delay_s
        self._ports = [[_free_port() for _ in range(NUM_PORTS)] for _ in range(hosts)]
        self._processes: list[subprocess.Popen[Any]] = []
        self._proxy: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        routes = [(host, port) for host, ports in enumerate(self._ports) for port in ports]
        self._proxy = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps({"routes": routes, "delay_s": self._delay_s})],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._expect("ready")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._proxy is not None
        self._proxy.communicate()
        for process in self._processes:
            process.kill()
            process.wait(STOP_TIMEOUT_S)

    def address(self, host: int) -> str:
        """The address under which the others reach a host: that of its proxy."""
        return _proxy_address(host)

    def local_address(self, host: int) -> str:
        """The address to listen on for a host; who connects to it has no delay."""
        return "127.0.0.1"

    def listen_args(self, host: int) -> list[str]:
        """Options that let a server on this host be reached from the others."""
        port, data_port = self._ports[host]
        announce = ["--announce", self.address(host)]
        return ["--host", "127.0.0.1", "--port", str(port), "--data-port", str(data_port), *announce]

    @contextmanager
    def inside(self, host: int) -> Iterator[None]:
        """Nothing to enter: all hosts are this one."""
        yield

    def popen(self, host: int, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a process on a host. It is killed at the end."""
        process: subprocess.Popen[Any] = subprocess.Popen(command, **options)
        self._processes.append(process)
        return process

    def set_delay(self, delay_s: float) -> None:
        """Change the delay of all hosts for what is sent from now on."""
        assert self._proxy is not None and self._proxy.stdin is not None
        self._proxy.stdin.write(f"{delay_s}\n")
        self._proxy.stdin.flush()
        self._expect("done")

    def _expect(self, answer: str) -> None:
        assert self._proxy is not None and self._proxy.stdout is not None
        line = self._proxy.stdout.readline().strip()
        if line != answer:
            raise RuntimeError(f"the proxy said {line!r} in place of {answer!r}")


def open_network(hosts: int, *, delay_s: float = 0.0) -> Wan | DelayProxies:
    """A `Wan` where that is permitted, else proxies; not yet entered. What it is, is its `kind`."""
    try:
        with Wan(1):
            pass
    except WanUnavailable as error:
        print(f"{error}; delaying TCP proxies in their place", file=sys.stderr)
        return DelayProxies(hosts, delay_s=delay_s)
    return Wan(hosts, delay_s=delay_s)


class _Relay:
    """Carries the bytes of all connections, each chunk as much later as `delay_s` says."""

    def __init__(self, delay_s: float):
        self.delay_s = delay_s

    async def serve(self, host: int, port: int) -> asyncio.Server:
        """Listen for one port of one host."""

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                writer.close()
                return
            await asyncio.gather(self._carry(reader, far_writer), self._carry(far_reader, writer))

        return await asyncio.start_server(connected, _proxy_address(host), port)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        _no_delay(writer)
        data = b"first"
        while data:
            try:
                data = await reader.read(READ_BYTES)
            except ConnectionError:
                data = b""
            if data:
                loop.call_later(self.delay_s, writer.write, data)
            else:
                loop.call_later(self.delay_s, _close, writer)


async def _serve(routes: list[tuple[int, int]], delay_s: float) -> None:
    relay = _Relay(delay_s)
    servers = [await relay.serve(host, port) for host, port in routes]
    print("ready", flush=True)
    commands = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    while line := await commands.readline():
        relay.delay_s = float(line)
        print("done", flush=True)
    for server in servers:
        server.close()


def _close(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        writer.close()


def _no_delay(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _proxy_address(host: int) -> str:
    return f"127.0.1.{host + 1}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> None:
    """Relay until stdin ends. A selector loop over select(2), whose deadlines are exact to the microsecond."""
    settings = json.loads(sys.argv[1])
    loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
    loop.run_until_complete(_serve(settings["routes"], settings["delay_s"]))
    loop.close()
