"""When a packet that enters an emulated network leaves it: pure, with time as `now` and a Random for chance.

    send(now, a, b, packet) ─► queue of the rate limit, loss, delay, jitter ─► heap ─ arrivals(now) ─► packets

Packets of one direction keep their order, whatever the jitter.
"""

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random

MAX_QUEUE_S = 0.2
"""Longest queue in front of a rate limit; packets beyond are dropped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Path:
    """What happens to packets from one host to another, in each direction alike."""

    delay_s: float = 0.0
    """One-way delay."""
    jitter_s: float = 0.0
    """Most that is added to or taken from the delay, evenly distributed."""
    loss: float = 0.0
    """Probability that a packet is lost; 1 cuts the path."""
    rate_bps: float = 0.0
    """Bits per second of each direction; 0 is without limit."""

    def __post_init__(self) -> None:
        if self.delay_s < 0 or self.jitter_s < 0 or self.rate_bps < 0 or not 0 <= self.loss <= 1:
            raise ValueError(f"delay, jitter and rate must not be negative, loss must be in 0..1: {self}")


class Network:
    """All packets that are under way.

    Args:
        default: path of the pairs that are not in `paths`.
        paths: of single pairs of hosts, in either order.
        random: decides about loss and jitter.
    """

    def __init__(self, default: Path, paths: Mapping[tuple[int, int], Path], random: Random):
        self.num_packets = self.num_dropped = 0
        self._default = default
        self._paths: dict[tuple[int, int], Path] = {}
        self._random = random
        self._heap: list[tuple[float, int, int, bytes]] = []
        self._last: dict[tuple[int, int], float] = {}
        self._link_free: dict[tuple[int, int], float] = {}
        for (a, b), path in paths.items():
            self.set_path(a, b, path)

    @property
    def next_arrival(self) -> float | None:
        """When the next packet arrives."""
        return self._heap[0][0] if self._heap else None

    def set_path(self, a: int, b: int, path: Path) -> None:
        """Change the path of a pair for the packets to come."""
        self._paths[a, b] = self._paths[b, a] = path

    def set_default(self, path: Path) -> None:
        """Change the path of all pairs for the packets to come."""
        self._default = path
        self._paths.clear()

    def send(self, now: float, source: int, destination: int, packet: bytes) -> None:
        """A packet enters the network."""
        direction = (source, destination)
        path = self._paths.get(direction, self._default)
        self.num_packets += 1
        sent = self._transmitted(now, direction, path, len(packet))
        if sent is None or (path.loss and self._random.random() < path.loss):
            self.num_dropped += 1
            return
        jitter = self._random.uniform(-path.jitter_s, path.jitter_s) if path.jitter_s else 0.0
        due = max(now, sent + path.delay_s + jitter, self._last.get(direction, now))
        self._last[direction] = due
        heapq.heappush(self._heap, (due, self.num_packets, destination, packet))

    def arrivals(self, now: float) -> Iterator[tuple[float, int, bytes]]:
        """Take out what has arrived: (when it was due, destination, packet)."""
        while self._heap and self._heap[0][0] <= now:
            due, _, destination, packet = heapq.heappop(self._heap)
            yield due, destination, packet

    def _transmitted(self, now: float, direction: tuple[int, int], path: Path, num_bytes: int) -> float | None:
        """When the packet has passed the rate limit, or None when the queue is full."""
        if not path.rate_bps:
            return now
        start = max(now, self._link_free.get(direction, now))
        if start - now > MAX_QUEUE_S:
            return None
        self._link_free[direction] = start + 8 * num_bytes / path.rate_bps
        return self._link_free[direction]
