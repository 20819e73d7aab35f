"""A router between a host and the rest of the network: it translates addresses, and may let nobody in. Pure.

host ─ inside address ─► out ─ outside address ─► network            closed: a port per peer (symmetric, the worst
host ◄─ inside address ─ into ◄─ outside address ─ network           kind); open: all ports lead to the host
"""

import struct
from itertools import count

TCP, UDP = 6, 17
FIRST_PORT = 20_000
_CHECKSUM_AT = {TCP: 16, UDP: 6}
_Flow = tuple[int, bytes, int, int]
"""Protocol, address and port of the peer, port of the host."""


class Nat:
    """One router.

    Args:
        inside: the host's own address.
        outside: the one that others see.
        is_open: whether others may begin; may change, and who has begun goes on then.
    """

    def __init__(self, inside: bytes, outside: bytes, *, is_open: bool) -> None:
        self.is_open = is_open
        self._inside, self._outside = inside, outside
        self._ports: dict[_Flow, int] = {}
        self._hosts_ports: dict[tuple[int, bytes, int, int], int] = {}
        self._free = count(FIRST_PORT)

    def out(self, packet: bytes) -> bytes | None:
        """A packet of the host as the others see it; None for a protocol that it doesn't know."""
        protocol, head = packet[9], (packet[0] & 15) * 4
        if protocol not in _CHECKSUM_AT:
            return None
        port, peer_port = struct.unpack_from("!HH", packet, head)
        outer = self._port(protocol, packet[16:20], peer_port, port)
        return _rewritten(packet, 12, self._outside, head, outer)

    def into(self, packet: bytes) -> bytes | None:
        """A packet for the host; None where nothing of the host has gone there before."""
        protocol, head = packet[9], (packet[0] & 15) * 4
        if protocol not in _CHECKSUM_AT:
            return None
        peer_port, outer = struct.unpack_from("!HH", packet, head)
        port = self._hosts_ports.get((protocol, packet[12:16], peer_port, outer), outer if self.is_open else None)
        return None if port is None else _rewritten(packet, 16, self._inside, head + 2, port)

    def _port(self, protocol: int, peer: bytes, peer_port: int, port: int) -> int:
        flow = protocol, peer, peer_port, port
        if flow not in self._ports:
            self._ports[flow] = outer = port if self.is_open else next(self._free)
            self._hosts_ports[protocol, peer, peer_port, outer] = port
        return self._ports[flow]


def _rewritten(packet: bytes, address_at: int, address: bytes, port_at: int, port: int) -> bytes:
    """With another address and port, and checksums that fit (RFC 1624, equation 3)."""
    data, head, protocol = bytearray(packet), (packet[0] & 15) * 4, packet[9]
    old = packet[address_at : address_at + 4], packet[port_at : port_at + 2]
    data[address_at : address_at + 4] = address
    data[port_at : port_at + 2] = struct.pack("!H", port)
    _adjust(data, 10, old[0], address)
    at = head + _CHECKSUM_AT[protocol]
    if protocol == TCP or data[at : at + 2] != b"\0\0":  # UDP may have none
        _adjust(data, at, old[0] + old[1], address + struct.pack("!H", port))
    return bytes(data)


def _adjust(data: bytearray, at: int, old: bytes, new: bytes) -> None:
    total = ~struct.unpack_from("!H", data, at)[0] & 0xFFFF
    words = f"!{len(old) // 2}H"
    for before, after in zip(struct.unpack(words, old), struct.unpack(words, new), strict=True):
        total += (~before & 0xFFFF) + after
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    struct.pack_into("!H", data, at, ~total & 0xFFFF)
