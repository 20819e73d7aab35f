"""Network namespaces without a name: each lives as long as somebody holds its file descriptor or runs in it.

    create(address) ─► Namespace(namespace fd, TUN fd) ─enter─► this thread is in it, as is what it starts

So nothing stays behind in the kernel, however this process ends. Linux only; needs CAP_SYS_ADMIN and /dev/net/tun.
"""

import ctypes
import fcntl
import os
import select
import signal
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
IFF_UP, IFF_RUNNING = 0x1, 0x40
SIOCGIFFLAGS, SIOCSIFFLAGS = 0x8913, 0x8914
SIOCSIFADDR, SIOCSIFNETMASK = 0x8916, 0x891C
SIOCSIFMTU, SIOCSIFTXQLEN = 0x8922, 0x8943
INTERFACE = b"wan0"
QUEUE_PACKETS = 10_000
"""Packets that wait for the pump before the kernel drops them."""
THREAD_NAMESPACE = "/proc/thread-self/ns/net"
KILL_ROUNDS = 100
KILL_ROUND_MS = 100


class WanUnavailable(Exception):
    """This machine or its user can't make network namespaces with TUN devices; the message says what failed."""


@dataclass(frozen=True, slots=True)
class Namespace:
    """A network namespace whose only way out is a TUN device. Both descriptors are the owner's to close."""

    fd: int
    tun_fd: int
    inode: int

    def close(self) -> None:
        """Let it go; it ends with the last process in it."""
        os.close(self.tun_fd)
        os.close(self.fd)


def create(address: str, *, mtu: int) -> Namespace:
    """A new namespace with this IPv4 address in a /24 network; the calling thread stays where it is.

    Raises:
        WanUnavailable: when that isn't possible here.
    """
    outcome: list[Namespace | OSError] = []

    def build() -> None:
        try:
            outcome.append(_build(address, mtu))
        except OSError as error:
            outcome.append(error)

    thread = threading.Thread(target=build, name="make-namespace")  # a thread can move alone, and ends in there
    thread.start()
    thread.join()
    if isinstance(outcome[0], OSError):
        raise WanUnavailable(f"no network namespaces with TUN devices here: {outcome[0]}") from outcome[0]
    return outcome[0]


@contextmanager
def enter(namespace: Namespace) -> Iterator[None]:
    """Move this thread into a namespace for a while. Threads and processes that it starts there stay there."""
    before = os.open(THREAD_NAMESPACE, os.O_RDONLY)
    try:
        _call("setns", namespace.fd, CLONE_NEWNET)
        try:
            yield
        finally:
            _call("setns", before, CLONE_NEWNET)
    finally:
        os.close(before)


def processes_in(inodes: Sequence[int]) -> list[int]:
    """Processes whose main thread is in one of these namespaces."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                inode = os.stat(f"/proc/{name}/ns/net").st_ino
            except OSError:  # it has ended, or is none of our business
                continue
            if inode in inodes:
                found.append(int(name))
    return found


def kill_all_in(inodes: Sequence[int]) -> None:
    """Kill every process in these namespaces, but not this one, until there is none."""
    for _ in range(KILL_ROUNDS):
        pids = [pid for pid in processes_in(inodes) if pid != os.getpid()]
        if not pids:
            return
        with ExitStack() as opened:
            ends = select.poll()
            for pid in pids:
                with suppress(ProcessLookupError):
                    fd = os.pidfd_open(pid)
                    opened.callback(os.close, fd)
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
                    ends.register(fd, select.POLLIN)
            ends.poll(KILL_ROUND_MS)


def _build(address: str, mtu: int) -> Namespace:
    with ExitStack() as on_failure:
        _call("unshare", CLONE_NEWNET)
        fd = os.open(THREAD_NAMESPACE, os.O_RDONLY)
        on_failure.callback(os.close, fd)
        tun_fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        on_failure.callback(os.close, tun_fd)
        fcntl.ioctl(tun_fd, TUNSETIFF, struct.pack("16sH22x", INTERFACE, IFF_TUN | IFF_NO_PI))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            _configure(control, address, mtu)
        on_failure.pop_all()
        return Namespace(fd, tun_fd, os.fstat(fd).st_ino)


def _configure(control: socket.socket, address: str, mtu: int) -> None:
    def request(number: int, interface: bytes, value: bytes) -> bytes:
        return fcntl.ioctl(control, number, struct.pack("16s24s", interface, value))

    def inet(text: str) -> bytes:
        return struct.pack("=HH4s", socket.AF_INET, 0, socket.inet_aton(text))

    def up(interface: bytes) -> None:
        flags = struct.unpack("16xH22x", request(SIOCGIFFLAGS, interface, b""))[0]
        request(SIOCSIFFLAGS, interface, struct.pack("H", flags | IFF_UP | IFF_RUNNING))

    up(b"lo")
    request(SIOCSIFADDR, INTERFACE, inet(address))
    request(SIOCSIFNETMASK, INTERFACE, inet("255.255.255.0"))
    request(SIOCSIFMTU, INTERFACE, struct.pack("i", mtu))
    request(SIOCSIFTXQLEN, INTERFACE, struct.pack("i", QUEUE_PACKETS))
    up(INTERFACE)


def _call(name: str, *args: int) -> None:
    """Call a function of the C library that Python knows only from 3.12 on."""
    libc = ctypes.CDLL(None, use_errno=True)
    function = getattr(libc, name, None)
    if function is None:
        raise OSError(f"{name} is missing in this system's C library")
    if function(*args) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
