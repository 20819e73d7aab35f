"""Clients with private data train one adapter: the same bits for all, whoever vanishes, lies or comes late."""

import asyncio
import copy
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel
from transformers import set_seed

from swarm.adapters.delta import BlockDelta
from swarm.checkpoint.source import resolve
from swarm.client.federated import FederatedRun, RoundResult
from swarm.client.federated_stages import FederatedSettings
from swarm.client.model import distribute
from swarm.client.peft_model import get_peft_model
from swarm.errors import InvalidRequest, PeerMisbehaved, RoundFailed
from swarm.federated.agreement import Head
from tests.integration.conftest import LocalSwarm, closing

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")


@pytest.fixture
def service(swarm: LocalSwarm):
    """Blocks of two servers, and a third that overlaps both; all clients of these tests share the connection."""
    with closing(swarm.connect()) as service:
        yield service


@pytest.fixture
def join(swarm: LocalSwarm, service) -> Iterator[Callable[..., FederatedRun]]:
    """A client of a run, with a model of its own."""
    runs: list[FederatedRun] = []

    def join(name: str, *, rank: int = 4, settings: dict[str, Any] | None = None, **options: Any) -> FederatedRun:
        base = distribute(resolve(str(swarm.model)), service, dtype=torch.float32)
        set_seed(len(runs))  # so that A begins otherwise at each, if nobody takes care
        model = get_peft_model(base, LoraConfig(r=rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
        given = {"timeout_s": 30.0, "host": "127.0.0.1", "settings": FederatedSettings(**(settings or {})), **options}
        runs.append(FederatedRun(model, name=name, **given))
        return runs[-1]

    yield join
    for run in runs:
        run.close()


def learn(run: FederatedRun, seed: int, steps: int = 2) -> None:
    """Some steps on tokens that nobody else has."""
    ids = torch.randint(3, 126, (2, 12), generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(run.parameters(), lr=1e-2)
    for _ in range(steps):
        run._factors.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def together(runs: list[FederatedRun], *, num_examples: int = 10) -> list[RoundResult]:
    """A round of all of these at once."""
    with ThreadPoolExecutor(len(runs)) as pool:
        return list(pool.map(lambda run: run.round(num_examples), runs))


def bits(run: FederatedRun) -> bytes:
    """All that a client has learnt."""
    return b"".join(tensor.numpy().tobytes() for delta in run.current().values() for tensor in delta.tensors())


@pytest.mark.parametrize("aggregate", ["svd", "stack"])
def test_three_clients_have_the_same_bits_after_two_rounds(join, aggregate):
    """Each trains on its own data; A begins the same for all, whatever their seeds."""
    runs = [join(f"two rounds, {aggregate}", min_clients=3, settings={"aggregate": aggregate}) for _ in range(3)]
    begin = bits(runs[0])
    for number in range(2):
        for seed, run in enumerate(runs):
            learn(run, seed)
        results = together(runs)
        assert all(result.took_part and result.round == number and len(result.clients) == 3 for result in results)
        assert len({bits(run) for run in runs}) == len({run.digest for run in runs}) == 1
    assert bits(runs[0]) != begin


def test_the_mean_is_that_of_the_updates(join):
    """Two clients, weighted 1 to 3: B A of the result is the weighted sum of theirs, stacked exactly."""
    runs = [join("mean", rank=rank, settings={"aggregate": "stack"}) for rank in (2, 4)]
    for seed, run in enumerate(runs):
        learn(run, seed)
    updates = [run.current() for run in runs]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda run, number: run.round(number), runs, (10, 30)))
    assert {result.rank for result in results} == {6}
    assert dict(results[0].clients) == {runs[0].peer_id: 10, runs[1].peer_id: 30}
    for block, delta in runs[0].current().items():
        for path, linear in delta.linears.items():
            expected = sum(w * product(own[block].linears[path]) for w, own in zip((0.25, 0.75), updates, strict=True))
            torch.testing.assert_close(product(linear), expected, rtol=1e-5, atol=1e-7)


def product(linear) -> torch.Tensor:
    return linear.scale * (linear.b_Or.double() @ linear.a_rI.double())


def test_a_stacked_adapter_is_what_plain_peft_loads(join, local_model, tmp_path):
    """After a round and some more steps, one file has the frozen part and the trained one."""
    runs = [join("saved", settings={"aggregate": "stack"}) for _ in range(2)]
    for seed, run in enumerate(runs):
        learn(run, seed)
    together(runs)
    learn(runs[0], 5)
    runs[0].save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        remote = runs[0]._factors.model.eval()(input_ids=ids).logits
        plain = PeftModel.from_pretrained(copy.deepcopy(local_model), tmp_path).eval()(input_ids=ids).logits
    torch.testing.assert_close(remote, plain, rtol=1e-4, atol=1e-5)


def test_the_second_stage_begins_with_the_svd_of_the_first(join):
    """Six columns of each linear are trained; then a LoRA of rank 4 begins as near to them as that rank allows."""
    settings = {"warmup_rounds": 1, "warmup_columns": 6}
    runs = [join("warm-up", settings=settings) for _ in range(2)]
    columns = list(runs[0].parameters())
    assert {parameter.shape[1] for parameter in columns} == {6}
    for seed, run in enumerate(runs):
        learn(run, seed)
    learnt = [run.current() for run in runs]
    assert all(result.took_part for result in together(runs))
    assert len({bits(run) for run in runs}) == 1
    linear = runs[0].current()[0].linears["self_attn.q_proj"]
    mean = sum(product(own[0].linears["self_attn.q_proj"]) for own in learnt) / 2
    assert int((mean != 0).any(0).sum()) == 6
    u, s, v = torch.linalg.svd(mean)
    torch.testing.assert_close(product(linear), (u[:, :4] * s[:4]) @ v[:4], rtol=1e-4, atol=1e-7)
    for seed, run in enumerate(runs):
        assert {min(parameter.shape) for parameter in run.parameters()} == {4}
        learn(run, seed)
    assert all(result.rank == 4 for result in together(runs))


@pytest.mark.parametrize("num_served", [0, 1])
def test_the_others_go_on_when_a_client_vanishes_in_a_round(join, num_served):
    """It has told of its update; before anybody has it, or when one has, it is gone without a word."""
    runs = [join(f"vanishing {num_served}", min_clients=2, timeout_s=60.0) for _ in range(3)]
    for seed, run in enumerate(runs):
        learn(run, seed)
    victim, others = runs[0], runs[1:]
    is_gone, served = threading.Event(), set()
    send = victim._exchange._delivery.send

    async def send_to_some(stream, request):
        if stream.peer_id in served or len(served) < num_served:
            served.add(stream.peer_id)
            return await send(stream, request)
        is_gone.set()
        await asyncio.Event().wait()

    victim._exchange._delivery.send = send_to_some
    with ThreadPoolExecutor(3) as pool:
        ending = [pool.submit(run.round, 10) for run in others]
        lost = pool.submit(victim.round, 10)
        assert is_gone.wait(30)
        victim._leave_swarm()
        victim._loop.stop()
        results = [future.result() for future in ending]
        assert lost.exception() is not None
    assert len({bits(run) for run in others}) == 1
    assert results[0].clients == results[1].clients and set(results[0].clients) >= {run.peer_id for run in others}
    assert num_served or victim.peer_id not in results[0].clients


def hostile_update(kind: str, update):
    """An update as nobody should send it."""
    linears = dict(update[0].linears)
    q = linears["self_attn.q_proj"]
    a, b = q.a_rI, q.b_Or
    linears["self_attn.q_proj"] = {
        "nan": replace(q, b_Or=torch.full_like(b, torch.nan)),
        "size": replace(q, a_rI=torch.cat([a] * 90), b_Or=torch.cat([b] * 90, 1)),
    }[kind]
    return {**update, 0: BlockDelta(linears=linears)}


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("nan", "not finite"),
        ("size", "limit"),
    ],
)
def test_a_hostile_update_is_left_out(join, kind, why):
    """Everybody else refuses it, says why, and goes on."""
    runs = [join(f"hostile {kind}", settings={"aggregate": "svd"}) for _ in range(3)]
    for seed, run in enumerate(runs):
        learn(run, seed)
    bad = runs[0]
    stage, good = bad._main, bad._main.update()
    stage.update = lambda: hostile_update(kind, good)
    results = together(runs)[1:]
    assert len({bits(run) for run in runs[1:]}) == 1
    assert all(set(result.clients) == {run.peer_id for run in runs[1:]} for result in results)
    refused = {why for result in results for peer_id, why in result.refused.items() if peer_id == bad.peer_id}
    assert refused and all(re.search(why, text) for text in refused)


