"""Memory for histories: what servers sent on and keep, so that a lost next server can be replaced.

    session ──use(key, client, link)──► HistoryBudget ── over the limit ──► Link.drop_history of the biggest client's
                                                                            least recently used session

A session whose history was dropped goes on; only when its next server is lost must the client replay one hop more.
Pure bookkeeping; it doesn't know what a session does.
"""

from collections import OrderedDict
from collections.abc import Hashable

from swarm.link import Link


class HistoryBudget:
    """Counts the bytes of all histories and keeps them under a limit.

    Args:
        limit_bytes: memory for the histories of all sessions; 0 keeps none.
    """

    def __init__(self, limit_bytes: int):
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self.num_dropped = 0
        """Histories that had to go, since the start."""
        self._clients: dict[str, OrderedDict[Hashable, tuple[Link, int]]] = {}
        """Of each client its sessions, least recently used first, with the bytes counted for each."""

    @property
    def is_on(self) -> bool:
        """Whether histories are kept at all."""
        return self.limit_bytes > 0

    @property
    def is_full(self) -> bool:
        """Whether what is still to be sent alone fills the memory."""
        return self.used_bytes > self.limit_bytes

    def use(self, key: Hashable, client: str, link: Link) -> None:
        """Count what the link of a session holds now, as the most recently used; drop others' history if need be."""
        sessions = self._clients.setdefault(client, OrderedDict())
        _, before = sessions.pop(key, (link, 0))
        now = link.history_bytes
        sessions[key] = (link, now)
        self.used_bytes += now - before
        if self.is_on and self.is_full:
            self._shrink()

    def forget(self, key: Hashable, client: str) -> None:
        """A session has ended."""
        sessions = self._clients.get(client, OrderedDict())
        _, counted = sessions.pop(key, (None, 0))
        self.used_bytes -= counted
        if not sessions:
            self._clients.pop(client, None)

    def bytes_of(self, client: str) -> int:
        """What one client's sessions hold."""
        return sum(counted for _, counted in self._clients.get(client, {}).values())

    def __repr__(self) -> str:
        return f"<HistoryBudget {self.used_bytes}/{self.limit_bytes} bytes | {self.num_dropped} dropped>"

    def _shrink(self) -> None:
        """Drop histories, the biggest client's first, until the rest fits or everything left is still to be sent."""
        for client in sorted(self._clients, key=self.bytes_of, reverse=True):
            for key in list(self._clients[client]):
                if not self.is_full:
                    return
                self._drop(client, key)

    def _drop(self, client: str, key: Hashable) -> None:
        link, counted = self._clients[client][key]
        link.drop_history()
        left = link.history_bytes
        self._clients[client][key] = (link, left)
        self.used_bytes += left - counted
        self.num_dropped += left < counted
