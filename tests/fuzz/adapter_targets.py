"""Readers of adapters and of training: manifests, shards, parts, PEFT's files, micro-batches and their gradients."""

import asyncio
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import torch
from safetensors.torch import save

from swarm.adapters import peft
from swarm.adapters.format import Manifest, ShardInfo, decode_shard, encode_shard
from swarm.adapters.layout import BlockShape, LinearShape, ModelLayout
from swarm.adapters.notes import AdapterNote, pack_notes, unpack_notes
from swarm.adapters.transfer import Assembly
from swarm.client.config import SessionConfig
from swarm.client.parameters import Parameters
from swarm.client.training import RemoteTraining
from swarm.codec import decode_tensor, encode_tensor
from swarm.errors import PeerUnreachable
from swarm.protocol import (
    AdapterPart,
    DType,
    Message,
    OpenTraining,
    TrainBackward,
    TrainForget,
    TrainForward,
    TrainGradients,
    TrainLink,
    TrainLost,
    TrainOutputs,
    decode,
    encode,
)
from swarm.server.limits import TrainingLimits
from swarm.server.push import PushStream
from swarm.server.trainer import Back, Forth, Result
from swarm.server.training_run import ServedTraining
from swarm.training import MicroBatch
from swarm.transport import EndOfStream
from swarm.types import BlockRange
from tests.adapters import HIDDEN, make_adapter, shape
from tests.fuzz.target import Target, framed, pieces

BLOCKS = BlockRange(0, 2)
WIDTH = 6
LAYOUT = ModelLayout(
    blocks_path="model.layers",
    blocks=(
        BlockShape(
            hidden_size=WIDTH,
            linears={"self_attn.q_proj": LinearShape(num_inputs=WIDTH, num_outputs=4)},
            kv_shape=(2, 2, 2),
        ),
    )
    * 2,
)


# --- an adapter from a peer ---


def manifest(data: bytes) -> None:
    """Whatever has the right hash: what was read is well-formed, and is written as it was."""
    found = Manifest.decode(data, digest=sha256(data).hexdigest())
    blocks = [info.block for info in found.shards]
    assert blocks == sorted(set(blocks)) and all(block < found.num_blocks for block in blocks)
    assert Manifest.decode(found.encode(), digest=found.digest) == found


def manifest_seeds() -> list[bytes]:
    return [make_adapter(1.0, num_virtual=count).manifest.encode() for count in (0, 3)]


def shard(data: bytes) -> None:
    """How many numbers were declared, how many virtual positions, then a shard of the right hash."""
    elements, num_virtual, rest = int.from_bytes(data[:2], "big"), data[2] if len(data) > 2 else 0, bytearray(data[3:])
    info = ShardInfo(0, sha256(rest).hexdigest(), len(rest), 0, elements)
    found = decode_shard(rest, info, shape(), num_virtual)
    tensors = found.tensors()
    assert sum(tensor.numel() for tensor in tensors) == elements
    assert all(torch.isfinite(tensor).all() for tensor in tensors)
    assert encode_shard(found)


def shard_seeds() -> list[bytes]:
    adapters = (make_adapter(1.0, blocks=[0]), make_adapter(2.0, blocks=[0], rank=0))
    return [it.manifest.shards[0].num_elements.to_bytes(2, "big") + b"\0" + it.shards[0] for it in adapters]


def parts(data: bytes) -> None:
    """A series of parts: what comes whole has the size that was expected, and nothing else takes memory."""
    assembly, sizes = Assembly(with_manifest=bool(data[:1] > b"\x7f")), {0: 10, 3: 700}
    for block, size in sizes.items():
        assembly.expect(block, size)
    both = pieces(data[1:])
    for meta, body in zip(both[::2], both[1::2], strict=False):
        part = decode(meta)
        if isinstance(part, AdapterPart) and (whole := assembly.take(part, body)) is not None:
            assert whole[0] is None or len(whole[1]) == sizes.pop(whole[0])


def parts_seeds() -> list[bytes]:
    one = [encode(AdapterPart(block=0, offset=0, num_bytes=10)), bytes(10)]
    two = [[encode(AdapterPart(block=3, offset=at, num_bytes=700)), bytes(350)] for at in (0, 350)]
    first = [encode(AdapterPart(block=None, offset=0, num_bytes=5)), bytes(5)]
    return [b"\0" + framed([*one, *two[0], *two[1]]), b"\xff" + framed([*first, *one])]


