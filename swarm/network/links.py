"""The links of a process, by peer: which one to call over, which ones nobody needs. Pure but for closing them.

add / remove ──► Links ──► live(peer) ──► CallLink          idle(now) ──► those to close
"""

from collections.abc import Iterator

from swarm.network.calls import CallLink


class Links:
    """Links with members; two peers that dial each other at the same time have two."""

    def __init__(self) -> None:
        self._by_peer: dict[str, list[CallLink]] = {}

    def __iter__(self) -> Iterator[CallLink]:
        return (link for links in list(self._by_peer.values()) for link in list(links))

    def __len__(self) -> int:
        return sum(map(len, self._by_peer.values()))

    @property
    def peers(self) -> list[str]:
        """Ids of the peers with a link."""
        return list(self._by_peer)

    def add(self, link: CallLink) -> None:
        """A link was made."""
        self._by_peer.setdefault(link.proven.peer_id, []).append(link)

    def remove(self, link: CallLink) -> None:
        """A link is over."""
        links = self._by_peer.get(link.proven.peer_id, [])
        if link in links:
            links.remove(link)
        if not links:
            self._by_peer.pop(link.proven.peer_id, None)

    def live(self, peer_id: str) -> CallLink | None:
        """A link with this peer, the newest."""
        return next((link for link in reversed(self._by_peer.get(peer_id, ())) if link.is_usable), None)

    def idle(self, now: float, idle_s: float) -> list[CallLink]:
        """Links over which nothing was asked for so long."""
        return [link for link in self if now - link.last_used > idle_s]
