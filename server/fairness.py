"""Virtual Token Counter: which client's turn it is, by the service that each has had.

    arrive(client) ─► lifted to the floor, waits ─► charge(client, service) ... ─► settle(who was left out)

Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024), with the scheduler's batch in place of a request:
after each batch a client *waits* if ready work of it was left out, and no others do. Service is W_PROMPT per prompt
token and W_DECODE per decoded token, times the part of the span that it ran through, divided by the client's weight.

A client that begins to wait is lifted to the *floor*: the least counter among those who wait, or, where nobody does,
the greatest of those who waited last. So idleness earns no credit, and no debt either. The floor never sinks; a
counter that it has reached says nothing any more, and is dropped. Pure.
"""

from collections.abc import Iterable, Mapping

W_PROMPT = 1.0
"""Service of one prompt token."""
W_DECODE = 2.0
"""Service of one decoded token."""


class VirtualCounters:
    """One counter per client that waits, or is ahead of all who do.

    Args:
        weights: share of a client relative to others; 1 where it isn't given.
    """

    def __init__(self, weights: Mapping[str, float] | None = None):
        self._weights = weights or {}
        self._counters: dict[str, float] = {}
        self._waiting: set[str] = set()
        self._floor = 0.0

    def __len__(self) -> int:
        return len(self._counters)

    @property
    def waiting(self) -> frozenset[str]:
        """Clients with ready work."""
        return frozenset(self._waiting)

    def of(self, client: str) -> float:
        """The counter of a client, as if it began to wait now where it doesn't."""
        return self._counters.get(client, self._floor)

    def arrive(self, client: str) -> None:
        """The client has ready work now."""
        if client in self._waiting:
            return
        counter = max(self.of(client), self._floor)
        self._counters[client] = counter
        if not self._waiting:
            self._floor = counter
        self._waiting.add(client)

    def price(self, client: str, service: float) -> float:
        """By how much so much service raises the counter of a client."""
        return service / self._weights.get(client, 1.0)

    def charge(self, client: str, service: float) -> None:
        """The client gets so much service."""
        self._counters[client] = self.of(client) + self.price(client, service)

    def settle(self, left_out: Iterable[str]) -> None:
        """A batch was chosen, and ready work of these clients is not in it."""
        left = self._waiting.intersection(left_out)
        if left:
            self._floor = max(self._floor, min(self._counters[client] for client in left))
        elif self._waiting:
            self._floor = max(self._floor, max(self._counters[client] for client in self._waiting))
        self._waiting = left
        if len(self._counters) > len(left):
            self._counters = {
                client: counter for client, counter in self._counters.items() if counter > self._floor or client in left
            }
