"""Sends adapters to servers that ask for them, each on a stream of its own beside the session's.

    hop ──AdapterRequest──► Uploads.send ─► stream to the server's `adapter` service: AdapterOffer, AdapterPart ... ~~►
                                              ◄~~ end of the stream: all is checked; or what is wrong with it

A broken stream is nobody's failure: the server asks again for what it lacks. What it says of the adapter itself is.
"""

import asyncio
import logging
from contextlib import suppress
from typing import Protocol

from swarm.adapters.transfer import send_parts
from swarm.client.hop_stream import HopStream
from swarm.client.row_adapters import RowAdapters
from swarm.errors import AdapterError, PeerMisbehaved, SwarmError
from swarm.network.tasks import TaskSet
from swarm.protocol import ADAPTER_SERVICE, AdapterOffer, AdapterRequest
from swarm.transport import EndOfStream, Transport

logger = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 2.0


class FailureListener(Protocol):
    """Who is told that a server is lost for the session: see `swarm.client.hop_stream.Listener`."""

    def on_failure(self, hop: HopStream, error: SwarmError) -> None:
        """The server says that an adapter can't be used, or asks for what it must not."""


class Uploads:
    """The adapters of one session.

    Args:
        transport: how to reach servers.
        adapters: what servers may ask for.
        listener: is told when a server refuses an adapter.
    """

    def __init__(self, transport: Transport, adapters: RowAdapters, *, listener: FailureListener):
        self.num_bytes = 0
        """Sent so far."""
        self._transport, self._listener = transport, listener
        self._adapters = {adapter.digest: adapter for adapter in adapters.remote}
        self._running: dict[tuple[int, str], asyncio.Task[None]] = {}
        self._tasks = TaskSet()

    def send(self, hop: HopStream, request: AdapterRequest) -> None:
        """A server asks for an adapter; a newer request takes the place of the one before.

        Raises:
            PeerMisbehaved: for one that the session doesn't use.
            AdapterError: for one of which only the name is known here.
        """
        adapter = self._adapters.get(request.digest)
        if adapter is None:
            raise PeerMisbehaved(f"asks for adapter {request.digest[:12]}, not used", peer_id=hop.hop.peer_id)
        if not adapter.shards:
            raise AdapterError(f"no server has adapter {request.digest}, and only its name is known here")
        key = (hop.link, request.digest)
        if (before := self._running.get(key)) is not None:
            before.cancel()
        self._running[key] = self._tasks.spawn(self._send(hop, request), name=f"adapter to {hop.hop.peer_id}")

    async def close(self) -> None:
        """Stop sending."""
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._tasks.close()

    async def _send(self, hop: HopStream, request: AdapterRequest) -> None:
        adapter, peer_id = self._adapters[request.digest], hop.hop.peer_id
        try:
            async with await self._transport.open(peer_id, ADAPTER_SERVICE, timeout_s=OPEN_TIMEOUT_S) as stream:
                await stream.send(AdapterOffer(digest=request.digest))
                await send_parts(stream, request, adapter.manifest.encode(), adapter.shards, on_sent=self._sent)
                await stream.receive()
                raise PeerMisbehaved("a message on an upload's stream", peer_id=peer_id)
        except EndOfStream:
            return
        except AdapterError as error:
            self._listener.on_failure(hop, error)
        except SwarmError as error:
            logger.info("the upload of an adapter to %s ended early: %s", peer_id, error)

    def _sent(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
