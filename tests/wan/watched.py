"""A host whose way out leads to us: whatever its processes say to anybody else is written down, and answered by nobody.

    Watched ─ namespaces.create ─► loopback, one address, and a default route to a TUN device
            ─ popen, inside     ─► what runs there            `calls`: TCP and UDP packets that wanted to leave

So a test can hold that something calls nobody, DNS servers included, whatever libraries and processes it consists of.
"""

import ctypes
import fcntl
import os
import socket
import subprocess
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any, Self

from tests.wan import namespaces
from tests.wan.namespaces import INTERFACE, Namespace, WanUnavailable

ADDRESS = "10.77.0.1"
SIOCADDRT = 0x890B
RTF_UP = 0x0001
_TRANSPORTS = {6: "TCP", 17: "UDP"}
_STOP_TIMEOUT_S = 10.0


class Watched:
    """One host; a context manager.

    Raises (on entering):
        WanUnavailable: where network namespaces or TUN devices are not permitted.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        """What wanted to leave: "TCP 192.0.2.1:443"."""
        self._namespace: Namespace
        self._processes: list[subprocess.Popen[Any]] = []
        self._reader = threading.Thread(target=self._read, name="watch a host", daemon=True)
        self._called = threading.Condition()

    def __enter__(self) -> Self:
        self._namespace = namespaces.create(ADDRESS, mtu=1500)
        with ExitStack() as on_failure:
            on_failure.callback(self._namespace.close)
            try:
                with namespaces.enter(self._namespace):
                    _add_default_route()
            except OSError as error:
                raise WanUnavailable(f"no default route in a network namespace: {error}") from error
            on_failure.pop_all()
        os.set_blocking(self._namespace.tun_fd, True)
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        namespaces.kill_all_in([self._namespace.inode])
        for process in self._processes:
            process.wait(_STOP_TIMEOUT_S)
            if process.stdout is not None:
                process.stdout.close()
        with namespaces.enter(self._namespace), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as waker:
            waker.sendto(b"", ("192.0.2.255", 9))  # so that the reader looks up, and ends
        self._reader.join(_STOP_TIMEOUT_S)
        self._namespace.close()

    def popen(self, command: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
        """Start a process there; it is killed at the end."""
        with namespaces.enter(self._namespace):
            process: subprocess.Popen[Any] = subprocess.Popen(command, **options)
        self._processes.append(process)
        return process

    def wait_for_call(self, timeout_s: float) -> bool:
        """Whether anything has left by then."""
        with self._called:
            return self._called.wait_for(lambda: bool(self.calls), timeout_s)

    def _read(self) -> None:
        with suppress(OSError):
            while True:
                call = _describe(os.read(self._namespace.tun_fd, 65536))
                if call == "UDP 192.0.2.255:9":
                    return
                if call is not None:
                    with self._called:
                        self.calls.append(call)
                        self._called.notify_all()


def _describe(packet: bytes) -> str | None:
    """Protocol and destination of a TCP or UDP packet; None for what the kernel says by itself."""
    version = packet[0] >> 4
    if version == 4:
        header, number, host = (packet[0] & 15) * 4, packet[9], socket.inet_ntop(socket.AF_INET, packet[16:20])
    elif version == 6:
        header, number, host = 40, packet[6], socket.inet_ntop(socket.AF_INET6, packet[24:40])
    else:
        return None
    if number not in _TRANSPORTS:
        return None
    return f"{_TRANSPORTS[number]} {host}:{int.from_bytes(packet[header + 2 : header + 4], 'big')}"


class _SocketAddress(ctypes.Structure):
    """struct sockaddr of an IPv4 address that is any."""

    _fields_ = (("family", ctypes.c_ushort), ("data", ctypes.c_char * 14))


class _Route(ctypes.Structure):
    """struct rtentry, see <net/route.h>."""

    _fields_ = (
        ("pad1", ctypes.c_ulong),
        ("destination", _SocketAddress),
        ("gateway", _SocketAddress),
        ("mask", _SocketAddress),
        ("flags", ctypes.c_ushort),
        ("pad2", ctypes.c_short),
        ("pad3", ctypes.c_ulong),
        ("pad4", ctypes.c_void_p),
        ("metric", ctypes.c_short),
        ("device", ctypes.c_char_p),
        ("mtu", ctypes.c_ulong),
        ("window", ctypes.c_ulong),
        ("round_trip", ctypes.c_ushort),
    )


def _add_default_route() -> None:
    """As `ip route add default dev wan0`."""
    anywhere = _SocketAddress(socket.AF_INET, b"")
    route = _Route(destination=anywhere, gateway=anywhere, mask=anywhere, flags=RTF_UP, device=INTERFACE)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCADDRT, bytes(route))
