"""Searches for values that wait for nobody longer than they must, and say which keys they could not read.

    SearchNode.read(keys) ─► hivemind's get_many ─► ask(peer, keys) ─► Search: each peer once, until the time is over
                                            of each key, who has answered: was it read? ◄─┘

hivemind's search takes silence for "nothing there": if all who keep a key are too busy to answer within 3 s, its values
seem to be gone. Here a key counts as read if one of the nodes nearest to it has answered: those keep its values. Who is
slow is waited for until COPIES of them have answered, so that dead nodes, which nobody knows yet, cost a second.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from contextvars import ContextVar
from typing import Any

from swarm.network.hive import DHTID
from swarm.network.store_search import StoreSearchNode

Answer = dict[Any, Any] | None
Ask = Callable[[Any, Collection[Any]], Awaitable[Answer]]

SLOW_S = 1.0
"""Who has not answered after so long is slow: a search goes on without it ..."""
COPIES = 2
"""... when so many of those nearest to each key have answered, each of which keeps all that was stored under it."""
GRACE_S = 1.0
"""How long hivemind may take to end a search in which nobody is asked any longer."""


class Search:
    """One search: whom it asks, and who has answered.

    Args:
        keys: ids of what is looked for.
        asks_for_all: ask everybody once for all keys, in place of some keys at a time. Where everybody is asked for
            everything, this saves calls.
        num_keepers: how many nodes keep a value, those nearest to its key.
    """

    def __init__(self, keys: Sequence[Any], *, asks_for_all: bool, num_keepers: int) -> None:
        self._keys, self._asks_for_all, self._num_keepers = keys, asks_for_all, num_keepers
        self._calls: dict[Any, asyncio.Future[Answer]] = {}
        """To each peer the last one."""
        self._answered: dict[Any, set[Any]] = {key: set() for key in keys}
        """Of each key, the ids of nodes that have answered."""
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._news = asyncio.Event()
        """Set when somebody has answered; each time a new one."""

    @property
    def has_answers(self) -> bool:
        """Whether anybody has answered."""
        return any(self._answered.values())

    @property
    def open_calls(self) -> list[Any]:
        """Peers that were asked and may answer yet."""
        return [peer_id for peer_id, call in self._calls.items() if not call.done()]

    def end(self) -> None:
        """Wait for nobody any longer."""
        if not self._over.done():
            self._over.set_result(None)

    async def ask(self, peer_id: Any, keys: Collection[Any], call: Ask) -> Answer:
        """What a peer knows of these keys; None if it does not answer in time."""
        if self._over.done():
            return None
        asking = self._calls.get(peer_id) if self._asks_for_all else None
        if asking is None:
            asking = asyncio.ensure_future(call(peer_id, self._keys if self._asks_for_all else keys))
            self._calls[peer_id] = asking
        await self._wait_for(asking, keys)
        if not asking.done() or not (answer := asking.result()):
            return None
        known = {key: answer[key] for key in keys if key in answer}  # of a malformed answer hivemind keeps a part
        for key in known:
            self._answered[key].add(node_id_of(peer_id))
        self._news.set()
        self._news = asyncio.Event()
        return known

    async def _wait_for(self, call: asyncio.Future[Answer], keys: Collection[Any]) -> None:
        """Until it has ended, the search is over, or it is slow and enough others have answered."""
        ends: set[asyncio.Future[Any]] = {call, self._over}
        await asyncio.wait(ends, timeout=SLOW_S, return_when=asyncio.FIRST_COMPLETED)
        while not (call.done() or self._over.done() or all(map(self._has_copies, keys))):
            news = asyncio.ensure_future(self._news.wait())
            await asyncio.wait({*ends, news}, return_when=asyncio.FIRST_COMPLETED)
            news.cancel()

    def _has_copies(self, key: Any) -> bool:
        """Whether enough of those have answered that should keep a key's values, of all that may answer."""
        keepers = self._keepers(key, self.open_calls)
        return len(self._answered[key].intersection(keepers)) >= min(COPIES, len(keepers))

    def was_read(self, key: Any, doubtful: Iterable[Any]) -> bool:
        """Whether one of those that should keep a key's values has answered; True where nobody is known.

        Args:
            key: its id.
            doubtful: peers that have not answered, and may be there.
        """
        keepers = self._keepers(key, doubtful)
        return not keepers or not self._answered[key].isdisjoint(keepers)

    def _keepers(self, key: Any, doubtful: Iterable[Any]) -> list[Any]:
        """Ids of the nodes nearest to a key, of those that have answered and these."""
        known = self._answered[key] | {node_id_of(peer_id) for peer_id in doubtful}
        return sorted(known, key=key.xor_distance)[: self._num_keepers]


_running: ContextVar[Search | None] = ContextVar("running search", default=None)
"""hivemind searches in tasks of its own, which inherit this."""


class SearchNode(StoreSearchNode):
    """A DHT node whose reading ends in time, and knows what it could not read."""

    async def read(self, keys: Sequence[str], *, timeout_s: float) -> tuple[dict[str, Any], Search]:
        """Of each key what hivemind has found by then; and how the search went.

        The wanted expiry is NaN, which no answer reaches: one node, however far in the future its answer expires,
        must not end the search and so hide what the others hold.

        Raises:
            TimeoutError: hivemind's search broke: a stranger's answer can do that.
        """
        table = self.protocol.routing_table.uid_to_peer_id
        is_small = len(table) <= self.protocol.bucket_size  # then it asks everybody for every key
        ids = [DHTID.generate(key) for key in keys]
        search = Search(ids, asks_for_all=is_small, num_keepers=self.num_replicas)
        ending = asyncio.get_running_loop().call_later(timeout_s, search.end)
        token = _running.set(search)
        try:
            async with asyncio.timeout(timeout_s + GRACE_S):
                return await self.get_many(keys, sufficient_expiration_time=float("nan")), search
        finally:
            _running.reset(token)
            ending.cancel()
            search.end()

    async def _call_find_with_blacklist(self, peer_id: Any, keys: Collection[Any]) -> Answer:
        search = _running.get()
        return await (self._ask(peer_id, keys) if search is None else search.ask(peer_id, keys, self._ask))

    async def _ask(self, peer_id: Any, keys: Collection[Any]) -> Answer:
        if peer_id in self.blacklist:
            return None
        loop = asyncio.get_running_loop()
        began = loop.time()
        answer: Answer = await super()._call_find_with_blacklist(peer_id, keys)
        if not answer and loop.time() - began < self.protocol.wait_timeout / 2:
            self.blacklist.is_gone(peer_id)
        return answer


def node_id_of(peer_id: Any) -> Any:
    """Where a peer is in the DHT, if it takes part."""
    return DHTID.generate(source=peer_id.to_bytes())
