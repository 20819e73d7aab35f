"""Servers that are told to stop: their sessions and training runs go on elsewhere, without a token or a bit less."""

import asyncio
import signal
from collections.abc import Callable
from contextlib import ExitStack, suppress
from math import inf

import pytest
import torch

from swarm.checkpoint.source import resolve
from swarm.client.model import distribute
from swarm.client.processes import start_server
from swarm.client.runtime import SwarmService, SwarmSession, connect
from swarm.protocol import SESSION_SERVICE, OpenSession
from swarm.server.config import CacheSize
from swarm.server.mover import GAP_DRAIN_S
from swarm.server.server import Server
from swarm.types import BlockRange

from .conftest import HIDDEN, LocalSwarm, closing
from .test_adapter_failover import fleet, wait_until_nothing_is_held  # noqa: F401
from .test_adapters import MASK, PROMPTS, adapters  # noqa: F401
from .test_chain import At, distributed
from .training_job import make_batch, remote_gradients, training_of

pytestmark = [  # PEFT's own
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),
]

DRAIN_S = 20.0
EXIT_S = 15.0
NEW_TOKENS = 12
GREEDY = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
BEAMS = {"num_beams": 3, **GREEDY}


def drain(swarm: LocalSwarm, peer_id: str) -> None:
    """What a server does on SIGTERM; all its sessions and pages are gone when this returns."""
    server = next(server for server in swarm.servers if server.node.peer_id == peer_id)
    swarm.loop.run(server.tenancy.drain(DRAIN_S), DRAIN_S + 10)
    assert server.serving is not None and not server.tenancy.num_sessions
    assert swarm.loop.run(server.serving.executor.pages_in_use()) == 0
    swarm.remove_server(server)


def before_steps(monkeypatch: pytest.MonkeyPatch, actions: dict[int, Callable[[SwarmSession], None]]) -> None:
    """Call each action before the step of its number."""
    step, count = SwarmSession.step, 0

    def counted(session, *args, **options):
        nonlocal count
        count += 1
        if (action := actions.get(count)) is not None:
            action(session)
        return step(session, *args, **options)

    monkeypatch.setattr(SwarmSession, "step", counted)


@pytest.mark.parametrize(
    ("settings", "push"), [(GREEDY, True), (BEAMS, True), (GREEDY, False)], ids=["greedy", "beams", "star"]
)
def test_every_hop_drains_in_the_middle_of_an_answer(make_swarm, local_model, monkeypatch, settings, push):
    """One server after the other leaves; nobody replays, and the tokens are transformers' own."""
    swarm = make_swarm("0:2", "2:4", "4:6", "0:2", "2:4", "4:6")
    expected = local_model.generate(PROMPTS, attention_mask=MASK, **settings)
    rows = len(PROMPTS) * settings.get("num_beams", 1)
    leave = [lambda it, hop=hop: drain(swarm, it.route[hop].peer_id) for hop in range(3)]
    with distributed(swarm, push=push) as model, model.inference_session(batch_size=rows, max_length=32) as session:
        before_steps(monkeypatch, {3: leave[0], 5: leave[1], 7: leave[2]})
        tokens = model.generate(PROMPTS, attention_mask=MASK, session=session, **settings)
        assert session.session.num_replays == 0 and session.session.num_moves == 3
    assert torch.equal(tokens, expected)
    assert swarm.pages_in_use() == 0


def test_terminated_processes_hand_over_what_they_have(fleet, adapters):  # noqa: F811
    """SIGTERM to every server of the route while tokens come: each exits by itself, and nothing is computed again.

    One row has no adapter, one an adapter with matrices, one virtual positions of its own.
    """
    names = ["lora", None, "prefix"]
    fleet.fill()
    with fleet.client({name: adapters[name] for name in names if name is not None}) as model:
        options = {"adapter_name": names}
        with model.inference_session(batch_size=len(PROMPTS), max_length=64, **options) as session:

            def terminate(hop: int) -> None:
                _, server = fleet.servers.pop(session.route[hop].peer_id)
                server.signal(signal.SIGTERM)
                server.wait_for("^stopped$", EXIT_S)
                assert any(line.startswith("DRAINING: 1 sessions") for line in server.lines)

            stops = At({2: lambda: terminate(1), 4: lambda: terminate(0), 6: lambda: terminate(2)})
            found = model.generate(PROMPTS, attention_mask=MASK, session=session, streamer=stops, **GREEDY)
            assert session.session.num_replays == 0 and session.session.num_moves == 3
            assert {hop.peer_id for hop in session.route} == fleet.servers.keys()
        wait_until_nothing_is_held(model.block_service, fleet)
        expected = model.generate(PROMPTS, attention_mask=MASK, **options, **GREEDY)
        assert torch.equal(found, expected)


