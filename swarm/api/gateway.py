"""Puts the parts of the API together: one application from a model, a swarm and a set of keys.

Models ──────────────┐
Keys ────────────────┼─► Api ─► Starlette
Engine ◄─ Admission ─┘     └─ closes the engine and the accounts' clients when the server stops
   └─ Identities (with keys)  |  one client for everybody (without)
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager

from starlette.applications import Starlette

from swarm.api.admission import Admission
from swarm.api.app import Api
from swarm.api.config import ApiLimits
from swarm.api.engine import Engine
from swarm.api.hosts import KnownHosts
from swarm.api.identities import Identities
from swarm.api.keys import Keys
from swarm.api.models import Models
from swarm.client.cache import BlockService
from swarm.errors import SwarmError
from swarm.rates import Rates

HEALTH_VALID_S = 1.0
"""How long a look at the swarm's health is good for."""


def make_app(
    models: Models,
    service: BlockService,
    *,
    check_health: Callable[[], object],
    limits: ApiLimits | None = None,
    keys: Keys | None = None,
    identities: Identities | None = None,
    hosts: Collection[str] = (),
) -> Starlette:
    """The application.

    Args:
        models: what it serves.
        service: the remote blocks for everybody, where accounts have no clients of their own.
        check_health: blocks; raises SwarmError when the swarm can't answer now.
        limits: what it takes on.
        keys: who may use it; everybody if None.
        identities: clients of the swarm, one per account.
        hosts: names by which it may be called where no keys are asked for, besides localhost and addresses.
    """
    limits = limits or ApiLimits()

    @asynccontextmanager
    async def everybody(account: str) -> AsyncIterator[BlockService]:
        yield service

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            engine.close()
            if identities is not None:
                await identities.close()

    admission = Admission(max_rows=limits.max_rows, max_waiting=limits.max_waiting, max_wait_s=limits.max_wait_s)
    engine = Engine(admission, identities.use if identities is not None else everybody)
    api = Api(
        models=models,
        engine=engine,
        limits=limits,
        rates=Rates(limits.request_rate),
        keys=keys,
        check_health=Health(check_health).check,
    )
    app = api.app(lifespan)
    if keys is None:
        app.add_middleware(KnownHosts, names=hosts)
    return app


class Health:
    """Whether the swarm can answer, looked at once a second however many ask.

    Args:
        look: blocks; raises SwarmError when it can't.
    """

    def __init__(self, look: Callable[[], object]) -> None:
        self._look = look
        self._lock = asyncio.Lock()
        self._looked_at = float("-inf")
        self._error: SwarmError | None = None

    async def check(self) -> None:
        """Nothing, if it can.

        Raises:
            SwarmError: why not.
        """
        async with self._lock:
            if time.monotonic() - self._looked_at >= HEALTH_VALID_S:
                self._error = await self._ask()
                self._looked_at = time.monotonic()
        if self._error is not None:
            raise self._error.with_traceback(None)

    async def _ask(self) -> SwarmError | None:
        try:
            await asyncio.to_thread(self._look)
        except SwarmError as error:
            return error
        return None
