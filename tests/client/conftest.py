"""Tiny distributed models around local blocks, a tiny tokenizer, and swarms of scripted servers."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from swarm.checkpoint.source import resolve
from swarm.client.generation import DistributedModel
from swarm.client.model import distribute
from swarm.network import Node, NodeConfig
from swarm.transport import Transport
from swarm.types import BlockRange
from tests.client.fake_server import FakePeers, FakeServer
from tests.client.local_blocks import LocalBlockService
from tests.client.scripted_swarm import NUM_NODES, Swarm
from tests.families.configs import FAMILIES, VOCABULARY

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} . {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A complete local model, and the same model over blocks elsewhere."""

    local: PreTrainedModel
    distributed: DistributedModel
    service: LocalBlockService
    path: Path


@pytest.fixture(scope="session")
def make_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """Build the pair of a model family, with token 2 as the end of a text."""

    def make(family: str) -> Pair:
        path = tmp_path_factory.mktemp(family)
        local = FAMILIES[family].model()
        settings = local.generation_config
        settings.use_cache, settings.pad_token_id, settings.bos_token_id, settings.eos_token_id = True, 0, 1, 2
        settings.max_length = None
        local.save_pretrained(path)
        service = LocalBlockService(local)
        checkpoint = resolve(path, cache_dir=path / "cache")
        distributed = distribute(checkpoint, service, dtype=torch.float32)
        distributed.generation_config = settings
        return Pair(local=local, distributed=distributed, service=service, path=path)

    return make


@pytest.fixture(scope="session")
def _llama(make_pair: Callable[[str], Pair]) -> Pair:
    return make_pair("llama")


@pytest.fixture
def pair(_llama: Pair) -> Iterator[Pair]:
    """A Llama of three blocks; its service forgets earlier sessions."""
    service = _llama.service
    service.sessions, service.before_step, service.is_closed = [], None, False
    yield _llama
    service.before_step = None


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One word per token, with a chat template."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", "system", "."]
    words += ["abcdef"]  # transformers tries stop strings out on this word
    words += [f"w{index}" for index in range(VOCABULARY - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def nodes() -> AsyncIterator[list[Node]]:
    """Peers that know each other; the last is the client's."""
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(await Node.start(NodeConfig(host="127.0.0.1")))
        config = NodeConfig(host="127.0.0.1", initial_peers=first.addresses)
        others = await asyncio.gather(*(Node.start(config) for _ in range(NUM_NODES - 1)))
        for node in others:
            await stack.enter_async_context(node)
        yield [first, *others]


@pytest_asyncio.fixture(loop_scope="module")
async def make_swarm(nodes: list[Node]) -> AsyncIterator[Callable]:
    """Swarms of one's own, with servers of the given spans."""
    async with AsyncExitStack() as stack:
        made: list[Swarm] = []

        async def make(*spans: str, **settings) -> Swarm:
            servers = [
                FakeServer(node, BlockRange.parse(span), **settings)
                for node, span in zip(nodes[:-1], spans, strict=False)
            ]
            assert len(servers) == len(spans)
            for server in servers:
                await stack.enter_async_context(server.transport)
            transport = await stack.enter_async_context(Transport(nodes[-1]))
            made.append(Swarm(servers, FakePeers(servers), transport))
            return made[-1]

        yield make
        for swarm in made:
            for session in swarm.sessions:
                await session.close()
