"""Tests of hosts behind routers: the translation, and the kernel's TCP through it."""

import socket
import struct
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.wan import Wan, WanUnavailable
from tests.wan.nat import TCP, UDP, Nat

HOST, OUTSIDE, PEER, STRANGER = (socket.inet_aton(f"10.0.0.{last}") for last in (1, 101, 2, 3))


def make_packet(source: bytes, port: int, destination: bytes, peer_port: int, protocol: int, body: bytes) -> bytes:
    """A packet with right checksums."""
    ports = struct.pack("!HH", port, peer_port)
    if protocol == TCP:
        segment = ports + struct.pack("!IIBBHHH", 1, 2, 5 << 4, 0x18, 100, 0, 0) + body
    else:
        segment = ports + struct.pack("!HH", 8 + len(body), 0) + body
    at = 16 if protocol == TCP else 6
    pseudo = source + destination + struct.pack("!BBH", 0, protocol, len(segment))
    segment = segment[:at] + struct.pack("!H", checksum(pseudo + segment) or 0xFFFF) + segment[at + 2 :]
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(segment), 0, 0, 64, protocol, 0, source, destination)
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + segment


def checksum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def assert_sound(packet: bytes) -> None:
    """Both checksums fit."""
    assert checksum(packet[:20]) == 0
    pseudo = packet[12:20] + struct.pack("!BBH", 0, packet[9], len(packet) - 20)
    assert checksum(pseudo + packet[20:]) == 0


def caller_of(server: socket.socket) -> str:
    """The address of the next one who connects."""
    connection, (host, _) = server.accept()
    connection.close()
    return host


ports = st.integers(1, 65535)


@given(ports, ports, st.sampled_from([TCP, UDP]), st.binary(max_size=40), st.booleans())
def test_answers_find_the_way_back_and_checksums_fit(
    port: int, peer_port: int, protocol: int, body: bytes, is_open: bool
):
    """Whatever is in the packets."""
    nat = Nat(HOST, OUTSIDE, is_open=is_open)
    sent = nat.out(make_packet(HOST, port, PEER, peer_port, protocol, body))
    assert sent is not None and sent[12:16] == OUTSIDE and sent.endswith(body)
    assert_sound(sent)
    (outer,) = struct.unpack_from("!H", sent, 20)
    back = nat.into(make_packet(PEER, peer_port, OUTSIDE, outer, protocol, body))
    assert back is not None and back[12:20] == PEER + HOST and back.endswith(body)
    assert struct.unpack_from("!HH", back, 20) == (peer_port, port)
    assert_sound(back)


@given(ports, ports, st.sampled_from([TCP, UDP]))
def test_who_was_not_written_to_comes_in_only_where_it_is_open(port: int, peer_port: int, protocol: int):
    """A closed router knows its peers by address and port."""
    for is_open in (False, True):
        nat = Nat(HOST, OUTSIDE, is_open=is_open)
        sent = nat.out(make_packet(HOST, port, PEER, peer_port, protocol, b""))
        assert sent is not None
        (outer,) = struct.unpack_from("!H", sent, 20)
        assert (nat.into(make_packet(STRANGER, peer_port, OUTSIDE, outer, protocol, b"")) is not None) is is_open


@given(ports, ports, ports, st.sampled_from([TCP, UDP]))
def test_who_has_begun_goes_on_when_a_router_is_closed(port: int, peer_port: int, other: int, protocol: int):
    """As where a port is forwarded no longer: the router knows the flows that there were, whoever began them."""
    nat = Nat(HOST, OUTSIDE, is_open=True)
    coming = make_packet(PEER, peer_port, OUTSIDE, port, protocol, b"")
    assert nat.into(coming) is not None
    sent = nat.out(make_packet(HOST, port, PEER, peer_port, protocol, b""))
    nat.is_open = False
    assert nat.out(make_packet(HOST, port, PEER, peer_port, protocol, b"")) == sent
    assert nat.into(coming) is not None
    assert nat.into(make_packet(STRANGER, other, OUTSIDE, port, protocol, b"")) is None


def test_connections_pass_a_router_outwards_only_unless_it_is_open():
    """With the kernel's TCP: hosts behind either kind reach a third, which reaches the one that is open."""
    try:
        network = Wan(3, nats={1: "closed", 2: "open"}).__enter__()
    except WanUnavailable as error:
        pytest.skip(str(error))
    try:
        with network.inside(0):
            public = socket.create_server((network.address(0), 0))
        seen: list[str] = []
        for host in (1, 2):
            accepting = threading.Thread(target=lambda: seen.append(caller_of(public)))
            accepting.start()
            with network.inside(host), socket.create_connection(public.getsockname(), 5):
                accepting.join()
        assert seen == [network.outside_address(1), network.outside_address(2)]
        public.close()
        for host in (1, 2):
            with network.inside(host):
                hidden = socket.create_server((network.address(host), 0))
            target = network.outside_address(host), hidden.getsockname()[1]
            with network.inside(0):
                if host == 1:
                    with pytest.raises(TimeoutError):
                        socket.create_connection(target, 0.3)
                else:
                    socket.create_connection(target, 5).close()
            hidden.close()
    finally:
        network.__exit__(None, None, None)
