"""Runs the libp2p daemon (p2pd, from hivemind's wheel) as a child process and tells when it ends.

The child's output pipe is its life line: it closes when the process dies, whatever killed it. The daemon in turn ends
when its last client has gone, so it does not outlive a killed parent. This module knows nothing of what is said to
the daemon.

    Daemon.start(settings) -> p2pd --"Peer ID:"--> ready      p2pd dies -> output closes -> `ended` is set
"""

import asyncio
import ipaddress
import logging
import os
import shutil
import socket
import subprocess
import tempfile
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from swarm.errors import ConfigError
from swarm.network.hive import P2PD_PATH, P2PDaemonError

log = logging.getLogger(__name__)

STOP_TIMEOUT_S = 2.0
_DIRECTORY_PREFIX = "swarm-"
_MAX_SOCKET_PATH = 96


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonSettings:
    """Command line of the daemon.

    Attributes:
        directory: private directory for its control socket.
        identity_path: identity file in libp2p's format.
        listen: multiaddrs to listen on; empty for a client that accepts no connections.
        announce: multiaddrs to announce in place of those found.
        is_hidden: whether nobody else can connect to it: then it is not asked where peers are.
        nat_port_map: ask the router for a port by UPnP or NAT-PMP.
        max_message_bytes: largest unary message.
    """

    directory: Path
    identity_path: Path
    listen: tuple[str, ...]
    announce: tuple[str, ...] = ()
    is_hidden: bool = False
    nat_port_map: bool = False
    max_message_bytes: int = 16 << 20

    @property
    def control_path(self) -> str:
        """The daemon's control socket."""
        return str(self.directory / "p2pd.sock")

    def remove_socket(self) -> None:
        """Make room for the socket of the next daemon."""
        Path(self.control_path).unlink(missing_ok=True)

    @property
    def listen_path(self) -> str:
        """The socket on which this process takes incoming streams."""
        return str(self.directory / "streams.sock")

    @property
    def command(self) -> list[str]:
        """The command that starts the daemon."""
        options = {
            "id": self.identity_path,
            "listen": f"/unix{self.control_path}",
            "persistentConnMaxMsgSize": self.max_message_bytes,
            "natPortMap": int(self.nat_port_map),
            "tls": 1,
            "autonat": 0,
            "connManager": 1,
            "relay": 0,
            "relayDiscovery": 0,
            "autoRelay": 0,
            "idleTimeout": "30s",
            **({"hostAddrs": ",".join(self.listen)} if self.listen else {"noListenAddrs": 1}),
            **({"dhtServer": 1} if self.listen and not self.is_hidden else {"dhtClient": 1}),
        }
        if self.announce:
            options["announceAddrs"] = ",".join(self.announce)
        return [str(P2PD_PATH), *(f"-{name}={value}" for name, value in options.items())]


class _Output(asyncio.Protocol):
    """Reads the daemon's output: `ready` once it has started, `ended` once it has closed."""

    def __init__(self) -> None:
        self.ready = asyncio.Event()
        self.ended = asyncio.Event()
        self.last_lines: deque[str] = deque(maxlen=8)
        self._rest = b""

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data)[-65536:].split(b"\n")
        for line in lines:
            text = line.decode(errors="replace").rstrip()
            log.debug("p2pd: %s", text)
            self.last_lines.append(text)
            if text.startswith("Peer ID:"):
                self.ready.set()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._rest:
            self.last_lines.append(self._rest.decode(errors="replace"))
        self.ended.set()


class Daemon:
    """One running daemon process."""

    def __init__(self, process: subprocess.Popen[bytes], output: _Output) -> None:
        self._process = process
        self._output = output

    @classmethod
    async def start(cls, settings: DaemonSettings, *, timeout_s: float) -> "Daemon":
        """Start the daemon and wait until it is ready.

        Raises:
            P2PDaemonError: when it exits or is not ready in time; the message carries its last words.
        """
        settings.remove_socket()
        environment = {**os.environ, "GOLOG_LOG_LEVEL": "error"}
        try:
            process = subprocess.Popen(  # noqa: ASYNC220 - a few ms, and no child watcher is needed
                settings.command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # a Ctrl-C in the terminal is for us; the daemon must outlive our goodbyes
            )
        except OSError as error:
            raise P2PDaemonError(f"{P2PD_PATH}: {error.strerror}") from error
        _, output = await asyncio.get_running_loop().connect_read_pipe(_Output, process.stdout)
        daemon = cls(process, output)
        ready, ended = asyncio.ensure_future(output.ready.wait()), asyncio.ensure_future(output.ended.wait())
        try:
            await asyncio.wait({ready, ended}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        except BaseException:
            daemon.kill()
            process.wait()  # a killed process is gone within milliseconds
            raise
        finally:
            ready.cancel()
            ended.cancel()
        if output.ready.is_set():
            return daemon
        await daemon.stop()
        words = " | ".join(output.last_lines) or f"not ready within {timeout_s} s"
        raise P2PDaemonError(f"the libp2p daemon failed to start: {words}")

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    async def wait(self) -> None:
        """Wait until the daemon has ended, for whatever reason."""
        await self._output.ended.wait()

    def kill(self) -> None:
        """End the daemon at once."""
        self._process.kill()

    async def stop(self) -> None:
        """Ask the daemon to end, then make it end; returns when it has."""
        try:
            if self._process.poll() is None:
                self._process.terminate()
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await self.wait()
        except TimeoutError:
            self._process.kill()
        await asyncio.to_thread(self._process.wait)


def make_directory() -> Path:
    """A directory for sockets that only this user can enter; those that dead processes have left are removed."""
    root = tempfile.gettempdir()
    if len(root) > _MAX_SOCKET_PATH - 32:
        root = "/tmp"  # a unix socket's path has at most 108 bytes
    for old in Path(root).glob(f"{_DIRECTORY_PREFIX}[0-9]*-*"):
        pid = old.name.removeprefix(_DIRECTORY_PREFIX).split("-")[0]
        if pid.isdigit() and not _is_running(int(pid)):
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_DIRECTORY_PREFIX}{os.getpid()}-", dir=root))


def resolve_host(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The address behind a host name or literal.

    Raises:
        ConfigError: when there is none.
    """
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    try:
        return ipaddress.ip_address(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise ConfigError(f"host {host!r} is not an address and can't be resolved: {error.strerror}") from error


def claim_port(host: str, port: int) -> int:
    """Check that TCP `port` on `host` is free (0: pick one) and return it.

    The daemon binds with SO_REUSEPORT, so a second one on the same port would start and steal connections: hence the
    check.

    Raises:
        ConfigError: when the port is taken, or the address is not one of this machine.
    """
    address = resolve_host(host)
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections in TIME_WAIT are no obstacle
        try:
            probe.bind((str(address), port))
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"can't listen on {host} port {port}: {getattr(error, 'strerror', None) or error}"
            ) from error
        return int(probe.getsockname()[1])


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
