"""Rounds between real peers, in an open swarm and in a private one; and what is asked of those who don't behave."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import pytest
import torch

from swarm.adapters.delta import BlockDelta, LinearDelta
from swarm.adapters.layout import BlockShape, LinearShape, ModelLayout
from swarm.errors import AccessDenied, InvalidRequest, PeerError, PeerMisbehaved, PeerTimeout, RoundFailed
from swarm.federated.aggregate import Update
from swarm.federated.agreement import Head, Round
from swarm.federated.delivery import MAX_SENDS_PER_ACCOUNT
from swarm.federated.exchange import Behind, Exchange, Outcome
from swarm.federated.roll import Roll
from swarm.federated.updates import Rules, pack_update
from swarm.network.node import Node, NodeConfig
from swarm.private.certificates import Role
from swarm.protocol import FEDERATED_SERVICE, AdapterRequest, FederatedBallot, InfoRequest
from swarm.transport import Transport
from tests.swarm.private.labs import lab_now

SHAPE = BlockShape(hidden_size=8, linears={"q": LinearShape(num_inputs=8, num_outputs=6)}, kv_shape=None)
LAYOUT = ModelLayout(blocks_path="model.layers", blocks=(SHAPE, SHAPE))
RULES = Rules(layout=LAYOUT, linears={0: ["q"], 1: ["q"]}, max_rank=2, is_rank_fixed=True)
RUN, MODEL = "a" * 64, "b" * 64


def update(seed: int, rank: int = 2) -> Update:
    generator = torch.Generator().manual_seed(seed)

    def linear() -> LinearDelta:
        return LinearDelta(
            a_rI=torch.randn(rank, 8, generator=generator), b_Or=torch.randn(6, rank, generator=generator)
        )

    return {block: BlockDelta(linears={"q": linear()}) for block in range(2)}


BASE = pack_update(update(99), LAYOUT)
Join = Callable[..., Awaitable[Exchange]]


@pytest.fixture(params=["open", "private"])
async def join(request: pytest.FixtureRequest) -> AsyncIterator[Join]:
    """Clients of one run, each a peer of its own; the first begins the swarm."""
    lab, opened = lab_now() if request.param == "private" else None, []

    async def join(*, role: Role = Role.SERVER, members: frozenset[str] | None = None) -> Exchange:
        credentials = lab.invite(f"client{len(opened)}", role) if lab else None
        peers = opened[0][0].addresses[:1] if opened else ()
        is_client = role is Role.CLIENT
        config = NodeConfig(
            host="127.0.0.1", initial_peers=tuple(peers), credentials=credentials, client_mode=is_client
        )
        node = await Node.start(config)
        transport = Transport(node, listen=None if is_client else ("127.0.0.1", 0))
        await transport.start()
        roll = Roll(node, name="run", model=MODEL, run=RUN, members=members)
        exchange = Exchange(
            transport, node.identity, roll, run=RUN, head=Head(0, BASE.digest), base=BASE, members=members
        )
        opened.append((node, transport, exchange))
        await exchange.start()
        await exchange.announce()
        return exchange

    yield join
    for node, transport, exchange in opened:
        await exchange.close()
        await transport.close()
        await node.close()


async def contribute(exchange: Exchange, seed: int, *, min_clients: int = 2, timeout_s: float = 60.0) -> Outcome:
    own = update(seed)
    return await exchange.round(
        pack_update(own, LAYOUT), own, 10 + seed, RULES, min_clients=min_clients, timeout_s=timeout_s
    )


def numbers(outcome: Outcome) -> set[int]:
    return {it.num_examples for it in outcome.taken}


async def test_peers_come_to_the_same_updates(join: Join):
    """In the order of their ids, with the numbers of each; and what was fetched is on offer to others."""
    clients = [await join() for _ in range(3)]
    outcomes = await asyncio.gather(*(contribute(client, seed) for seed, client in enumerate(clients)))
    assert [len(outcome.taken) for outcome in outcomes] == [3, 3, 3]
    told = [[(it.peer_id, it.num_examples) for it in outcome.taken] for outcome in outcomes]
    assert told[0] == told[1] == told[2] == sorted(told[0])
    for first, other in zip(outcomes[0].taken, outcomes[1].taken, strict=True):
        assert torch.equal(first.update[1].linears["q"].b_Or, other.update[1].linears["q"].b_Or)
    assert all(client.bytes.received > 0 for client in clients)


@pytest.mark.parametrize("join", ["open"], indirect=True)
async def test_who_tries_again_gives_what_others_know_already(join: Join):
    """A second update of a round would disqualify it; and of others' updates, nothing is left from the failed try."""
    one, other, third = [await join() for _ in range(3)]
    waiting = asyncio.create_task(contribute(other, 1, min_clients=3))
    while not one.bytes.received or one._identity.peer_id not in other._round.contributors:
        with pytest.raises(RoundFailed, match="need 3"):
            await contribute(one, 0, min_clients=3, timeout_s=1.0)
    assert set(one._delivery._shelf) == {BASE.digest, pack_update(update(0), LAYOUT).digest}
    again, last = contribute(one, 5, min_clients=3), contribute(third, 2, min_clients=3)
    outcomes = await asyncio.gather(again, last, waiting)
    assert [numbers(outcome) for outcome in outcomes] == [{10, 11, 12}] * 3


@pytest.mark.parametrize("join", ["open"], indirect=True)
async def test_who_tries_again_alone_may_give_something_new(join: Join):
    """Nobody has heard of the first try."""
    one = await join()
    with pytest.raises(RoundFailed, match="1 clients"):
        await contribute(one, 0, timeout_s=0.2)
    assert set(one._delivery._shelf) == {BASE.digest}
    other = await join()
    outcomes = await asyncio.gather(contribute(one, 5), contribute(other, 1))
    assert [numbers(outcome) for outcome in outcomes] == [{15, 11}] * 2


