"""The client's loop thread and what lives on it: everything is closed, whatever hangs."""

import asyncio
import logging
from types import SimpleNamespace

import pytest

from swarm.client import runtime
from swarm.client.config import SessionConfig
from swarm.client.runtime import LoopThread, SwarmService, SwarmSession
from swarm.types import BlockRange


class Closed:
    """Notes that it was closed; may hang instead."""

    machine = SimpleNamespace(batch_size=1, max_length=8)

    def __init__(self, log: list[str], name: str, *, hangs: bool = False):
        self._log, self._name, self._hangs = log, name, hangs

    async def close(self) -> None:
        if self._hangs:
            await asyncio.Event().wait()
        self._log.append(self._name)


@pytest.mark.parametrize("hangs", ["session", "run", "transport"])
def test_what_does_not_close_in_time_keeps_nothing_else_open(hangs, monkeypatch, caplog):
    """A hanging session, run or network costs its own patience, and is logged; the loop ends."""
    monkeypatch.setattr(runtime, "CLOSE_TIMEOUT_S", 0.1)
    closed: list[str] = []
    parts = {name: Closed(closed, name, hangs=name == hangs) for name in ("session", "run", "transport", "node")}
    loop = LoopThread()
    peers = SimpleNamespace(num_blocks=3)
    service = SwarmService(loop, parts["node"], parts["transport"], peers, SessionConfig(), 8)
    session = SwarmSession(loop, parts["session"])
    service._sessions.add(session)
    service.open_training(BlockRange(0, 3)).remote = parts["run"]
    with caplog.at_level(logging.WARNING):
        service.close()
    assert closed == [name for name in parts if name != hangs]
    assert "did not close within" in caplog.text
    loop._thread.join(5)
    assert not loop.is_running
    service.close()
