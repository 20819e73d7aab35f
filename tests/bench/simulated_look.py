"""How a simulated server finds out who is there: the questions of `swarm.server.scout`, and the time that they take.

    neighbours ─ask─► answers, slow ones ─doubtful─► others are asked as well ─► all were heard, or had their time: then

Whom it asks is decided by the real code; the dead are silent, the living answer in time.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from swarm.coordinates import round_trip_s
from swarm.pings import PING_TIMEOUT_S, SLOW_S, neighbours, slow_after_s
from swarm.registry import ServerRecord
from swarm.server.scout import LOOK_TIMEOUT_S, MAX_DOUBTS, doubtful

if TYPE_CHECKING:
    from tests.bench.swarm_simulation import Host, World


class Look:
    """One look around: rounds of questions that overlap, in all LOOK_TIMEOUT_S at most. As `Scout`, see there.

    Args:
        world: in which the dead are silent.
        host: who asks.
        then: what to do when it knows who answers.
    """

    def __init__(self, world: "World", host: "Host", then: Callable[[], None]):
        self._world, self._host, self._then = world, host, then
        self._asked: set[str] = set()
        self._slow: set[str] = set()
        self._num_rounds = 0
        self._is_over = False

    def begin(self, *, again: bool = False) -> None:
        """Ask the neighbours; also the silent once more, if they are asked again."""
        world, host = self._world, self._host
        world.at(LOOK_TIMEOUT_S, self._finish)
        asking = neighbours(host.blocks, world.records(host), host.machine.place, world.generator)
        self._ask(asking + (world.silent_to(host)[:MAX_DOUBTS] if again else []))

    def _ask(self, asking: list[ServerRecord]) -> None:
        self._asked.update(record.peer_id for record in asking)
        if asking:
            self._num_rounds += 1
            world = self._world
            silent = [record for record in asking if world.hosts[record.peer_id].died_at <= world.now]
            for record in silent:
                world.at(self._slow_after_s(record), partial(self._is_slow, record.peer_id))
            slowest_s = max(self._slow_after_s(record) - SLOW_S for record in asking)
            world.at(PING_TIMEOUT_S if silent else slowest_s, lambda: self._hear(asking, silent))
        elif not self._num_rounds:
            self._finish()

    def _is_slow(self, peer_id: str) -> None:
        if not self._is_over and peer_id not in self._host.suspects:
            self._slow.add(peer_id)
            self._ask(self._doubtful())

    def _hear(self, asking: list[ServerRecord], silent: list[ServerRecord]) -> None:
        if self._is_over:
            return
        self._num_rounds -= 1
        self._host.suspects.update({record.peer_id: record.expires_at for record in silent})
        self._slow.difference_update(record.peer_id for record in asking)
        self._ask(self._doubtful())

    def _doubtful(self) -> list[ServerRecord]:
        known = self._world.records(self._host)
        late = {record.peer_id for record in known if record.is_late(self._world.now)}
        slow = [record for record in known if record.peer_id in self._slow]
        present = [record for record in known if record.peer_id not in self._slow]
        return doubtful(present, self._world.silent_to(self._host) + slow, late, self._asked)

    def _slow_after_s(self, record: ServerRecord) -> float:
        assert record.place is not None
        return slow_after_s(round_trip_s(self._host.machine.place, record.place))

    def _finish(self) -> None:
        if not self._is_over:
            self._is_over = True
            if self._host.died_at > self._world.now:
                self._then()
