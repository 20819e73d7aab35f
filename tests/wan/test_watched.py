"""A watched host: what leaves it is seen, what stays on it is not."""

import sys
from collections.abc import Iterator

import pytest

from tests.wan.namespaces import WanUnavailable
from tests.wan.watched import ADDRESS, Watched


@pytest.fixture
def host() -> Iterator[Watched]:
    """A host, where that is permitted."""
    try:
        with Watched() as watched:
            yield watched
    except WanUnavailable as reason:
        pytest.skip(str(reason))


def test_calls_to_others_are_seen(host: Watched):
    """A TCP connection and a datagram, with their destination; nobody answers."""
    code = """
import socket
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"", ("198.51.100.7", 53))
tcp = socket.socket()
tcp.setblocking(False)
tcp.connect_ex(("192.0.2.1", 443))
"""
    assert host.popen([sys.executable, "-c", code]).wait() == 0
    assert host.wait_for_call(10)
    with host._called:
        host._called.wait_for(lambda: len(set(host.calls)) == 2, 10)
    assert set(host.calls) == {"UDP 198.51.100.7:53", "TCP 192.0.2.1:443"}


def test_what_stays_on_the_host_is_not(host: Watched):
    """Neither loopback nor the host's own address."""
    code = f"""
import socket
for host in ("127.0.0.1", "{ADDRESS}"):
    with socket.create_server((host, 0)) as server:
        socket.create_connection(server.getsockname()).close()
"""
    assert host.popen([sys.executable, "-c", code]).wait() == 0
    assert host.calls == []
