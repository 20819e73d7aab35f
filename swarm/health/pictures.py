"""Where things lie in the page's pictures: numbers for SVG, no markup.

    Model ─► coverage: bars in lanes, a strip of replicas, ticks       points ─► chart: lines and bars over time
          └► latency_map: servers around this page, farther = slower

Horizontal places are percentages, so that bars follow the page's width while text keeps its size. Pure.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from swarm.health.history import Point
from swarm.health.state import Model, Server, Status

MAX_BARS = 64
"""Servers that are drawn; in larger swarms the strip of replicas shows them all."""
LANE_PX = 24
FULL_REPLICAS = 3
"""Replicas at which a block's column in the strip is full."""
MAP_PX = 400
MAX_NODES = 48
MAX_EDGES = 96
RINGS_MS = (1.0, 10.0, 100.0, 1000.0)
_INNER, _OUTER = 34.0, 168.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One server over the blocks that it serves."""

    server: Server
    x: float
    """Left end in percent."""
    width: float
    y: int
    """Upper edge in pixels."""
    load: float
    """Share of its capacity in use, in percent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Neighbouring blocks with as many replicas."""

    x: float
    width: float
    replicas: int
    height: float
    """In percent of the strip."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """Blocks × servers."""

    bars: tuple[Bar, ...]
    runs: tuple[Run, ...]
    ticks: tuple[tuple[float, int], ...]
    """Places in percent and the blocks there."""
    height: int
    """Of all lanes, in pixels."""
    num_hidden: int
    """Servers that are not drawn."""


def coverage(model: Model) -> Coverage:
    """The picture of who serves which blocks."""
    shown = [server for server in model.servers if server.status is not Status.GONE]
    drawn = sorted(shown, key=lambda it: (not it.is_serving, it.start))[:MAX_BARS]
    scale = 100.0 / model.num_blocks
    bars, ends = [], list[int]()
    for server in sorted(drawn, key=lambda it: (it.start, -it.end, it.peer_id)):
        lane = next((number for number, end in enumerate(ends) if end <= server.start), len(ends))
        ends[lane:] = [server.end, *ends[lane + 1 :]]
        bars.append(
            Bar(
                server=server,
                x=round(server.start * scale, 3),
                width=round((server.end - server.start) * scale, 3),
                y=lane * LANE_PX,
                load=round(100 * server.load, 1),
            )
        )
    return Coverage(
        bars=tuple(bars),
        runs=tuple(_runs(model.replicas)),
        ticks=tuple((round(block * scale, 3), block) for block in ticks(model.num_blocks)),
        height=max(1, len(ends)) * LANE_PX,
        num_hidden=len(shown) - len(drawn) + model.num_unlisted,
    )


def ticks(num_blocks: int, most: int = 8) -> list[int]:
    """Round block numbers from 0 to the end, not too many."""
    steps = (power * first for power in (1, 10, 100, 1000) for first in (1, 2, 5))
    step = next(step for step in steps if num_blocks <= most * step)
    inner = [block for block in range(0, num_blocks, step) if num_blocks - block > step / 2]
    return [*inner, num_blocks]


def _runs(replicas: Sequence[int]) -> list[Run]:
    scale, runs, start = 100.0 / len(replicas), [], 0
    for count, group in groupby(replicas):
        length = len(list(group))
        runs.append(
            Run(
                x=round(start * scale, 3),
                width=round(length * scale, 3),
                replicas=count,
                height=round(100 * min(count, FULL_REPLICAS) / FULL_REPLICAS, 1),
            )
        )
        start += length
    return runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A server on the map."""

    server: Server
    x: float
    y: float
    anchor: str
    """On which side of its label it lies: start, middle or end."""
    has_label: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """A measured link between two servers."""

    x1: float
    y1: float
    x2: float
    y2: float
    rtt_ms: float
    names: str

    @property
    def grade(self) -> int:
        """How slow it is, from 0 (10 ms) to 3."""
        return sum(self.rtt_ms > limit for limit in (10.0, 50.0, 150.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyMap:
    """Servers around this page: the farther out, the longer the round trip; in turn by their blocks."""

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    rings: tuple[tuple[float, str], ...]
    """Radii and what they stand for."""


def latency_map(model: Model) -> LatencyMap:
    """The picture of how far servers are from here and from each other."""
    reached = [server for server in model.servers if server.rtt_ms is not None and server.is_serving][:MAX_NODES]
    reached.sort(key=lambda it: (it.start + it.end, it.peer_id))
    nodes = []
    for number, server in enumerate(reached):
        angle = 2 * math.pi * number / len(reached) - math.pi / 2
        radius = _radius(server.rtt_ms or 0.0)
        nodes.append(
            Node(
                server=server,
                x=round(MAP_PX / 2 + radius * math.cos(angle), 1),
                y=round(MAP_PX / 2 + radius * math.sin(angle), 1),
                anchor="middle" if abs(math.cos(angle)) < 0.3 else "start" if math.cos(angle) > 0 else "end",
                has_label=len(reached) <= 24,
            )
        )
    return LatencyMap(
        nodes=tuple(nodes),
        edges=tuple(_edges(nodes)),
        rings=tuple((round(_radius(ms), 1), f"{ms:g} ms" if ms < 1000 else "1 s") for ms in RINGS_MS),
    )


def _radius(rtt_ms: float) -> float:
    """Logarithmic, from the first ring to the last; what is nearer or farther lies there, too."""
    share = math.log(max(rtt_ms, RINGS_MS[0]) / RINGS_MS[0]) / math.log(RINGS_MS[-1] / RINGS_MS[0])
    return _INNER + (_OUTER - _INNER) * min(share, 1.0)


def _edges(nodes: Sequence[Node]) -> list[Edge]:
    """Links between servers that are on the map; of two measurements of one link the shorter."""
    by_peer = {node.server.peer_id: node for node in nodes}
    best: dict[frozenset[str], tuple[float, Node, Node]] = {}
    for node in nodes:
        for link in node.server.links:
            other = by_peer.get(link.peer_id)
            if other is None or other is node:
                continue
            pair = frozenset((node.server.peer_id, link.peer_id))
            if pair not in best or link.rtt_ms < best[pair][0]:
                best[pair] = (link.rtt_ms, node, other)
    fastest = sorted(best.values(), key=lambda item: item[0])[:MAX_EDGES]
    return [
        Edge(x1=a.x, y1=a.y, x2=b.x, y2=b.y, rtt_ms=ms, names=f"{a.server.label} – {b.server.label}")
        for ms, a, b in fastest
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One quantity over time, in a box of 100 × 100."""

    line: str
    """SVG path; it breaks where nothing is known."""
    area: str
    """The same, closed down to the ground."""
    top: float
    """The value at the upper edge."""
    last: float | None
    """The latest known value."""


def chart(points: Sequence[Point | None], value: Callable[[Point], float | None], *, top: float | None = None) -> Chart:
    """Draw a value of each point.

    Args:
        points: oldest first; None where nothing is known.
        value: of a point; None where it has none.
        top: of the box; by default a round number above the largest value.
    """
    values = [None if point is None else value(point) for point in points]
    known = [number for number in values if number is not None]
    limit = top if top is not None else round_up(max(known, default=0.0))
    step = 100.0 / max(1, len(values) - 1)
    lines, areas = [], []
    for is_known, group in groupby(enumerate(values), key=lambda item: item[1] is not None):
        if not is_known:
            continue
        spots = [(i * step, 100.0 - 100.0 * min((number or 0.0) / limit, 1.0)) for i, number in group]
        if len(spots) == 1:
            spots.append((min(spots[0][0] + step / 2, 100.0), spots[0][1]))
        line = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in spots)
        lines.append(line)
        areas.append(f"{line}V100H{spots[0][0]:.1f}Z")
    return Chart(line="".join(lines), area="".join(areas), top=limit, last=known[-1] if known else None)


def round_up(value: float) -> float:
    """The next 1, 2 or 5 times a power of ten, and 1 for nothing."""
    if not 1e-12 < value < math.inf:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next((step * power for step in (1, 2, 5) if value <= step * power * (1 + 1e-9)), 10 * power)
