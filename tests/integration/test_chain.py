"""The push chain through real servers: what crosses the client's link, and what a loss costs, whatever is lost when."""

import threading
from collections import Counter

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from swarm import AutoDistributedModelForCausalLM
from swarm.client.config import SessionConfig
from swarm.errors import RouteNotFound
from swarm.transport import stream as stream_module

from .conftest import NUM_BLOCKS, PATIENT, LocalSwarm, closing

PROMPTS = torch.tensor([[5, 9, 44, 12, 7, 61], [0, 0, 3, 8, 1, 90]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
NEW_TOKENS = 12


def distributed(swarm: LocalSwarm, **config):
    return AutoDistributedModelForCausalLM.from_pretrained(
        swarm.model, initial_peers=[swarm.address], session_config=SessionConfig(**{**PATIENT, **config})
    )


class Traffic:
    """Messages that the client's loop encodes and decodes, by kind."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.sent: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        encode, decode = stream_module.encode, stream_module.decode

        def counting_encode(message):
            self._count(self.sent, message)
            return encode(message)

        def counting_decode(data):
            message = decode(data)
            self._count(self.received, message)
            return message

        monkeypatch.setattr(stream_module, "encode", counting_encode)
        monkeypatch.setattr(stream_module, "decode", counting_decode)

    def _count(self, counter: Counter[str], message: object) -> None:
        if threading.current_thread().name == "swarm-client":
            counter[type(message).__name__] += 1

    @property
    def activations(self) -> tuple[int, int]:
        """Messages with hidden states: up, down."""
        return self.sent["Step"], self.received["StepResult"]


@pytest.mark.parametrize(("push", "per_step"), [(True, 1), (False, 3)], ids=["push", "star"])
def test_one_activation_goes_up_and_one_comes_down_per_step(make_swarm, local_model, monkeypatch, push, per_step):
    """Three hops cost the client's link no more than one; without pushing, everything passes it three times."""
    swarm = make_swarm("0:2", "2:4", "4:6")
    traffic = Traffic(monkeypatch)
    with distributed(swarm, push=push) as model, model.inference_session(max_length=32) as session:
        tokens = model.generate(PROMPTS[:1], max_new_tokens=1, do_sample=False, session=session)
        before = traffic.activations
        tokens = model.generate(tokens, max_new_tokens=NEW_TOKENS, do_sample=False, session=session)
        after = traffic.activations
    assert tuple(b - a for a, b in zip(before, after, strict=True)) == (NEW_TOKENS * per_step,) * 2
    assert torch.equal(tokens, local_model.generate(PROMPTS[:1], max_new_tokens=NEW_TOKENS + 1, do_sample=False))


class At(BaseStreamer):
    """Calls each action when its number of tokens has come."""

    def __init__(self, actions: dict[int, object]):
        self.actions, self.count = actions, -1  # the prompt counts as one

    def put(self, value) -> None:
        self.count += 1
        if action := self.actions.get(self.count):
            action()

    def end(self) -> None:
        pass


SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 20}
BEAMS = {"num_beams": 3, "do_sample": False}


@pytest.mark.parametrize("lost", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
def test_servers_lost_at_once_cost_no_token(make_swarm, local_model, lost):
    """Any hop, neighbours, all of them: a left-padded greedy batch goes on as if nothing had happened."""
    swarm = make_swarm("0:2", "2:4", "4:6", "0:2", "2:4", "4:6")
    expected = local_model.generate(PROMPTS, attention_mask=MASK, max_new_tokens=NEW_TOKENS, do_sample=False)
    with distributed(swarm) as model, model.inference_session(batch_size=2, max_length=32) as session:

        def lose() -> None:
            for peer_id in [session.route[index].peer_id for index in lost]:
                remove(swarm, peer_id)

        tokens = model.generate(
            PROMPTS,
            attention_mask=MASK,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            session=session,
            streamer=At({3: lose}),
        )
        assert session.session.num_replays >= 1
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("settings", [SAMPLING, BEAMS], ids=["sampling", "beams"])
@pytest.mark.parametrize("push", [True, False], ids=["push", "star"])
def test_losses_one_after_the_other_change_nothing(make_swarm, local_model, monkeypatch, settings, push):
    """A middle hop, later the one behind it: seeded sampling and beam search give transformers' own tokens."""
    swarm = make_swarm("0:2", "2:4", "4:6", "2:4", "4:6")
    torch.manual_seed(7)
    expected = local_model.generate(PROMPTS, attention_mask=MASK, max_new_tokens=NEW_TOKENS, **settings)
    with distributed(swarm, push=push) as model:
        steps = Losses(swarm, model, {4: 1, 8: 2})
        steps.watch(monkeypatch)
        torch.manual_seed(7)
        tokens = model.generate(PROMPTS, attention_mask=MASK, max_new_tokens=NEW_TOKENS, **settings)
        assert steps.num_lost == 2
    assert torch.equal(tokens, expected)


class Losses:
    """Removes a hop of whatever session runs, before the n-th step."""

    def __init__(self, swarm: LocalSwarm, model, when: dict[int, int]):
        self.swarm, self.model, self.when = swarm, model, when
        self.num_steps = self.num_lost = 0

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from swarm.client.runtime import SwarmSession

        step = SwarmSession.step

        def watched(session, *args, **kwargs):
            self.num_steps += 1
            if (index := self.when.get(self.num_steps)) is not None:
                remove(self.swarm, session.route[index].peer_id)
                self.num_lost += 1
            return step(session, *args, **kwargs)

        monkeypatch.setattr(SwarmSession, "step", watched)


def remove(swarm: LocalSwarm, peer_id: str, *, politely: bool = False) -> None:
    server = next(server for server in swarm.servers if server.node.peer_id == peer_id)
    swarm.remove_server(server, politely=politely)


def test_a_server_that_leaves_politely_in_mid_session_costs_no_token(make_swarm, local_model):
    """SIGTERM's way out while a session runs: the other replica goes on."""
    swarm = make_swarm("0:3", "3:6", "3:6")
    with distributed(swarm) as model, model.inference_session(max_length=32) as session:

        def leave() -> None:
            remove(swarm, session.route[1].peer_id, politely=True)

        tokens = model.generate(
            PROMPTS[:1], max_new_tokens=NEW_TOKENS, do_sample=False, session=session, streamer=At({3: leave})
        )
    assert torch.equal(tokens, local_model.generate(PROMPTS[:1], max_new_tokens=NEW_TOKENS, do_sample=False))


def test_a_session_outlives_the_last_replica(make_swarm, local_model):
    """With nobody left for 3:6 a step ends in RouteNotFound after the caller's limit; once served again, it goes on."""
    swarm = make_swarm("0:3", "3:6")
    expected = local_model.generate(PROMPTS[:1], max_new_tokens=NEW_TOKENS, do_sample=False)
    with distributed(swarm, max_wait_s=1.0) as model, model.inference_session(max_length=32) as session:
        tokens = model.generate(PROMPTS[:1], max_new_tokens=4, do_sample=False, session=session)
        remove(swarm, session.route[1].peer_id, politely=True)
        with pytest.raises(RouteNotFound, match="3:6"):
            model.generate(tokens, max_new_tokens=NEW_TOKENS - 4, do_sample=False, session=session)
        swarm.add_server("3:6")
        tokens = model.generate(tokens, max_new_tokens=NEW_TOKENS - 4, do_sample=False, session=session)
    assert torch.equal(tokens, expected)


def test_a_replay_does_not_pass_the_client(make_swarm, local_model, monkeypatch):
    """When a middle hop is lost after a long prompt, what the client sends is the step in flight, and no history."""
    swarm = make_swarm("0:2", "2:4", "4:6", "2:4")
    prompt = torch.randint(1, 120, (1, 200), generator=torch.Generator().manual_seed(1))
    with closing(swarm.connect()) as service, service.open_session(batch_size=1, max_length=256) as session:
        embed = local_model.model.embed_tokens
        session.step(embed(prompt[0]).detach(), positions=[0], num_tokens=[200], num_outputs=[1])
        remove(swarm, session.route[1].peer_id)
        sent = count_tokens(monkeypatch)
        last = session.step(embed(torch.tensor([17])).detach(), positions=[200], num_tokens=[1])
        assert session.num_replays == 1 and [block for hop in session.route for block in hop.blocks] == [
            *range(NUM_BLOCKS)
        ]
    assert sum(sent) <= 2
    logits = local_model(torch.cat([prompt, torch.tensor([[17]])], dim=1)).logits[0, -1:]
    torch.testing.assert_close(local_model.lm_head(local_model.model.norm(last)), logits, atol=1e-4, rtol=0)


def count_tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each Step that the client sends from now on."""
    sent: list[int] = []
    encode = stream_module.encode

    def counting(message):
        if type(message).__name__ == "Step" and threading.current_thread().name == "swarm-client":
            sent.append(sum(message.num_tokens))
        return encode(message)

    monkeypatch.setattr(stream_module, "encode", counting)
    return sent
