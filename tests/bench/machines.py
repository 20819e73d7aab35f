"""Machines for simulated swarms: as different in room, speed and line, and as scattered, as those of volunteers.

Generator ─► make_machines ─► Machine: blocks that fit, tokens per second, seconds to load others, place
"""

import numpy as np

from swarm.coordinates import Place
from tests.bench.swarm_simulation import Machine

TOWNS = (
    (0.0, 0.0, 0.30),
    (0.012, 0.01, 0.20),
    (0.045, 0.02, 0.20),
    (0.07, 0.0, 0.10),
    (0.09, 0.06, 0.10),
    (0.12, 0.03, 0.10),
)
"""Two coordinates in seconds, and the part of all servers: Europe, its east, both coasts of America, Asia, Oceania."""
CAPACITIES_TPS = (50.0, 800.0)
"""Tokens per second through one block: log-uniform."""
LINES_BYTES_PER_S = (5e6, 125e6)
"""Bandwidths of machines: log-uniform."""
BLOCK_BYTES = 400e6
"""Of a large model, in four bits."""
READY_S = 20.0
"""What loading takes besides the download."""


def make_machines(
    generator: np.random.Generator,
    num_servers: int,
    num_blocks: int,
    *,
    longest: int,
    load_s: float | None = None,
    on_disk: bool = False,
    prefix: str = "p",
) -> list[Machine]:
    """Servers that could hold the model twice.

    Args:
        generator: the source of randomness.
        num_servers: how many.
        num_blocks: of the model.
        longest: most blocks that one holds, or more, if the model would not fit twice.
        load_s: seconds to load other blocks, the same for all; by default each downloads them over its own line.
        on_disk: whether the files are there: nothing is fetched, it takes as long for other reasons.
        prefix: of their names.
    """
    while True:
        lengths = generator.integers(2, longest + 1, num_servers)
        if lengths.sum() >= 2 * num_blocks:
            break
        longest = min(longest + 1, num_blocks)
    capacities = _log_uniform(generator, CAPACITIES_TPS, num_servers)
    towns = generator.choice(len(TOWNS), num_servers, p=[share for _, _, share in TOWNS])
    places = [place_in(generator, int(town)) for town in towns]
    loads_s = np.full(num_servers, load_s)
    if load_s is None:
        loads_s = READY_S + lengths * BLOCK_BYTES / _log_uniform(generator, LINES_BYTES_PER_S, num_servers)
    return [
        Machine(
            name=f"{prefix}{index}",
            length=int(lengths[index]),
            capacity_tps=float(capacities[index]),
            load_s=float(loads_s[index]),
            fetch_s=0.0 if on_disk else max(0.0, float(loads_s[index]) - READY_S),
            place=places[index],
        )
        for index in range(num_servers)
    ]


def place_in(generator: np.random.Generator, town: int) -> Place:
    """A place in or near a town, behind a line of its own."""
    x, y, _ = TOWNS[town]
    near = generator.normal(0.0, 0.004, 3)
    return Place(
        position=(x + near[0], y + near[1], near[2]), height_s=float(generator.uniform(0.001, 0.008)), error=0.1
    )


def _log_uniform(generator: np.random.Generator, edges: tuple[float, float], count: int) -> np.ndarray:
    return np.exp(generator.uniform(np.log(edges[0]), np.log(edges[1]), count))
