"""The DHT's handlers without a network: requests go in as bytes, as a carrier would bring them."""

import asyncio
from typing import Any

from swarm.errors import AccessDenied
from swarm.identity import Identity
from swarm.network.dht import Dht
from swarm.network.hive import DHTID, PeerID, dht_pb2
from swarm.network.records import SignedRecords

STRANGER = PeerID.from_base58(Identity.generate().peer_id)


class _Nobody:
    """An underlay with which nobody can be reached."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self.handlers: dict[str, Any] = {}

    @property
    def caller(self) -> "_Nobody":
        return self

    def make_records(self) -> SignedRecords:
        return SignedRecords(self._identity)

    def may_be_asked(self, peer_id: str) -> bool:
        return True

    async def add_unary_handler(self, name: str, handler: Any, balanced: bool = False) -> None:
        self.handlers[name] = handler

    async def remove_unary_handler(self, name: str) -> None:
        self.handlers.pop(name, None)

    async def call_unary_handler(self, peer_id: Any, name: str, data: bytes) -> bytes:
        raise AccessDenied("nobody is there")


class DhtHandlers:
    """A DHT participant of its own, on a loop of its own.

    Args:
        identity: of the participant.
    """

    def __init__(self, identity: Identity) -> None:
        self._loop = asyncio.new_event_loop()
        self._nobody = _Nobody(identity)
        self._dht = self._loop.run_until_complete(
            Dht.create(self._nobody, identity.peer_id, client_mode=False)  # type: ignore[arg-type]
        )
        self._names = sorted(self._nobody.handlers)

    def close(self) -> None:
        """End the participant's background work and its loop."""
        self._dht.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    def call(self, number: int, data: bytes) -> bytes | None:
        """One request of a stranger; None when it was an error of that call, as `UnaryDesk` makes of any exception."""

        async def run() -> bytes | None:
            try:
                return bytes(await self._nobody.handlers[self._names[number % len(self._names)]](data, STRANGER))
            except Exception:  # noqa: BLE001 - what a request does to its handler is the answer to that request
                return None

        answer = self._loop.run_until_complete(run())
        assert answer is None or len(answer) < 4 << 20
        return answer

    def seeds(self, record: bytes) -> list[bytes]:
        """A request for each handler; `record` is one of tests.fuzz.targets."""
        size = record[0]
        subkey, value = record[9 : 9 + size], record[9 + size :]
        peer = dht_pb2.NodeInfo(node_id=DHTID.generate(source=b"x").to_bytes())
        requests = {
            "rpc_find": dht_pb2.FindRequest(keys=[bytes(20), bytes(19) + b"\1"], peer=peer),
            "rpc_ping": dht_pb2.PingRequest(peer=peer, validate=True),
            "rpc_store": dht_pb2.StoreRequest(
                keys=[bytes(20)], subkeys=[subkey], values=[value], expiration_time=[2e9], in_cache=[False], peer=peer
            ),
        }
        numbers = {name.rpartition(".")[2]: number for number, name in enumerate(self._names)}
        return [bytes([numbers[name]]) + request.SerializeToString() for name, request in requests.items()]
