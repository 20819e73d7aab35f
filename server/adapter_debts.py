"""What clients owe the others for the time that loading their adapters took, and who may load more now.

    worked(client, seconds)  an adapter was checked, or brought to the device: a debt
    ran(seconds)             a batch: each client that is around has had its part of it, and owes so much less
    may_load(client)         it owes nothing, or is alone, or has brought nothing for GUARD_S

Bringing an adapter to the device keeps every batch waiting, and is no token of anybody, so turns by tokens
(`server.fairness`) don't limit it: whose rows are in every batch is never left out, only later. So loading for a client
may take as much time as its part of the batches does, with n clients around one nth of them, and one load more: who
opens session after session with ever new adapters prolongs the time of the others' batches by 1/n at most, and those
of its own that wait for adapters meanwhile. Besides, the time counts as service, which matters where tokens are short.
Pure: time enters as `now`.
"""

from collections.abc import Iterable
from math import inf

AROUND_S = 1.0
"""A client counts for so long after it has had work."""
GUARD_S = 2.0
"""A client may load something after so long, whatever it owes."""
MAX_SEEN = 1024
"""Clients that are remembered before the old ones are looked for."""


class AdapterDebts:
    """See the module."""

    def __init__(self) -> None:
        self._owed_s: dict[str, float] = {}
        """Of those who owe something."""
        self._loaded_at: dict[str, float] = {}
        """When each of them loaded something last."""
        self._seen_at: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._owed_s)

    def owed_s(self, client: str) -> float:
        """What a client owes."""
        return self._owed_s.get(client, 0.0)

    def seen(self, client: str, now: float) -> None:
        """The client has work."""
        self._seen_at[client] = now
        if len(self._seen_at) > MAX_SEEN:
            self._forget_absent(now)

    def worked(self, client: str, seconds: float, now: float) -> None:
        """Loading an adapter for this client has taken so long."""
        self._owed_s[client] = self.owed_s(client) + seconds
        self._loaded_at[client] = now

    def ran(self, seconds: float, now: float) -> None:
        """A batch has taken so long."""
        if not self._owed_s:
            return
        self._forget_absent(now)
        part = seconds / max(1, len(self._seen_at))
        self._owed_s = {client: owed - part for client, owed in self._owed_s.items() if owed > part}
        self._loaded_at = {client: at for client, at in self._loaded_at.items() if client in self._owed_s}

    def may_load(self, client: str, now: float) -> bool:
        """Whether another adapter may be loaded for this client now."""
        return client not in self._owed_s or now >= self.free_at([client], now)

    def free_at(self, clients: Iterable[str], now: float) -> float:
        """When the first of these may load something, even if no batch runs until then; infinite for none of them."""
        return min((self._free_at(client, now) for client in clients), default=inf)

    def _free_at(self, client: str, now: float) -> float:
        if client not in self._owed_s:
            return now
        others = [at for other, at in self._seen_at.items() if other != client]
        alone_at = max(others) + AROUND_S if others else now
        return min(alone_at, self._loaded_at[client] + GUARD_S)

    def _forget_absent(self, now: float) -> None:
        self._seen_at = {client: at for client, at in self._seen_at.items() if now - at <= AROUND_S}