def notes(data: bytes) -> None:
    """What was read is written as it was."""
    assert pack_notes(unpack_notes(data)) == data


def notes_seeds() -> list[bytes]:
    return [pack_notes([AdapterNote.of("ab" * 32, rank, on_device=bool(rank)) for rank in (0, 8, 900)]), b"\0"]


# --- an adapter of the hub ---


def peft_files(data: bytes) -> None:
    """A directory as PEFT writes it: an adapter for this model, or a refusal."""
    end = 2 + int.from_bytes(data[:2], "big")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "adapter_config.json").write_bytes(data[2:end])
        (directory / "adapter_model.safetensors").write_bytes(data[end:])
        found = peft.read_adapter(directory, layout=LAYOUT)
    assert set(found.shards) <= {0, 1} and found.manifest.hidden_size == WIDTH


def peft_seeds() -> list[bytes]:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    lora = {name.format("A"): torch.ones(2, WIDTH), name.format("B"): torch.ones(4, 2)}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    prompt = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2, "task_type": "CAUSAL_LM", "token_dim": WIDTH}
    virtual = {"prompt_embeddings": torch.ones(2, WIDTH)}
    both = ((config, lora), (prompt, virtual))
    return [framed([msgspec.json.encode(fields)]) + save(tensors) for fields, tensors in both]


# --- training ---


class _Stream:
    """Brings messages, in pairs of meta and body, and then ends."""

    peer_id = account = "a client"

    def __init__(self, data: bytes) -> None:
        both = pieces(data)
        self._messages: Iterator[tuple[bytes, bytes]] = zip(both[::2], both[1::2], strict=False)

    async def receive(self, timeout_s: float) -> tuple[Message, memoryview]:
        """The next one."""
        for meta, body in self._messages:
            return decode(meta), memoryview(bytearray(body))
        raise EndOfStream


class _Executor:
    """Runs micro-batches at once: outputs are the inputs."""

    span = SimpleNamespace(
        blocks=BLOCKS, hidden_size=HIDDEN, max_positions=64, shape=lambda block: shape(), device=torch.device("cpu")
    )
    good_tokens = 16

    def __init__(self) -> None:
        self.trainer = self
        self._tell: Callable[[Result], None] = lambda result: None

    def new_run(self, client: str, blocks: BlockRange, tell: Callable[[Result], None]) -> object:
        self._tell = tell
        return object()

    def train(self, command: Callable[[Any], None]) -> None:
        command(self)

    def forth(self, run: object, number: int, part: Any, *, keep: bool) -> None:
        assert part.hidden_states.shape == (sum(part.lengths), HIDDEN)
        self._tell(Forth(number=number, outputs=part.hidden_states, is_kept=keep))

    def back(self, run: object, number: int, gradients: torch.Tensor) -> None:
        assert torch.isfinite(gradients).all()
        self._tell(Back(number=number, input_gradients=gradients, deltas={}))

    def forget(self, run: object, numbers: tuple[int, ...]) -> None:
        """Nothing is kept here."""


@cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


async def _nowhere(peer_id: str) -> PushStream:
    raise PeerUnreachable(peer_id)


def train_requests(data: bytes) -> None:
    """A series of messages to one run at a server: its books stay within its limits."""
    limits = TrainingLimits(max_parameter_bytes=1 << 12)
    opened = OpenTraining(push_key=bytes(16), model="ab" * 32, start=BLOCKS.start, end=BLOCKS.end)
    stream, executor = cast(Any, _Stream(data)), cast(Any, _Executor())
    served = ServedTraining(stream, opened, executor=executor, open_push=_nowhere, limits=limits)
    try:
        _loop().run_until_complete(served._read())
    finally:
        _loop().run_until_complete(served._links.close())
        assert not served._pending
        assert served._versions.num_bytes <= limits.max_parameter_bytes


def _parameters(version: int = 1, scale: float = 1.0) -> Parameters:
    made = make_adapter(scale)
    elements = {info.block: info.num_elements for info in made.manifest.shards}
    return Parameters(version=version, manifest=made.manifest, shards=made.shards, num_elements=elements)


