"""Adapters through real servers: every row what PEFT makes of it on the same base, wherever its bytes come from."""

import itertools
import json
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from swarm import AutoDistributedModelForCausalLM
from swarm.client.config import SessionConfig
from swarm.errors import AdapterError, InvalidRequest, PeerBusy
from swarm.server.config import CacheSize
from swarm.server.pages import PAGE_SIZE
from tests.server.blocks.peft_adapters import change_tensors, save_adapter

from .conftest import HIDDEN, NUM_BLOCKS, PATIENT, LocalSwarm
from .test_chain import At, remove

pytestmark = [  # PEFT's own
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),
]

PROMPTS = torch.tensor([[5, 9, 44, 12, 7, 61], [0, 0, 3, 8, 1, 90], [0, 33, 21, 6, 70, 2]])
MASK = (PROMPTS != 0).long()
NEW_TOKENS = 10
GREEDY = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
BEAMS = {"num_beams": 3, "do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
SAMPLING = {**GREEDY, "do_sample": True, "temperature": 0.8, "top_k": 20}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
KINDS = {
    "lora": lambda: peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    "small": lambda: peft.LoraConfig(r=3, lora_alpha=9, target_modules=ATTENTION, task_type="CAUSAL_LM"),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.fixture(scope="session")
def adapters(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory of each kind, as PEFT saves it."""
    root = tmp_path_factory.mktemp("adapters")
    made = {}
    for seed, (name, config) in enumerate(KINDS.items()):
        base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        made[name] = save_adapter(base, config(), root / name, seed=seed)
    made["deep"] = save_deep_prompts(root / "deep")
    return made


@pytest.fixture(scope="session")
def many(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Sixteen LoRA adapters of different ranks."""
    root = tmp_path_factory.mktemp("many")
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    paths = []
    for seed in range(16):
        config = peft.LoraConfig(r=(2, 4, 8)[seed % 3], target_modules=ATTENTION, task_type="CAUSAL_LM")
        paths.append(save_adapter(base, config, root / str(seed), seed=100 + seed))
        base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    return paths


def save_deep_prompts(directory: Path) -> Path:
    """Prompts of our own kind, which are added where hidden states enter a block."""
    directory.mkdir()
    generator = torch.Generator().manual_seed(4)
    tensors = {
        "deep_prompts": torch.randn(NUM_BLOCKS, 4, HIDDEN, generator=generator),
        "prompt_embeddings": torch.randn(4, HIDDEN, generator=generator),
    }
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "DEEP_PROMPT_TUNING", "num_virtual_tokens": 4, "base_model_name_or_path": "tiny"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def of_peft(tiny_llama: Path, directory: Path | None, row: int, **options) -> torch.Tensor:
    """What PEFT generates for one prompt of PROMPTS, without padding: [answers, new tokens]."""
    ids = PROMPTS[row][MASK[row].bool()][None]
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if directory is not None:
            model = peft.PeftModel.from_pretrained(model, directory).eval()
        torch.manual_seed(row)
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    return found[:, ids.shape[1] :]


def distributed(swarm: LocalSwarm, adapters: dict[str, Path] | None = None, **config):
    """A client with these adapters, none of which is active."""
    model = AutoDistributedModelForCausalLM.from_pretrained(
        swarm.model, initial_peers=[swarm.address], session_config=SessionConfig(**{**PATIENT, **config})
    )
    for name, path in (adapters or {}).items():
        model.load_adapter(path, adapter_name=name)
    model.disable_adapters()
    return model


def loaders(swarm: LocalSwarm):
    return [server.serving.handler.adapters.loader for server in swarm.servers]


def wait_until_nothing_is_used(swarm: LocalSwarm) -> None:
    """Pages of sessions and of the adapters that they hold come back; idle adapters count as free."""
    late = threading.Event()
    timer = threading.Timer(5.0, late.set)
    timer.start()
    while swarm.pages_in_use():
        assert not late.is_set(), f"still {swarm.pages_in_use()} pages in use"
    timer.cancel()


@pytest.fixture(scope="module")
def shared(tiny_llama: Path) -> LocalSwarm:
    """Two servers, for tests that break nothing."""
    swarm = LocalSwarm(tiny_llama)
    for blocks in ("0:3", "3:6"):
        swarm.add_server(blocks, announce_period_s=600.0)  # which nobody renews in tests
    yield swarm
    swarm.close()


@pytest.mark.parametrize("options", [GREEDY, BEAMS, SAMPLING], ids=["greedy", "beams", "sampling"])
def test_each_row_is_what_peft_makes_of_it(shared, tiny_llama, adapters, options):
    """LoRA, IA3, prefix and prompt tuning and no adapter in left-padded batches; rows don't disturb each other."""
    with distributed(shared, adapters) as model:
        for names in (["lora", None, "prefix"], ["prompt", "ia3", "small"], ["prefix", "prefix", "lora"]):
            if options is SAMPLING:  # the dice are the batch's: one row at a time
                for row, name in enumerate(names):
                    ids = PROMPTS[row][MASK[row].bool()][None]
                    torch.manual_seed(row)
                    found = model.generate(ids, adapter_name=name or "__base__", **options)[:, -NEW_TOKENS:]
                    assert torch.equal(found, of_peft(tiny_llama, adapters.get(name), row, **options)), name
                continue
            found = model.generate(PROMPTS, attention_mask=MASK, adapter_name=names, **options)[:, -NEW_TOKENS:]
            for row, name in enumerate(names):
                assert torch.equal(found[row], of_peft(tiny_llama, adapters.get(name), row, **options)[0]), name
    wait_until_nothing_is_used(shared)


def test_several_answers_of_a_prompt_use_its_adapter(shared, tiny_llama, adapters):
    """Rows are expanded as transformers expands them."""
    options = {**BEAMS, "num_return_sequences": 2}
    with distributed(shared, adapters) as model:
        found = model.generate(PROMPTS, attention_mask=MASK, adapter_name=["small", None, "prefix"], **options)
    for row, name in enumerate(("small", None, "prefix")):
        expected = of_peft(tiny_llama, adapters.get(name), row, **options)
        assert torch.equal(found[2 * row : 2 * row + 2, -NEW_TOKENS:], expected), name


def test_two_active_adapters_add_up_as_in_peft(shared, tiny_llama, adapters):
    """set_adapter with a list; logits of one forward pass; and back to one, and to none."""
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    with torch.no_grad():
        plain = base(PROMPTS[:1]).logits
        both = peft.PeftModel.from_pretrained(base, adapters["lora"], adapter_name="lora").eval()
        both.load_adapter(adapters["small"], adapter_name="small")
        both.base_model.set_adapter(["lora", "small"])
        expected = both(PROMPTS[:1]).logits
    with distributed(shared, adapters) as model:
        assert model.active_adapters() == []
        model.set_adapter(["lora", "small"])
        assert model.active_adapters() == ["lora", "small"]
        with torch.no_grad():
            torch.testing.assert_close(model(PROMPTS[:1]).logits, expected, atol=1e-4, rtol=1e-4)
            model.disable_adapters()
            torch.testing.assert_close(model(PROMPTS[:1]).logits, plain, atol=1e-4, rtol=1e-4)
        model.delete_adapter("small")
        model.enable_adapters()
        assert model.active_adapters() == ["lora"]


def test_two_clients_with_adapters_of_their_own_share_a_server(make_swarm, tiny_llama, adapters):
    """At the same time, each equal to PEFT; nothing of either stays in use."""
    swarm = make_swarm("0:6")
    expected = {name: of_peft(tiny_llama, adapters[name], 0, **GREEDY)[0] for name in ("lora", "small")}

    def run(name: str) -> torch.Tensor:
        with distributed(swarm, {"mine": adapters[name]}) as model:
            return torch.cat(
                [model.generate(PROMPTS[:1], adapter_name="mine", **GREEDY)[0, -NEW_TOKENS:] for _ in "ab"]
            )

    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(expected, pool.map(run, expected), strict=True))
    for name, tokens in expected.items():
        assert torch.equal(found[name], torch.cat([tokens, tokens])), name
    wait_until_nothing_is_used(swarm)


def test_a_server_gets_an_adapter_from_another_after_the_client_has_gone(make_swarm, tiny_llama, adapters):
    """The first client's upload is the only one; who asked whom is counted."""
    swarm = make_swarm("0:6")
    expected = of_peft(tiny_llama, adapters["lora"], 0, **GREEDY)[0]
    with distributed(swarm, {"a": adapters["lora"]}) as model:
        assert torch.equal(model.generate(PROMPTS[:1], adapter_name="a", **GREEDY)[0, -NEW_TOKENS:], expected)
    first = swarm.servers[0]
    swarm.add_server("0:6")
    swarm.loop.run(announce(first))
    with distributed(swarm, {"b": adapters["lora"]}) as model:
        with model.inference_session(max_length=32, adapter_name="b") as session:

            def lose() -> None:
                swarm.loop.run(forget_sessions(first))

            found = model.generate(PROMPTS[:1], session=session, streamer=At({3: lose}), **GREEDY)
        assert torch.equal(found[0, -NEW_TOKENS:], expected)
    second = loaders(swarm)[1]
    assert second.num_fetched_bytes and not second.num_uploaded_bytes


async def announce(server) -> None:
    await server._announcer.tell()


async def forget_sessions(server) -> None:
    """End all sessions here, and take no more; the server lives and gives away its adapters."""
    from swarm.types import ServerState

    server.serving.handler.state = ServerState.DRAINING
    for session in list(server.serving.handler._sessions):
        session.end(PeerBusy("draining", retry_after_s=60.0))


def test_an_adapter_that_had_to_go_comes_back(make_swarm, tiny_llama, many):
    """With room for few in host memory and on the device, sixteen take turns, twice, always with the right tokens."""
    swarm = make_swarm()
    size = sum(path.stat().st_size for path in many[2].glob("*.safetensors"))
    swarm.add_server("0:6", adapter_bytes=10 * size, cache_size=CacheSize(tokens=24 * PAGE_SIZE))
    with distributed(swarm, {str(number): path for number, path in enumerate(many)}) as model:
        expected = [of_peft(tiny_llama, path, 0, **GREEDY)[0] for path in many]
        for _ in range(2):
            for number, tokens in enumerate(expected):
                found = model.generate(PROMPTS[:1], adapter_name=str(number), **GREEDY)[0, -NEW_TOKENS:]
                assert torch.equal(found, tokens), number
    store = loaders(swarm)[0].store
    assert store.num_evicted >= 16 and len(store) < 16
    wait_until_nothing_is_used(swarm)


def test_an_adapter_that_is_evicted_in_mid_session_comes_back_for_the_next_token(make_swarm, tiny_llama, many):
    """An idle session's adapter gives its pages to others; its tokens go on as if nothing had been."""
    swarm = make_swarm()
    server = swarm.add_server("0:6", cache_size=CacheSize(tokens=24 * PAGE_SIZE))
    expected = of_peft(tiny_llama, many[0], 0, **GREEDY)[0]
    with distributed(swarm, {str(number): path for number, path in enumerate(many)}) as model:
        digest = model.adapters["0"].digest
        with model.inference_session(max_length=64, adapter_name="0") as session:
            ids = model.generate(PROMPTS[:1], session=session, do_sample=False, max_new_tokens=4, min_new_tokens=4)
            assert digest in server.serving.executor.attached_adapters
            ids_of_others = torch.randint(1, 120, (1, 300), generator=torch.Generator().manual_seed(1))
            others = itertools.chain(*itertools.repeat(range(1, 16), 4))
            while digest in server.serving.executor.attached_adapters:
                model.generate(ids_of_others, adapter_name=str(next(others)), max_new_tokens=2, do_sample=False)
            rest = {**GREEDY, "max_new_tokens": 6, "min_new_tokens": 6}
            assert torch.equal(model.generate(ids, session=session, **rest)[0, -NEW_TOKENS:], expected)
            assert digest in server.serving.executor.attached_adapters
    wait_until_nothing_is_used(swarm)


def test_sixty_four_sessions_with_sixteen_adapters_at_once(make_swarm, tiny_llama, many):
    """On one server; each row is PEFT's own, and every page comes back, but for those of idle adapters."""
    swarm = make_swarm()
    server = swarm.add_server("0:6", cache_size=CacheSize(tokens=256 * PAGE_SIZE))
    names = {str(number): path for number, path in enumerate(many)}
    expected = {name: of_peft(tiny_llama, path, 0, **GREEDY)[0] for name, path in names.items()}
    with distributed(swarm, names) as model, ThreadPoolExecutor(64) as pool:

        def run(number: int) -> bool:
            name = str(number % 16)
            found = model.generate(PROMPTS[:1], adapter_name=name, **GREEDY)
            return torch.equal(found[0, -NEW_TOKENS:], expected[name])

        assert all(pool.map(run, range(64)))
    wait_until_nothing_is_used(swarm)
    assert 1 <= len(server.serving.executor.attached_adapters) <= 16


def test_a_quota_is_told_and_harms_nobody_else(make_swarm, tiny_llama, adapters):
    """A client beyond its part of a server's memory for adapters is refused with both numbers; its others go on."""
    swarm = make_swarm()
    size = sum(path.stat().st_size for path in adapters["small"].glob("*.safetensors"))
    swarm.add_server("0:6", adapter_bytes=4 * size)
    with distributed(swarm, adapters, max_wait_s=0.5) as model:
        expected = of_peft(tiny_llama, adapters["small"], 0, **GREEDY)[0]
        with model.inference_session(max_length=64, adapter_name="small") as session:
            ids = model.generate(PROMPTS[:1], session=session, do_sample=False, max_new_tokens=4, min_new_tokens=4)
            with pytest.raises(PeerBusy, match=r"takes \d+ bytes of memory here, limit \d+"):
                model.generate(PROMPTS[:1], adapter_name="lora", **GREEDY)
            rest = {**GREEDY, "max_new_tokens": 6, "min_new_tokens": 6}
            assert torch.equal(model.generate(ids, session=session, **rest)[0, -NEW_TOKENS:], expected)


def test_what_is_no_adapter_for_this_model_is_refused_at_once(shared, tiny_llama, adapters, tmp_path):
    """Before anything is sent, with the reason; names that nobody knows, too."""
    with distributed(shared, {"lora": adapters["lora"]}) as model:
        config = AutoConfig.from_pretrained(tiny_llama)
        config.num_hidden_layers = 3
        other = AutoModelForCausalLM.from_config(config)
        prefix = save_adapter(other, KINDS["prefix"](), tmp_path / "three", seed=1)
        spoiled = save_adapter(other, KINDS["small"](), tmp_path / "spoiled", seed=1)
        change_tensors(spoiled, lambda tensors: next(iter(tensors.values())).fill_(float("nan")))
        for path, reason in ((prefix, "3 layers"), (spoiled, "finite"), (tmp_path / "none", "no adapter")):
            with pytest.raises(AdapterError, match=reason):
                model.load_adapter(path, adapter_name="bad")
        with pytest.raises(InvalidRequest, match="no adapter 'nobody' is loaded"):
            model.generate(PROMPTS[:1], adapter_name="nobody", **GREEDY)
        assert model.generate(PROMPTS[:1], adapter_name="lora", **GREEDY).shape[1] == 6 + NEW_TOKENS


def test_a_server_brings_its_own_adapters(make_swarm, tiny_llama, adapters):
    """Those that it was started with are there before any client, announced, and preferred by routes."""
    swarm = make_swarm("0:6")
    server = swarm.add_server("0:6", adapters=(str(adapters["lora"]),))
    (digest,) = server.serving.adapters.values()
    swarm.loop.run(announce(server))
    with distributed(swarm, {"lora": adapters["lora"]}) as model:
        record = next(it for it in records_of(model) if it.peer_id == server.node.peer_id)
        assert [note.is_about(digest) for note in record.adapters] == [True] and record.adapters[0].max_rank == 8
        expected = of_peft(tiny_llama, adapters["lora"], 0, **GREEDY)[0]
        assert torch.equal(model.generate(PROMPTS[:1], adapter_name="lora", **GREEDY)[0, -NEW_TOKENS:], expected)
    assert not any(loader.num_uploaded_bytes for loader in loaders(swarm)[1:])


def records_of(model):
    service = model.block_service
    service._loop.run(service.peers.refresh(max_age_s=0.0))
    return service.peers.records


@pytest.mark.parametrize(
    ("kind", "lost"), [("lora", (1,)), ("prefix", (0, 1, 2)), ("deep", (1,)), ("prompt", (0,))], ids=str
)
def test_servers_that_are_lost_cost_no_token_of_an_adapter(make_swarm, adapters, kind, lost):
    """A left-padded batch with and without the adapter goes on as if nothing had happened."""
    swarm = make_swarm("0:2", "2:4", "4:6", "0:2", "2:4", "4:6")
    with distributed(swarm, {kind: adapters[kind]}) as model:
        expected = model.generate(PROMPTS, attention_mask=MASK, adapter_name=[kind, None, kind], **GREEDY)
        with model.inference_session(batch_size=3, max_length=32, adapter_name=[kind, None, kind]) as session:

            def lose() -> None:
                for peer_id in [session.route[index].peer_id for index in lost]:
                    remove(swarm, peer_id)

            tokens = model.generate(PROMPTS, attention_mask=MASK, session=session, streamer=At({3: lose}), **GREEDY)
            assert session.session.num_replays >= 1
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("options", [BEAMS, SAMPLING], ids=["beams", "sampling"])
def test_losses_change_nothing_under_beams_and_sampling(make_swarm, adapters, options):
    """One server after the other, in a batch of different adapters."""
    names = ["lora", None, "prefix"]
    swarm = make_swarm("0:3", "3:6", "0:3", "3:6")
    with distributed(swarm, adapters) as model:
        torch.manual_seed(7)
        expected = model.generate(PROMPTS, attention_mask=MASK, adapter_name=names, **options)
        rows = 3 * options.get("num_beams", 1)
        with model.inference_session(batch_size=rows, max_length=32, adapter_name=names) as session:
            step, count = session.session.step, iter(range(100))

            def losing(*args, **kwargs):
                if (number := next(count)) in (3, 6):
                    remove(swarm, session.route[number // 3 - 1].peer_id)
                return step(*args, **kwargs)

            session.session.step = losing
            torch.manual_seed(7)
            tokens = model.generate(PROMPTS, attention_mask=MASK, session=session, **options)
            assert session.session.num_replays == 2
    assert torch.equal(tokens, expected)


def test_an_adapter_is_had_by_its_digest_from_the_servers_that_hold_it(make_swarm, tiny_llama, adapters):
    """From several, each for its blocks; the one who fetched it can bring it to servers that never saw it."""
    swarm = make_swarm("0:3", "3:6")
    expected = of_peft(tiny_llama, adapters["lora"], 0, **GREEDY)[0]
    with distributed(swarm, {"mine": adapters["lora"]}) as model:
        digest, shards = model.adapter_digest("mine"), model.adapters["mine"].shards
        assert torch.equal(model.generate(PROMPTS[:1], adapter_name="mine", **GREEDY)[0, -NEW_TOKENS:], expected)
    with distributed(swarm) as model:
        model.load_adapter(digest.upper().replace("SHA", "sha"), adapter_name="theirs")
        assert model.adapter_digest("theirs") == digest and model.adapters["theirs"].shards == shards
        swarm.add_server("0:3")
        remove(swarm, swarm.servers[0].node.peer_id, politely=True)
        records_of(model)
        found = model.generate(PROMPTS[:1], adapter_name="theirs", **GREEDY)[0, -NEW_TOKENS:]
        assert torch.equal(found, expected) and loaders(swarm)[1].num_uploaded_bytes


def test_a_digest_that_nobody_has_is_an_error_of_its_own(make_swarm, adapters):
    """Nobody at all, or nobody for some blocks: the message says which; what is no digest is refused at once."""
    swarm = make_swarm("0:3", "3:6")
    with distributed(swarm, {"mine": adapters["lora"], "words": adapters["deep"]}) as model:
        digest = model.adapter_digest("mine")
        model.generate(PROMPTS[:1], adapter_name="mine", **GREEDY)
        model.generate(PROMPTS[:1], adapter_name="words", **GREEDY)
        with pytest.raises(AdapterError, match=r"no server has adapter sha256:0{12}…; 2 were asked"):
            model.load_adapter("sha256:" + "0" * 64, adapter_name="new")
        with pytest.raises(AdapterError, match="64 hexadecimal digits"):
            model.load_adapter("sha256:12", adapter_name="new")
        with pytest.raises(AdapterError, match="has embeddings, which servers don't keep"):
            model.load_adapter(model.adapter_digest("words"), adapter_name="new")
        swarm.add_server("3:6")
        remove(swarm, swarm.servers[1].node.peer_id, politely=True)
        records_of(model)
        with pytest.raises(AdapterError, match=rf"no server has what adapter {digest[:19]}… does to blocks 3:6"):
            model.load_adapter(digest, adapter_name="new")
        assert "new" not in model.adapters.names


def test_two_prompts_of_one_length_are_two_adapters(shared, tiny_llama, adapters, tmp_path):
    """They differ in nothing but their embeddings, which no server ever sees."""
    other = tmp_path / "other"
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    save_adapter(base, KINDS["prompt"](), other, seed=77)
    with distributed(shared, {"one": adapters["prompt"], "two": other}) as model:
        found = model.generate(PROMPTS, attention_mask=MASK, adapter_name=["one", "two", "two"], **GREEDY)
        for row, path in enumerate((adapters["prompt"], other, other)):
            assert torch.equal(found[row, -NEW_TOKENS:], of_peft(tiny_llama, path, row, **GREEDY)[0]), row
