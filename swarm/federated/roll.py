"""Who takes part in a run: a small signed record per client in the DHT, under the run's name and model.

    Roll.announce ─► DHT key "swarm/federated/v1/HASH", subkey PEER_ID ─► Roll.peers of the others

Values are signed by their peers and expire (`swarm.network.records`). A record says which settings its client has:
those of a run that has the same name and other settings are told of, once, and left out. It knows nothing of rounds.
"""

import logging
import time
from collections.abc import Collection
from hashlib import sha256
from typing import Annotated

import msgspec

from swarm.errors import PeerMisbehaved
from swarm.federated.agreement import MAX_CLIENTS
from swarm.network import Node
from swarm.protocol import Digest

log = logging.getLogger(__name__)

PERIOD_S = 15.0
"""How often a record is renewed."""
TTL_S = 3 * PERIOD_S
MAX_RECORD_BYTES = 256


class ClientRecord(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a client says of itself."""

    version: Annotated[int, msgspec.Meta(ge=1, le=1)]
    run: Digest
    """Of name, model and settings."""
    is_leaving: bool

    @classmethod
    def decode(cls, data: bytes, *, peer_id: str) -> "ClientRecord":
        """Read a record that `peer_id` has signed.

        Raises:
            PeerMisbehaved: it is malformed or too large.
        """
        if len(data) > MAX_RECORD_BYTES:
            raise PeerMisbehaved(f"record of {len(data)} bytes, limit {MAX_RECORD_BYTES}", peer_id=peer_id)
        try:
            return msgspec.msgpack.decode(data, type=cls)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise PeerMisbehaved(f"malformed record of {peer_id}: {error}", peer_id=peer_id) from error


class Roll:
    """The clients of one run.

    Args:
        node: signs our record, and finds those of others.
        name: of the run.
        model: digest of the checkpoint.
        run: digest of all that the clients must agree about.
        members: who may take part; None for anybody.
    """

    def __init__(self, node: Node, *, name: str, model: str, run: str, members: Collection[str] | None):
        self._node, self._run, self._members = node, run, members
        self._key = f"swarm/federated/v1/{sha256(msgspec.msgpack.encode((name, model))).hexdigest()}"
        self._others: set[str] = set()
        """Peers with other settings, of whom was told."""

    async def announce(self, *, is_leaving: bool = False) -> bool:
        """Say that we take part, or do no more; False where no node took it.

        Raises:
            AccessDenied: we may not announce anything in this private swarm.
        """
        record = msgspec.msgpack.encode(ClientRecord(1, self._run, is_leaving))
        return await self._node.dht_store(self._key, self._node.peer_id, record, time.time() + TTL_S)

    async def peers(self) -> list[str]:
        """The others, by what the DHT knows now: at most as many as a round may have.

        Raises:
            PeerTimeout: the search does not end in time.
        """
        found = []
        for peer_id, data in sorted((await self._node.dht_get(self._key)).items()):
            if peer_id == self._node.peer_id or (self._members is not None and peer_id not in self._members):
                continue
            try:
                record = ClientRecord.decode(data, peer_id=peer_id)
            except PeerMisbehaved as error:
                log.debug("ignored: %s", error)
                continue
            if record.run != self._run:
                self._tell_of_other(peer_id)
            elif not record.is_leaving:
                found.append(peer_id)
        return found[: MAX_CLIENTS - 1]

    def _tell_of_other(self, peer_id: str) -> None:
        if peer_id not in self._others and len(self._others) < MAX_CLIENTS:
            self._others.add(peer_id)
            log.warning("%s has a run of this name with other settings or another adapter; it is left out", peer_id)