def train_request_seeds() -> list[bytes]:
    spec, body = encode_tensor(torch.ones(3, HIDDEN))
    parameters, bytes_of = _parameters().message(BLOCKS, 1)
    forward = TrainForward(micro_batch=0, version=-1, num_tokens=(1, 2), keep=True, hidden_states=spec)
    backward = TrainBackward(micro_batch=0, gradients=spec, wants_inputs=True)
    forget = TrainForget(micro_batches=(0,), versions=(1,))
    with_version = msgspec.structs.replace(forward, version=1)
    second, difference = _parameters(version=2, scale=1.01).message(BLOCKS, 2, _parameters(), 1)
    assert second.base == 1
    link = TrainLink(peer_id="p", push_key=bytes(16))
    return [
        framed([encode(forward), bytes(body), encode(backward), bytes(body)]),
        framed([encode(parameters), bytes_of, encode(with_version), bytes(body), encode(forget), b""]),
        framed([encode(link), b"", encode(parameters), bytes_of, encode(second), difference]),
    ]


class _Chain:
    """One hop that takes everything."""

    hops = (SimpleNamespace(peer_id="p", blocks=BLOCKS),)
    links: frozenset[int] = frozenset()

    def __init__(self) -> None:
        self.versions: dict[int, int] = {}

    def post(self, hop: int, message: Message, body: bytes | memoryview = b"") -> None:
        """It is on its way."""


def train_answers(data: bytes) -> None:
    """A series of answers of one hop to a client: counted once, or the hop's fault."""
    training = RemoteTraining(cast(Any, None), cast(Any, None), blocks=BLOCKS, config=SessionConfig())
    training._chain, training._parameters = cast(Any, _Chain()), {1: _parameters()}
    training.pipeline.chain_opened(1)
    micros = [
        MicroBatch(num_tokens=(3,), version=version, inputs=encode_tensor(torch.ones(3, HIDDEN)), wants_gradients=True)
        for version in (-1, 1)
    ]
    for micro in micros:
        micro.output_gradients = encode_tensor(torch.ones(3, HIDDEN))
    training.pipeline.add(micros)
    training._pump()
    both = pieces(data)
    for meta, body in zip(both[::2], both[1::2], strict=False):
        training.on_message(0, decode(meta), memoryview(bytearray(body)))
        for micro in micros:
            for found in (micro.outputs, micro.input_gradients):
                assert found is None or (found[0].shape, found[0].dtype) == ((3, HIDDEN), DType.FLOAT32)
                assert found is None or decode_tensor(*found).shape == (3, HIDDEN)
            sizes = [numbers.numel() for found in micro.parameter_gradients.values() for numbers in found.values()]
            assert not sizes or sizes == [_parameters().num_elements[block] for block in range(2)]


def train_answer_seeds() -> list[bytes]:
    spec, body = encode_tensor(torch.ones(3, HIDDEN))
    count = sum(_parameters().num_elements.values())
    forth = [TrainOutputs(micro_batch=number, is_kept=True, hidden_states=spec) for number in range(2)]
    plain = TrainGradients(micro_batch=0, gradients=spec, num_parameters=0)
    whole = TrainGradients(micro_batch=1, gradients=spec, num_parameters=count)
    outputs = [part for message in forth for part in (encode(message), bytes(body))]
    return [
        framed([*outputs, encode(plain), bytes(body), encode(whole), bytes(body) + bytes(4 * count)]),
        framed([*outputs, encode(TrainLost(micro_batch=0)), b""]),
    ]


ADAPTER_TARGETS = {
    "adapter_manifest": Target(run=manifest, seeds=manifest_seeds),
    "adapter_shard": Target(run=shard, seeds=shard_seeds),
    "adapter_parts": Target(run=parts, seeds=parts_seeds),
    "adapter_notes": Target(run=notes, seeds=notes_seeds),
    "peft_files": Target(run=peft_files, seeds=peft_seeds),
    "train_requests": Target(run=train_requests, seeds=train_request_seeds),
    "train_answers": Target(run=train_answers, seeds=train_answer_seeds),
}