def test_a_replica_without_room_leaves_a_replay(make_swarm, local_model):
    """What can't move stays as long as the server waits, and is replayed when it has gone; no token changes."""
    swarm = make_swarm("0:3", "3:6", "3:6")
    with distributed(swarm, max_wait_s=30.0) as model, model.inference_session(max_length=64) as session:

        def leave() -> None:
            victim = next(it for it in swarm.servers if it.node.peer_id == session.route[1].peer_id)
            other = next(it for it in swarm.servers[1:] if it is not victim)
            pages = swarm.loop.run(_take_all_pages(other))
            swarm.loop.run(victim.tenancy.drain(1.0), 30)
            assert victim.tenancy.num_sessions == 1
            swarm.loop.run(_free(other, pages))
            swarm.remove_server(victim)

        tokens = model.generate(
            PROMPTS[:1], attention_mask=MASK[:1], session=session, streamer=At({3: leave}), **GREEDY
        )
        assert session.session.num_replays == 1
    assert torch.equal(tokens, local_model.generate(PROMPTS[:1], attention_mask=MASK[:1], **GREEDY))


async def _take_all_pages(server) -> list[int]:
    allocator = server.serving.executor._allocator
    return await server.serving.executor._ask(lambda: allocator.allocate(allocator.num_free))


async def _free(server, pages: list[int]) -> None:
    await server.serving.executor._ask(lambda: server.serving.executor._allocator.free(pages))


def test_a_server_that_is_short_of_cache_has_a_session_moved_to_one_with_room(tiny_llama, local_model):
    """Two sessions that push each other out of a small cache: one of them goes, once, and both go on."""
    swarm = LocalSwarm(tiny_llama)
    tight = swarm.add_server("0:6", cache_size=CacheSize(tokens=64))
    rows = [torch.randint(1, 120, (1, 40), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    with closing(swarm), closing(swarm.connect()) as service, ExitStack() as stack:
        sessions = [stack.enter_context(service.open_session(batch_size=1, max_length=64)) for _ in rows]

        def step(which: int, start: int) -> None:
            inputs = local_model.model.embed_tokens(rows[which][0, start:]).detach()
            outputs = sessions[which].step(inputs, positions=[start], num_tokens=[len(inputs)], num_outputs=[1])
            logits = local_model.lm_head(local_model.model.norm(outputs))
            torch.testing.assert_close(logits, local_model(rows[which]).logits[0, -1:], atol=1e-4, rtol=0)

        for which in range(2):
            step(which, 0)
        assert tight.serving.executor.meter.num_swapped_out
        roomy = swarm.add_server("0:6")
        for _ in range(2):  # the second time there is no more need
            swarm.loop.run(_renew_until(tight, lambda: tight.tenancy.num_sessions == roomy.tenancy.num_sessions == 1))
        for which in range(2):
            rows[which] = torch.cat([rows[which], torch.tensor([[5 + which]])], dim=1)
            step(which, 40)
        assert sum(it.num_moves for it in sessions) == 1 and not sum(it.num_replays for it in sessions)


async def _renew_until(server: Server, condition: Callable[[], bool]) -> None:
    """At least once."""
    async with asyncio.timeout(50):
        while True:
            server._placing.scout._directory._refreshed_at = -inf
            await server.renew()
            with suppress(TimeoutError):
                return await _until(condition, 5)


async def _until(condition: Callable[[], bool], timeout_s: float = 50) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("moment", ["between forward and backward", "before forward", "for a gap"])
def test_a_training_run_at_a_server_that_drains_goes_on_elsewhere(moment, make_swarm):
    """Its client is told at once, and does elsewhere what it has not got: the same bits."""
    swarm = make_swarm("0:3", "3:6")
    with closing(swarm.connect()) as service:
        model = distribute(resolve(str(swarm.model)), service, dtype=torch.float32)
        batch = make_batch()
        expected = remote_gradients(model, batch)
        victim = swarm.servers[1]
        swarm.add_server("2:6")

        def leave():
            training = victim.serving.training
            if moment == "for a gap":
                swarm.loop.run(victim.tenancy.leave_for(BlockRange(0, 3), drain_s=GAP_DRAIN_S), DRAIN_S)
            else:
                swarm.loop.run(victim.tenancy.drain(DRAIN_S), DRAIN_S + 10)
            swarm.loop.run(_until(lambda: not training.num_runs), 20)

        if moment == "before forward":
            leave()
        found = remote_gradients(model, batch, leave if moment != "before forward" else lambda: None)
        assert training_of(model).num_chains == 2
        assert all(torch.equal(ours, right) for ours, right in zip(found, expected, strict=True))


def test_a_second_signal_ends_a_server_that_drains(tiny_llama):
    """It waits for a session whose client says nothing; the operator need not."""
    with start_server("0:6", (), "--drain-timeout", "600", model=str(tiny_llama)) as server:
        server.wait_for("^ONLINE", 180)
        checkpoint = resolve(str(tiny_llama))
        with closing(
            connect(checkpoint, num_blocks=6, hidden_size=HIDDEN, initial_peers=[server.address()])
        ) as service:
            service._loop.run(_open_in_silence(service, server.address().rpartition("/")[2], checkpoint.digest))
            server.signal(signal.SIGTERM)
            server.wait_for("^DRAINING: 1 sessions move to other servers, 600 s", 10)
            server.signal(signal.SIGTERM)
            assert server.process.wait(10) == 130


async def _open_in_silence(service: SwarmService, peer_id: str, model: str) -> None:
    stream = await service._transport.open(peer_id, SESSION_SERVICE, timeout_s=10.0)
    key = bytes(16)
    opening = OpenSession(session_id=key, push_key=key, model=model, start=0, end=6, batch_size=1, max_length=8,
                          is_last=True)  # fmt: skip
    await stream.send(opening)
    await stream.receive(10.0)
