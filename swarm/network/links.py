"""The links of a process, by peer: which one to call over, which ones nobody needs. Pure but for closing them.

add / remove ──► Links ──► live(peer) ──► CallLink          idle(now) ──► those to close
"""

from collections.abc import Iterator

from swarm.network.calls import CallLink
from swarm.private.certificates import Proven


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

    def surplus(self, proven: Proven, *, max_per_peer: int, max_per_member: int) -> list[CallLink]:
        """Links that must go before a member gets one more, of its own those that idle longest."""
        links = [link for link in self if link.is_usable and link.proven.member.id == proven.member.id]
        links.sort(key=lambda link: link.last_used)
        of_peer = [link for link in links if link.proven.peer_id == proven.peer_id]
        going = of_peer[: max(0, len(of_peer) + 1 - max_per_peer)]
        others = [link for link in links if link not in going]
        return going + others[: max(0, len(others) + 1 - max_per_member)]

    def idle(self, now: float, idle_s: float) -> list[CallLink]:
        """Links over which nothing was asked for so long."""
        return [link for link in self if now - link.last_used > idle_s]