@pytest.mark.parametrize("join", ["open"], indirect=True)
async def test_those_who_speak_first_do_not_end_a_round(join: Join):
    """Strangers that say that the run is elsewhere: all are asked, and the round goes on."""
    clients = [await join() for _ in range(2)]
    one = clients[0]
    look = one._look_for_others

    async def look_and_hear(this: Round) -> None:
        await look(this)
        one._heads.update(dict.fromkeys(("first", "second"), Head(9, "f" * 64)))

    one._look_for_others = look_and_hear
    outcomes = await asyncio.gather(*(contribute(client, seed) for seed, client in enumerate(clients)))
    assert [numbers(outcome) for outcome in outcomes] == [{10, 11}] * 2


@pytest.mark.parametrize("join", ["open"], indirect=True)
async def test_most_clients_have_to_be_elsewhere_in_a_round(join: Join):
    """Then it is over, and says where they are."""
    one, *others = [await join() for _ in range(3)]
    head = Head(4, "f" * 64)
    others[0].head = head
    assert await one.find_head() == one.head
    others[1].head = head
    with pytest.raises(Behind) as caught:
        await contribute(one, 0)
    assert caught.value.head == head


@pytest.mark.parametrize("join", ["open"], indirect=True)
async def test_clients_that_know_each_other_need_no_dht(join: Join):
    """They ask each other where they are, and come to a round."""
    clients = [await join() for _ in range(2)]

    async def fail() -> list[str]:
        raise PeerTimeout("the search has not ended")

    for client in clients:
        await client.find_head()
        client._roll.peers = fail
    assert [await client.find_head() for client in clients] == [clients[0].head] * 2
    outcomes = await asyncio.gather(*(contribute(client, seed) for seed, client in enumerate(clients)))
    assert [len(outcome.taken) for outcome in outcomes] == [2, 2]
    stranger = await join()
    stranger._roll.peers, stranger._is_in_run = fail, False
    with pytest.raises(PeerTimeout):
        await stranger.find_head()


async def test_bytes_of_another_adapter_are_their_senders_fault(join: Join):
    """The client that owns the update isn't blamed, and the update isn't taken."""
    one, liar = await join(), await join()
    peer_id = liar._identity.peer_id
    wanted, other = pack_update(update(1), LAYOUT), pack_update(update(2), LAYOUT)
    liar._delivery.offer(replace(wanted, shards=other.shards))
    with pytest.raises(PeerMisbehaved, match="has hash"):
        await one._delivery.fetch(peer_id, wanted.digest, RULES)
    liar._delivery.offer(wanted)
    adapter, found = await one._delivery.fetch(peer_id, wanted.digest, RULES)
    assert adapter.digest == wanted.digest and torch.equal(found[0].linears["q"].b_Or, update(1)[0].linears["q"].b_Or)


async def test_what_is_too_large_is_not_fetched(join: Join):
    """The manifest says so, and no shard comes."""
    one, other = await join(), await join()
    large = pack_update(update(1, rank=8), LAYOUT)
    other._delivery.offer(large)
    with pytest.raises(InvalidRequest, match="rank 8, limit 2"):
        await one._delivery.fetch(other._identity.peer_id, large.digest, RULES)
    assert one.bytes.received == len(large.manifest.encode())


async def test_what_is_not_offered_can_not_be_had(join: Join):
    """Nor what was offered two rounds ago; and that is the peer's fault, whatever it says."""
    one, other = await join(), await join()
    gone = pack_update(update(1), LAYOUT)
    other._delivery.offer(gone)
    for _ in range(2):
        other._delivery.turn()
    for digest in ("c" * 64, gone.digest):
        with pytest.raises(PeerError, match="belongs to no round"):
            await one._delivery.fetch(other._identity.peer_id, digest, RULES)


async def test_few_adapters_are_sent_to_one_at_once(join: Join):
    """Streams that nobody reads keep others waiting no longer than that."""
    one, other = await join(), await join()
    account = other._transport.node.account_of(one._identity.peer_id)
    other._delivery._sends[account] = MAX_SENDS_PER_ACCOUNT
    with pytest.raises(PeerError, match=f"{MAX_SENDS_PER_ACCOUNT} of"):
        await one._delivery.fetch(other._identity.peer_id, BASE.digest, RULES)


async def test_other_runs_and_other_messages_are_refused(join: Join):
    """With a typed error, and nothing changes."""
    one, other = await join(), await join()
    ballot = FederatedBallot(
        run="f" * 64, round=0, base="a" * 64, contributions=(), is_final=False, head_round=0, head_base="a" * 64
    )
    for message, why in ((ballot, "a ballot of run"), (InfoRequest(), "expected FederatedBallot")):
        with pytest.raises(InvalidRequest, match=why):
            await one._transport.call(other._identity.peer_id, FEDERATED_SERVICE, message, timeout_s=10.0)


async def test_only_members_are_answered(join: Join):
    """Where a run has a list of them, nobody else gets a ballot or an adapter."""
    stranger = await join()
    closed = await join(members=frozenset({"12D3KooWnobody"}))
    request = AdapterRequest(digest=BASE.digest, with_manifest=True, blocks=())
    with pytest.raises(InvalidRequest, match="no member of the run"):
        await stranger._transport.call(closed._identity.peer_id, FEDERATED_SERVICE, request, timeout_s=10.0)


@pytest.mark.parametrize("join", ["private"], indirect=True)
async def test_a_clients_invitation_is_not_enough_in_a_private_swarm(join: Join):
    """It may announce nothing, so others could not find it."""
    await join()
    with pytest.raises(AccessDenied):
        await join(role=Role.CLIENT)
