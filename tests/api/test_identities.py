"""Every account is one client of the swarm, and no more of them run than allowed."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from swarm.api.errors import ApiError
from swarm.api.identities import Identities, derive
from swarm.errors import PeerUnreachable
from swarm.identity import Identity

SECRET = b"secret"


class FakeService:
    """Remote blocks that are only opened and closed."""

    num_blocks, hidden_size = 1, 1

    def __init__(self, identity: Identity):
        self.identity, self.is_closed = identity, False

    def open_session(self, *, batch_size: int, max_length: int) -> None:
        raise AssertionError("nobody generates here")

    def close(self) -> None:
        self.is_closed = True


class Swarm:
    """Notes who joins it."""

    def __init__(self) -> None:
        self.services: list[FakeService] = []
        self.failures = 0

    def connect(self, identity: Identity) -> FakeService:
        if self.failures:
            self.failures -= 1
            raise PeerUnreachable("nobody answers")
        self.services.append(FakeService(identity))
        return self.services[-1]


@pytest.fixture
def swarm() -> Swarm:
    return Swarm()


def make(swarm: Swarm, max_clients: int = 2) -> Identities:
    return Identities(swarm.connect, secret=SECRET, max_clients=max_clients)


def test_identities_follow_from_secret_and_account() -> None:
    """The same after a restart, and different for every account and gateway."""
    assert derive(SECRET, "ann").peer_id == derive(SECRET, "ann").peer_id
    assert len({derive(secret, name).peer_id for secret in (SECRET, b"x") for name in ("ann", "bob")}) == 4


async def test_requests_of_one_account_share_one_client(swarm: Swarm) -> None:
    """Also when they come at the same moment, before it has started."""
    identities = make(swarm)
    async with AsyncExitStack() as stack:
        found = await asyncio.gather(
            *(stack.enter_async_context(identities.use(name)) for name in ("ann", "ann", "bob"))
        )
    assert found[0] is found[1] is not found[2]
    assert {it.identity.peer_id for it in swarm.services} == {derive(SECRET, name).peer_id for name in ("ann", "bob")}
    assert not any(it.is_closed for it in swarm.services)
    await identities.close()
    assert all(it.is_closed for it in swarm.services)


async def test_the_longest_idle_client_makes_room(swarm: Swarm) -> None:
    """Its account starts another one when it comes back."""
    identities = make(swarm)
    for name in ("ann", "bob", "ann", "eve", "bob"):
        async with identities.use(name):
            pass
    peers = [derive(SECRET, name).peer_id for name in ("ann", "bob", "eve", "bob")]
    assert [it.identity.peer_id for it in swarm.services] == peers
    assert [it.is_closed for it in swarm.services] == [True, True, False, False]


async def test_busy_clients_are_not_closed(swarm: Swarm) -> None:
    """Rather is somebody told to come back."""
    identities = make(swarm, max_clients=1)
    async with identities.use("ann"):
        with pytest.raises(ApiError) as caught:
            async with identities.use("bob"):
                pass
    assert caught.value.status == 429
    async with identities.use("bob"):
        pass


async def test_a_failed_start_is_tried_again(swarm: Swarm) -> None:
    """By the next request."""
    identities = make(swarm)
    swarm.failures = 1
    with pytest.raises(PeerUnreachable):
        async with identities.use("ann"):
            pass
    async with identities.use("ann"):
        pass
    assert len(swarm.services) == 1


async def test_one_who_gives_up_does_not_stop_the_start(swarm: Swarm) -> None:
    """Others of the account may wait for it."""
    identities = make(swarm)

    async def use() -> None:
        async with identities.use("ann"):
            await asyncio.Event().wait()

    task = asyncio.create_task(use())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    async with identities.use("ann"):
        pass
    assert len(swarm.services) == 1