def test_nobody_can_speak_for_another(join):
    """A contribution in the name of another client, signed by whoever sent it, is refused; that client's own counts."""
    runs = [join("forged") for _ in range(3)]
    for seed, run in enumerate(runs):
        learn(run, seed)
    forger, victim = runs[0], runs[1]
    identity = forger._exchange._identity
    forger._exchange._identity = SimpleNamespace(peer_id=victim.peer_id, sign=identity.sign)
    with ThreadPoolExecutor(3) as pool:
        ending = [pool.submit(run.round, 10) for run in runs[1:]]
        with pytest.raises(PeerMisbehaved, match="it has not signed"):
            forger.round(10)
        forger.close()
        results = [future.result() for future in ending]
    assert all(set(result.clients) == {run.peer_id for run in runs[1:]} for result in results)
    assert len({bits(run) for run in runs[1:]}) == 1


@pytest.mark.parametrize("number", [1, 1 << 62])
def test_one_that_says_it_is_further_takes_nobody_along(join, number):
    """Before the first round has ended, too: the others' learning counts, and the liar is not waited for."""
    *runs, liar = [join(f"further {number}") for _ in range(3)]
    for seed, run in enumerate(runs):
        learn(run, seed)
    liar._exchange.head = Head(number, "f" * 64)
    results = together(runs)
    assert all(set(result.clients) == {run.peer_id for run in runs} for result in results)
    assert [run.number for run in runs] == [1, 1] and len({bits(run) for run in runs}) == 1


