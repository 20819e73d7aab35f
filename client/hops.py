"""The streams of one session's hops: opened, told where to send, fed and asked as the session machine wants it.

    Open, Connect, Send ─► Hops ─► HopStream per link in use ~~► servers

It carries out, and decides nothing: who is lost, and what follows from that, is `swarm.client.session`'s business.
"""

import asyncio
import os
from collections.abc import Coroutine, Iterator
from contextlib import suppress
from typing import Any

from swarm.client.adapter_needs import AdapterNeeds
from swarm.client.config import SessionConfig
from swarm.client.hop_stream import HopStream, Listener
from swarm.codec import encode_tensor
from swarm.network.tasks import TaskSet
from swarm.protocol import Forward, OpenSession, SessionOpened
from swarm.session import Session
from swarm.session_actions import Connect, Send
from swarm.transport import Transport
from swarm.types import Hop

CLOSE_TIMEOUT_S = 2.0
NO_KEY = bytes(16)


class Hops:
    """The hops of one session.

    Args:
        machine: says which links are in use.
        transport: how to reach servers.
        model: digest of the checkpoint.
        config: deadlines and encoding.
        listener: is told what comes from the hops.
        adapters: that the rows use, where any does.
    """

    def __init__(
        self,
        machine: Session,
        transport: Transport,
        *,
        model: str,
        config: SessionConfig,
        listener: Listener,
        adapters: AdapterNeeds | None = None,
    ):
        self._machine, self._transport, self._model, self._config = machine, transport, model, config
        self._listener, self._adapters = listener, adapters
        self._session_id = os.urandom(16)
        self._streams: dict[int, HopStream] = {}
        self._tasks = TaskSet()
        self._num_probes = 0

    def __iter__(self) -> Iterator[HopStream]:
        """The hops in use, in no order; they may be lost meanwhile."""
        return iter(list(self._streams.values()))

    def __getitem__(self, link: int) -> HopStream:
        return self._streams[link]

    def get(self, link: int) -> HopStream | None:
        """The hop of a link; None when it is not in use any more."""
        return self._streams.get(link)

    # -- actions of the machine ---------------------------------------------------------------------------------

    def open_all(self) -> None:
        """Begin to open all sessions that are not open."""
        for action in self._machine.pending_opens:
            if action.link in self._streams:
                continue
            stream = HopStream(action.link, action.hop, listener=self._listener, tasks=self._tasks)
            self._streams[action.link] = stream
            request = self._request(stream, is_last=action.is_last)
            stream.open(self._transport, request, timeout_s=self._config.open_timeout_s)

    def _request(self, stream: HopStream, *, is_last: bool) -> OpenSession:
        hop, adapters = stream.hop, self._adapters
        return OpenSession(
            session_id=self._session_id,
            push_key=stream.push_key,
            model=self._model,
            start=hop.blocks.start,
            end=hop.blocks.end,
            batch_size=self._machine.batch_size,
            max_length=self._machine.max_length,
            is_last=is_last,
            adapters=adapters.digests if adapters is not None else (),
            adapter_of=adapters.of_row if adapters is not None else (),
            holders=adapters.holders(hop) if adapters is not None else (),
        )

    def step_tokens(self, opened: SessionOpened) -> int:
        """Most tokens that a server gets in one message."""
        return min(opened.max_step_tokens, self._config.chunk_tokens)

    def connect(self, action: Connect) -> None:
        """Tell a server where its outputs go."""
        stream = self._streams[action.link]
        target = self._streams[action.target] if action.target is not None else None
        stream.forward = (action.epoch, action.target)
        stream.post(
            Forward(
                epoch=action.epoch,
                peer_id=target.hop.peer_id if target is not None else "",
                push_key=target.push_key if target is not None else NO_KEY,
                held=action.held,
                as_of=action.as_of,
                max_step_tokens=action.max_step_tokens,
            )
        )

    def send(self, action: Send) -> bool:
        """Send a chunk of a step; False when it must wait for room."""
        chunk = action.chunk
        spec, payload = encode_tensor(chunk.hidden_states, self._config.encoding)
        stream = self._streams[action.link]
        stream.post(chunk.as_step(spec), payload)
        return not stream.is_sending

    # -- moves --------------------------------------------------------------------------------------------------

    def spawn(self, coroutine: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """A task that ends with the session."""
        return self._tasks.spawn(coroutine, name=name)

    def open_heir(self, hop: HopStream, target: Hop, link: int, *, listener: Listener) -> HopStream:
        """Begin to open an empty session at a server that is to take over from a hop's; it is no hop yet."""
        stream = HopStream(link, target, listener=listener, tasks=self._tasks)
        is_last = hop.hop.blocks.end == self._machine.blocks.end
        stream.open(self._transport, self._request(stream, is_last=is_last), timeout_s=self._config.open_timeout_s)
        return stream

    def adopt(self, heir: HopStream) -> None:
        """The machine uses this stream in place of another one, which is closed."""
        self._streams[heir.link] = heir
        heir.report_to(self._listener)
        self.close_stale()

    # -- asking -------------------------------------------------------------------------------------------------

    def probe(self, now: float, only: HopStream | None = None) -> None:
        """Ask one server, or all, how far they are."""
        self._num_probes += 1
        for stream in [only] if only is not None else self:
            stream.probe(now, self._num_probes)

    def silent(self, now: float) -> list[HopStream]:
        """The hops that were asked and have not answered in time.

        Where the question is still behind something that is being sent, the time begins anew: there the transport's
        heartbeat tells whether the server lives.
        """
        found = []
        for stream in self:
            if stream.probe_sent_at is None or now < stream.probe_sent_at + self._config.probe_timeout_s:
                continue
            if stream.is_sending:
                stream.probe_sent_at = now
            else:
                found.append(stream)
        return found

    @property
    def next_deadline(self) -> float:
        """When the first of those that were asked must have answered."""
        asked = [stream.probe_sent_at for stream in self._streams.values() if stream.probe_sent_at is not None]
        return min(asked) + self._config.probe_timeout_s if asked else float("inf")

    # -- ends ---------------------------------------------------------------------------------------------------

    def drop(self, stream: HopStream) -> bool:
        """Close one hop's stream; False when it is none of ours any more."""
        stream.close()
        return self._streams.pop(stream.link, None) is not None

    def close_stale(self) -> None:
        """Close the streams of links that the machine no longer uses."""
        used = self._machine.hops
        for stream in self:
            if stream.link not in used:
                self.drop(stream)

    def drop_unsettled(self) -> list[int]:
        """Close streams that are not open yet, or are still sending; the links of the latter."""
        unsettled = [stream for stream in self if not stream.is_open or stream.is_sending]
        for stream in unsettled:
            self.drop(stream)
        return [stream.link for stream in unsettled if stream.is_open]

    async def close(self) -> None:
        """End all streams, without waiting for any server."""
        for stream in self:
            self.drop(stream)
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._tasks.close()
