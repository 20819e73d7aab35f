"""A client of the swarm for every account, so that servers share themselves fairly between accounts.

    account ─derive─► Ed25519 identity ─connect─► its own peer and streams ─► servers see one client per account

Servers know clients by their peer id and nothing else, and give equal shares to those who wait (decision 0008). With
one identity for a whole gateway, its users would have one share together. Identities are derived from the gateway's own
secret, so that an account is the same client after a restart, and nobody else can take its place.

An identity costs a libp2p daemon (about 40 MB) and 0.3 seconds. It starts with the account's first request; when there
are too many, the one that was idle for longest is closed.
"""

import asyncio
import hashlib
import hmac
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from swarm.api.errors import overloaded
from swarm.client.cache import BlockService
from swarm.identity import Identity

logger = logging.getLogger(__name__)

RETRY_S = 5.0


@dataclass(slots=True, eq=False)
class _Client:
    """One account's client, or the start of it."""

    service: "asyncio.Task[BlockService]"
    num_users: int = 0

    @property
    def has_failed(self) -> bool:
        """Whether it could not start."""
        return self.service.done() and self.service.exception() is not None


class Identities:
    """The clients of one gateway. All methods run on its event loop.

    Args:
        connect: join the swarm as this identity; blocks, and runs in a thread.
        secret: what identities are derived from.
        max_clients: most clients at once.
    """

    def __init__(self, connect: Callable[[Identity], BlockService], *, secret: bytes, max_clients: int):
        self._connect, self._secret, self._max_clients = connect, secret, max_clients
        self._clients: dict[str, _Client] = {}
        """Least recently used first."""

    @asynccontextmanager
    async def use(self, account: str) -> AsyncIterator[BlockService]:
        """The blocks as this account's client, which stays open meanwhile.

        Raises:
            ApiError: too many accounts are busy.
            SwarmError: the swarm can't be joined.
        """
        client = self._client(account)
        client.num_users += 1
        try:
            yield await asyncio.shield(client.service)
        finally:
            client.num_users -= 1

    async def close(self) -> None:
        """Leave the swarm with all of them."""
        clients, self._clients = list(self._clients.values()), {}
        await asyncio.gather(*(_close(client) for client in clients))

    def _client(self, account: str) -> _Client:
        """That of the account, started now if there is none, as the one used last."""
        client = self._clients.pop(account, None)
        if client is None or client.has_failed:
            leaving = self._least_wanted() if len(self._clients) >= self._max_clients else None
            client = _Client(asyncio.create_task(self._start(account, leaving), name=f"client of {account}"))
        self._clients[account] = client
        return client

    def _least_wanted(self) -> _Client:
        idle = next((account for account, client in self._clients.items() if not client.num_users), None)
        if idle is None:
            raise overloaded(f"{len(self._clients)} accounts are busy, at most {self._max_clients}", RETRY_S)
        logger.info("closing the client of %s to make room", idle)
        return self._clients.pop(idle)

    async def _start(self, account: str, leaving: _Client | None) -> BlockService:
        if leaving is not None:
            await _close(leaving)
        return await asyncio.to_thread(self._connect, derive(self._secret, account))


def derive(secret: bytes, account: str) -> Identity:
    """The identity of an account: a key that only holders of the secret can compute."""
    seed = hmac.digest(secret, b"swarm api account\0" + account.encode(), hashlib.sha256)
    return Identity(Ed25519PrivateKey.from_private_bytes(seed))


async def _close(client: _Client) -> None:
    service = (await asyncio.gather(client.service, return_exceptions=True))[0]
    if not isinstance(service, BaseException):
        await asyncio.to_thread(service.close)
