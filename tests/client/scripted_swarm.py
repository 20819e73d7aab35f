"""Scripted servers on real transports, a session that counts what it hears, and rows whose outputs are known."""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from swarm.client.config import SessionConfig
from swarm.client.session import RemoteSession
from swarm.errors import PeerDisconnected
from swarm.protocol import Message
from swarm.transport import Transport
from swarm.types import BlockRange
from tests.client.fake_server import HIDDEN, NUM_BLOCKS, FakePeers, FakeServer, FakeSession, Script, run_blocks

NUM_NODES = 7
CHAIN = ("0:2", "2:4", "4:6")
PATIENT = 60.0
"""Longer than any test may take."""


class CountingSession(RemoteSession):
    """Counts what its supervisor is told."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.told: Counter[str] = Counter()
        self.heard = asyncio.Event()
        """Set at every message."""
        self._tell, self._supervisor.on_message = self._supervisor.on_message, self._count

    def _count(self, hop, message: Message, body: memoryview) -> None:
        self.told[type(message).__name__] += 1
        self.heard.set()
        self._tell(hop, message, body)


@dataclass
class Swarm:
    """Servers on the shared nodes, and a client that knows them in this order of preference."""

    servers: list[FakeServer]
    peers: FakePeers
    transport: Transport
    sessions: list[CountingSession] = field(default_factory=list)

    def session(self, batch_size: int = 1, **config) -> CountingSession:
        settings = SessionConfig(**{"max_wait_s": PATIENT, "late_s": PATIENT, "step_timeout_s": PATIENT, **config})
        session = CountingSession(
            self.peers, self.transport, batch_size=batch_size, max_length=1 << 20, config=settings
        )
        self.sessions.append(session)
        return session


class Text:
    """Rows of made-up hidden states, and what the blocks make of them."""

    def __init__(self, session: RemoteSession, rows: int = 1, seed: int = 0):
        self.session = session
        self.rows = [torch.zeros(0, HIDDEN) for _ in range(rows)]
        self._random = torch.Generator().manual_seed(seed)

    async def step(self, *num_tokens: int, keep: list[int] | None = None, order: list[int] | None = None) -> None:
        """Add tokens to the rows in one step of the session, and check its outputs."""
        before = self.rows if order is None else [self.rows[old] for old in order]
        positions = keep or [len(row) for row in before]
        new = [torch.randint(0, 100, (count, HIDDEN), generator=self._random).float() for count in num_tokens]
        rows = [torch.cat([row[:kept], more]) for row, kept, more in zip(before, positions, new, strict=True)]
        outputs = await self.session.step(torch.cat(new), positions=positions, num_tokens=num_tokens, order=order)
        self.rows = rows
        expected = [
            run_blocks(row, BlockRange(0, NUM_BLOCKS))[kept:] for row, kept in zip(rows, positions, strict=True)
        ]
        assert torch.equal(outputs, torch.cat(expected))

    async def decode(self, num_steps: int) -> None:
        for _ in range(num_steps):
            await self.step(*[1] * len(self.rows))


def at(kind: type[Message], action: Callable[[FakeSession], object], *, skip: int = 0) -> Script:
    """Do something when a message of this kind comes, once, after `skip` of them; then the message is handled."""
    left = [skip]

    async def script(session: FakeSession, message: Message) -> bool | None:
        if not isinstance(message, kind):
            return None
        left[0] -= 1
        if left[0] != -1:
            return None
        result = action(session)
        return await result if asyncio.iscoroutine(result) else None  # type: ignore[no-any-return]

    return script


def dying(session: FakeSession) -> None:
    session.server.kill()
    raise PeerDisconnected("dead")


def refusing(error: Exception) -> Callable[[FakeSession], None]:
    def action(session: FakeSession) -> None:
        raise error

    return action


async def stopped(session: FakeSession, message: Message) -> None:
    """Connected, but deaf and dumb."""
    await asyncio.Event().wait()