def test_who_comes_late_has_what_the_others_have(join):
    """One joins after a round and takes over its result; one that nobody waited for gets it, too, and both go on."""
    runs = [join("late") for _ in range(2)]
    for seed, run in enumerate(runs):
        learn(run, seed)
    together(runs)
    third = join("late")
    assert (third.number, third.digest, bits(third)) == (1, runs[0].digest, bits(runs[0]))
    for seed, run in enumerate([*runs, third]):
        learn(run, seed)
    assert all(result.took_part for result in together([*runs, third]))
    third._loop.run(third._exchange._roll.announce(is_leaving=True))
    together(runs)
    result = third.round(10)
    assert not result.took_part and not result.clients
    assert (third.number, bits(third)) == (3, bits(runs[0]))


def test_a_round_that_too_few_come_to_changes_nothing(join):
    """Alone, one fails with both numbers, and may try again."""
    run = join("alone", min_clients=2)
    learn(run, 0)
    before = bits(run)
    with pytest.raises(RoundFailed, match="1 clients came to round 0, need 2"):
        run.round(10, timeout_s=0.3)
    assert bits(run) == before and run.number == 0


def test_other_settings_are_another_run(join, caplog):
    """Clients that would come to other results don't meet, and are told of each other."""
    one, other = join("settings"), join("settings", rank=2)
    for run in (one, other):
        with pytest.raises(RoundFailed, match="1 clients"):
            run.round(10, timeout_s=0.3)
    assert "other settings" in caplog.text


def test_bad_arguments_are_named(join):
    """Before anything is started."""
    for change, why in (
        ({"name": "a\nb"}, "name"),
        ({"min_clients": 0}, "min_clients is 0"),
        ({"timeout_s": 0}, "timeout_s is 0"),
        ({"members": ["x"]}, "members"),
        ({"peers": "/ip4/1.2.3.4"}, "peers must be a list"),
        ({"settings": {"aggregate": "median"}}, "aggregate is 'median'"),
        ({"settings": {"weighting": "loud"}}, "weighting is 'loud'"),
        ({"settings": {"clip": 0.5}}, "clip is 0.5"),
        ({"settings": {"warmup_rounds": -1}}, "warmup_rounds is -1"),
        ({"settings": {"warmup_columns": 0}}, "warmup_columns is 0"),
        ({"settings": {"warmup_rounds": 1, "warmup_columns": 3}}, "need at least the rank, 4"),
        ({"settings": {"warmup_rounds": 1, "warmup_columns": 65}}, "q_proj has 64 inputs"),
    ):
        with pytest.raises(InvalidRequest, match=why):
            join(**{"name": "bad", **change})


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]), "IA3"),
        (LoraConfig(target_modules=["q_proj"], rank_pattern={"q_proj": 2}), "rank_pattern"),
        (LoraConfig(target_modules=["q_proj"], alpha_pattern={"q_proj": 2}), "alpha_pattern"),
    ],
)
def test_what_is_no_plain_lora_is_refused(swarm, service, config, why):
    """The field is named."""
    base = distribute(resolve(str(swarm.model)), service, dtype=torch.float32)
    with pytest.raises(InvalidRequest, match=why):
        FederatedRun(get_peft_model(base, config), name="no LoRA", host="127.0.0.1")


def test_what_was_learnt_before_is_kept_or_refused(swarm, service):
    """One rank goes on from it; stacking and the warm-up would lose it, and say so."""
    base = distribute(resolve(str(swarm.model)), service, dtype=torch.float32)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    for settings in (FederatedSettings(aggregate="stack"), FederatedSettings(warmup_rounds=1)):
        with pytest.raises(InvalidRequest, match="has learnt something already"):
            FederatedRun(model, name="learnt", settings=settings, host="127.0.0.1")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" in name}
    with FederatedRun(model, name="learnt", host="127.0.0.1") as run:
        assert run.number == 0
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
