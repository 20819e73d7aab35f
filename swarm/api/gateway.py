"""Puts the parts of the API together: one application from a model, a swarm and a set of keys.

Models ──────────────┐
Keys ────────────────┼─► Api ─► Starlette
Engine ◄─ Admission ─┘     └─ closes the engine and the accounts' clients when the server stops
   └─ Identities (with keys)  |  one client for everybody (without)
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from starlette.applications import Starlette

from swarm.api.admission import Admission
from swarm.api.app import Api
from swarm.api.config import ApiLimits
from swarm.api.engine import Engine
from swarm.api.identities import Identities
from swarm.api.keys import Keys
from swarm.api.models import Models
from swarm.client.cache import BlockService
from swarm.rates import Rates


def make_app(
    models: Models,
    service: BlockService,
    *,
    check_health: Callable[[], object],
    limits: ApiLimits | None = None,
    keys: Keys | None = None,
    identities: Identities | None = None,
) -> Starlette:
    """The application.

    Args:
        models: what it serves.
        service: the remote blocks for everybody, where accounts have no clients of their own.
        check_health: blocks; raises SwarmError when the swarm can't answer now.
        limits: what it takes on.
        keys: who may use it; everybody if None.
        identities: clients of the swarm, one per account.
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

    async def check() -> None:
        await asyncio.to_thread(check_health)

    admission = Admission(max_rows=limits.max_rows, max_waiting=limits.max_waiting, max_wait_s=limits.max_wait_s)
    engine = Engine(admission, identities.use if identities is not None else everybody)
    api = Api(
        models=models,
        engine=engine,
        limits=limits,
        rates=Rates(limits.request_rate),
        keys=keys,
        check_health=check,
    )
    return api.app(lifespan)
