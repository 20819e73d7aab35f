"""Looks at the swarm from outside: reads who announces what, and asks every server how it is.

    Node ──DHT──► list_models, Registry.lookup ─► records ─┐
    Transport ──InfoRequest, a few at a time──► answers ───┴─► compose ─► models

A look never waits for the slowest: servers are asked in the background, each again when it is due, and what has come
by then counts. So a dead server costs its own time-out and nobody else's. Runs on the event loop.
"""

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping

from swarm.catalog import ModelEntry, list_models
from swarm.errors import PeerError, PeerMisbehaved, SwarmError
from swarm.health.compose import Answer, compose_model
from swarm.health.state import Canary, Model, Reach
from swarm.network import Node
from swarm.network.tasks import TaskSet
from swarm.protocol import INFO_SERVICE, Info, InfoRequest
from swarm.registry import Registry, ServerRecord
from swarm.transport import EndOfStream, Transport
from swarm.types import ServerState

log = logging.getLogger(__name__)

MAX_MODELS = 32
"""Models that are looked at, those of most servers first."""
LIST_PERIOD_S = 30.0
"""How often it is read which models there are; their records are read at each look."""
MAX_ASKING = 32
"""Servers that are asked at once."""
ASKS_PER_S = 25.0
"""Servers that are asked per second on the long run; in a swarm of many, each one's turn comes less often."""
ASK_TIMEOUT_S = 4.0
_ASKED = (ServerState.ONLINE, ServerState.DRAINING)


class Census:
    """What one page knows of a swarm.

    Args:
        node: our peer.
        transport: reaches servers; it needs no listener.
        period_s: how often servers of a small swarm are asked.
    """

    def __init__(self, node: Node, transport: Transport, *, period_s: float):
        self._node, self._transport, self._period_s = node, transport, period_s
        self._registry = Registry(node)
        self._entries: dict[str, ModelEntry] = {}
        self._listed_at = float("-inf")
        self._records: dict[str, list[ServerRecord]] = {}
        self._answers: dict[str, Answer] = {}
        self._asking: set[str] = set()
        self._slots = asyncio.Semaphore(MAX_ASKING)
        self._tasks = TaskSet()
        self.read_at: float | None = None
        """When the DHT answered last."""

    async def look(
        self, canaries: Mapping[str, Canary], before: Iterable[Model], *, wait_s: float = 0.8
    ) -> tuple[Model, ...]:
        """The models as they stand now.

        Args:
            canaries: the last one of each model, by digest.
            before: the models as they stood at the last look.
            wait_s: how long this look may take for the sake of servers' answers; later ones are part of the next.

        Raises:
            PeerError: the DHT does not answer, and never has.
        """
        started = time.monotonic()
        asked = self._ask_due()  # of those who are known, while the DHT is read
        try:
            await self._read()
        except PeerError:
            if self.read_at is None:
                raise
        asked += self._ask_due()
        if asked:
            await asyncio.wait(asked, timeout=max(0.0, wait_s - (time.monotonic() - started)))
        now, known = time.time(), {model.digest: model for model in before}
        return tuple(
            compose_model(
                entry,
                self._records.get(digest, ()),
                self._answers,
                canary=canaries.get(digest),
                before=known.get(digest),
                now=now,
            )
            for digest, entry in self._entries.items()
        )

    def hidden_size(self, digest: str) -> int:
        """Width of a model's hidden states, as most of its servers say; 0 where none does."""
        sizes = [
            answer.info.hidden_size
            for record in self._records.get(digest, ())
            if (answer := self._answers.get(record.peer_id)) is not None and answer.info is not None
        ]
        return max(set(sizes), key=sizes.count) if sizes else 0

    async def close(self) -> None:
        """Ask nobody any more."""
        await self._tasks.close()

    async def _read(self) -> None:
        """Read the records of all models that are known; which there are is read now and then, in the background."""
        if not self._entries:
            await self._list()
        elif time.monotonic() - self._listed_at > LIST_PERIOD_S:
            self._listed_at = time.monotonic()
            self._tasks.spawn(self._list_quietly(), name="list of models")
        digests = list(self._entries)
        found = await asyncio.gather(*(self._registry.lookup(digest) for digest in digests))
        self._records = dict(zip(digests, found, strict=True))
        present = {record.peer_id for records in found for record in records}
        self._answers = {peer_id: answer for peer_id, answer in self._answers.items() if peer_id in present}
        self.read_at = time.time()

    async def _list(self) -> None:
        entries = await list_models(self._node, MAX_MODELS)
        self._entries, self._listed_at = {entry.digest: entry for entry in entries}, time.monotonic()

    async def _list_quietly(self) -> None:
        try:
            await self._list()
        except PeerError as error:
            log.info("the list of models can't be read: %s", error)

    def _ask_due(self) -> list[asyncio.Task[None]]:
        """Begin to ask everybody whose turn it is."""
        now = time.monotonic()
        servers = {it.peer_id for records in self._records.values() for it in records if it.state in _ASKED}
        pause_s = max(self._period_s, len(servers) / ASKS_PER_S) - self._period_s / 2
        never = Answer(asked_at=float("-inf"), reach=Reach.UNKNOWN)
        waiting = {peer_id: self._answers.get(peer_id, never).asked_at for peer_id in servers - self._asking}
        due = sorted((peer_id for peer_id, at in waiting.items() if now - at >= pause_s), key=waiting.__getitem__)
        room = max(0, int(ASKS_PER_S * self._period_s) + MAX_ASKING - len(self._asking))
        self._asking.update(due[:room])
        return [self._tasks.spawn(self._ask(peer_id), name=f"info of {peer_id}") for peer_id in due[:room]]

    async def _ask(self, peer_id: str) -> None:
        try:
            async with self._slots:
                self._answers[peer_id] = await ask(self._transport, peer_id)
        finally:
            self._asking.discard(peer_id)


async def ask(transport: Transport, peer_id: str, *, timeout_s: float = ASK_TIMEOUT_S) -> Answer:
    """Ask one server for its Info; never raises for what the server does."""
    started = time.monotonic()
    try:
        async with asyncio.timeout(timeout_s):
            async with await transport.open(peer_id, INFO_SERVICE, timeout_s=timeout_s) as stream:
                sent = time.monotonic()
                await stream.send(InfoRequest())
                info, _ = await stream.receive()
                took_s, reach = time.monotonic() - sent, Reach(stream.carrier)
        if not isinstance(info, Info):
            raise PeerMisbehaved(f"expected Info, got {type(info).__name__}")
    except TimeoutError:
        return Answer(asked_at=started, reach=Reach.NONE, trouble=f"no answer within {timeout_s:g} s")
    except (SwarmError, EndOfStream) as error:
        return Answer(asked_at=started, reach=Reach.NONE, trouble=str(error) or "it ended the stream")
    rtt_s = transport.rtt_s(peer_id)
    return Answer(asked_at=started, reach=reach, info=info, rtt_s=took_s if rtt_s is None else rtt_s)
