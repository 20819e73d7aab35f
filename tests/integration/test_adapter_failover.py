"""Adapters outlive the processes that apply them: servers get SIGKILL in mid-answer, and no token changes.

Three hops, a spare for each that has never seen the adapters, all of them processes of their own. Whatever a spare
needs it gets while its session waits: history from upstream, adapters from whoever has them.
"""

import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from swarm import AutoDistributedModelForCausalLM
from swarm.client.config import SessionConfig
from swarm.client.processes import start_bootstrap
from swarm.protocol import INFO_SERVICE, Info, InfoRequest
from tests.bench.forked import ForkedServer, ServerFactory

from .test_adapters import MASK, PROMPTS, adapters  # noqa: F401
from .test_chain import At

pytestmark = [  # PEFT's own
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),
]

SPANS = ("0:2", "2:4", "4:6")
NEW_TOKENS = 14
OPTIONS = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
GREEDY = {"do_sample": False, **OPTIONS}
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 20, **OPTIONS}


class Fleet:
    """Servers as processes, two for each span."""

    def __init__(self, factory: ServerFactory, model: Path, address: str):
        self._factory, self._model, self.address = factory, model, address
        self.servers: dict[str, tuple[str, ForkedServer]] = {}

    def fill(self) -> None:
        """Start what is missing; all are online when this returns."""
        spans = [span for span, _ in self.servers.values()]
        started = [(span, self._start(span)) for span in SPANS for _ in range(2 - spans.count(span))]
        for span, server in started:
            server.wait_for("^ONLINE", 180)
            self.servers[server.peer_id] = span, server

    def kill(self, peer_id: str) -> None:
        """SIGKILL: no last word to anybody."""
        _, server = self.servers.pop(peer_id)
        server.signal(signal.SIGKILL, whole_tree=True)

    def client(self, adapters: dict[str, Path]):  # noqa: F811
        """That knows these adapters by name."""
        model = AutoDistributedModelForCausalLM.from_pretrained(
            self._model, initial_peers=[self.address], session_config=SessionConfig(max_wait_s=30.0)
        )
        for name, path in adapters.items():
            model.load_adapter(path, adapter_name=name)
        model.disable_adapters()
        return model

    def _start(self, span: str) -> ForkedServer:
        fixed = ("--host", "127.0.0.1", "--quantization", "none", "--threads", "1", "--kv-cache", "2048")
        return self._factory.start([str(self._model), "--blocks", span, "--initial-peers", self.address, *fixed])


@pytest.fixture(scope="module")
def fleet(tiny_llama: Path) -> Iterator[Fleet]:
    """Without any server yet."""
    with start_bootstrap() as bootstrap, ServerFactory() as factory:
        yield Fleet(factory, tiny_llama, bootstrap.address())


def ask(service, peer_id: str) -> Info:
    """A server's word on itself."""

    async def asking() -> Info:
        async with await service._transport.open(peer_id, INFO_SERVICE, timeout_s=10.0) as stream:
            await stream.send(InfoRequest())
            message, _ = await stream.receive(10.0)
            return message

    return service._loop.run(asking())


def wait_until_nothing_is_held(service, fleet: Fleet) -> None:
    """Every server that is left has all of its cache free again, and no session."""
    late = threading.Event()
    timer = threading.Timer(10.0, late.set)
    timer.start()
    for peer_id in fleet.servers:
        while (info := ask(service, peer_id)).num_sessions or info.kv_free_tokens != info.kv_total_tokens:
            assert not late.is_set(), f"{info.num_sessions} sessions, {info.kv_free_tokens} tokens free"
    timer.cancel()


CASES = {
    "adapters": (1, GREEDY, ["lora", None, "small"]),
    "virtual positions": (3, GREEDY, ["prefix", None, "deep"]),
    "both, sampled": (4, SAMPLING, ["ia3", "prompt", "small"]),
}
"""Each has an adapter that no server has seen before."""


@pytest.mark.parametrize(("seed", "options", "names"), CASES.values(), ids=CASES)
def test_killed_processes_cost_no_token_of_any_adapter(fleet, adapters, seed, options, names):  # noqa: F811
    """All three hops, one after the other in seeded order at seeded tokens; nothing stays held on those that live."""
    chance = random.Random(seed)
    order = chance.sample(range(len(SPANS)), len(SPANS))
    moments = sorted(chance.sample(range(1, NEW_TOKENS - 1), len(SPANS)))
    fleet.fill()
    with fleet.client({name: adapters[name] for name in names if name is not None}) as model:
        with model.inference_session(batch_size=len(PROMPTS), max_length=64, adapter_name=names) as session:
            sent: list[int] = []

            def kill(hop: int) -> None:
                sent.append(session.session._remote._supervisor._uploads.num_bytes)
                fleet.kill(session.route[hop].peer_id)

            torch.manual_seed(seed)
            kills = At({moment: lambda hop=hop: kill(hop) for moment, hop in zip(moments, order, strict=True)})
            found = model.generate(PROMPTS, attention_mask=MASK, session=session, streamer=kills, **options)
            assert len(sent) == len(SPANS) and session.session.num_replays >= len(SPANS)
            assert {hop.peer_id for hop in session.route} == fleet.servers.keys()
            assert 0 < sent[0] < session.session._remote._supervisor._uploads.num_bytes  # the spares asked for it, too
        wait_until_nothing_is_held(model.block_service, fleet)
        torch.manual_seed(seed)
        expected = model.generate(PROMPTS, attention_mask=MASK, adapter_name=names, **options)
        assert torch.equal(found, expected)
