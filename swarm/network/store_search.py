"""hivemind's DHT node, but that it looks for those who shall keep a value without being sent what they keep already.

    store ─► find_nearest_nodes(key) ─► who is nearest to the key beside it ─► rpc_find: nearest nodes, no values

A node answers a search for a key with all that it holds under it, wanted or not: in a large swarm each renewal of a
record would fetch its whole shard, from every node that keeps it. Nobody keeps anything under the id that differs from
a key's in the last bit; the nodes nearest to it are those nearest to the key. Those that did not answer the search are
not sent the value, unless nobody has answered.
"""

from collections.abc import Awaitable, Callable, Collection
from typing import Any

from swarm.network.hive import DHTID, DHTNode

Found = Callable[[Any, list[Any], set[Any]], Awaitable[None]]


class StoreSearchNode(DHTNode):  # type: ignore[misc]
    """A DHT node whose searches for nodes, other than those for values, move no values."""

    async def find_nearest_nodes(
        self, queries: Collection[Any], *args: Any, found_callback: Found | None = None, **kwargs: Any
    ) -> dict[Any, dict[Any, Any]]:
        """As hivemind's."""
        wanted = {beside(query): query for query in queries}
        peer_ids: dict[Any, Any] = kwargs.get("node_to_peer_id", {})  # grows with the search

        async def found(query: Any, nearest: list[Any], visited: set[Any]) -> None:
            assert found_callback is not None
            answering = [node_id for node_id in nearest if peer_ids.get(node_id) not in self.blacklist]
            await found_callback(wanted[query], answering or nearest, visited)

        if found_callback is not None:
            kwargs["found_callback"] = found
        nearest = await super().find_nearest_nodes(list(wanted), *args, **kwargs)
        return {wanted[query]: nodes for query, nodes in nearest.items()}


def beside(key_id: Any) -> Any:
    """The id that differs in the last bit."""
    return DHTID(int(key_id) ^ 1)
