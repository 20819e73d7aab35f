"""`from swarm import AutoDistributedModelForCausalLM`: one call from a model's name to a model that generates.

    from_pretrained ─► swarm.checkpoint.resolve ─► connect_to ─► swarm.client.model.distribute

Knows nothing of how any of the three does its work.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from swarm.checkpoint.source import DEFAULT_MODEL, Checkpoint, resolve
from swarm.client.cache import BlockService
from swarm.client.config import SessionConfig
from swarm.client.generation import DistributedModel
from swarm.client.head import HeadFormat
from swarm.client.model import distribute
from swarm.errors import InvalidRequest
from swarm.identity import Identity
from swarm.private.credentials import Credentials

if TYPE_CHECKING:
    from swarm.client.runtime import SwarmService


class AutoDistributedModelForCausalLM:
    """A causal language model whose transformer blocks run on the servers of a swarm.

    model = AutoDistributedModelForCausalLM.from_pretrained("smollm2-135m-instruct", initial_peers=["/ip4/.../p2p/..."])
    with model:
        model.generate(input_ids, max_new_tokens=32)
    """

    def __init__(self) -> None:
        raise TypeError("use AutoDistributedModelForCausalLM.from_pretrained(model, initial_peers=[...])")

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = DEFAULT_MODEL,
        *,
        initial_peers: Sequence[str] = (),
        block_service: BlockService | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        head_dtype: HeadFormat = "auto",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | None = None,
        session_config: SessionConfig | None = None,
        credentials: Credentials | str | Path | None = None,
    ) -> DistributedModel:
        """Load the embeddings, norms and head of a model and join the swarm that runs its blocks.

        Args:
            model: embedded name, checkpoint directory or hub id (only weight files with the local part are downloaded).
            initial_peers: full addresses (/ip4/.../tcp/.../p2p/...) of any peers of the swarm.
            block_service: use these blocks instead of a swarm's; it is closed with the model.
            dtype: of the local part ("float32", torch.bfloat16, ...); the checkpoint's own by default.
            device: of the local part.
            head_dtype: number format of the output matrix; "auto" keeps `dtype`, anything narrower is approximate.
            revision: branch, tag or commit of a hub id.
            cache_dir: where converted and downloaded files are kept.
            token: for models on the hub that need one.
            credentials: our invitation into a private swarm, or its file; then initial_peers may be left to it, and
                nothing is downloaded.
            session_config: a `swarm.client.config.SessionConfig`: patience, wire encoding, whether servers push, and
                whether sessions move to quicker ones.

        Returns:
            A `transformers.GenerationMixin`, in eval mode; close it, or use it as a context manager.

        Raises:
            UnknownModel, UnsupportedModel, CheckpointMismatch, InvalidRequest, ConfigError: about the arguments.
            PeerUnreachable: no initial peer answers.
            AccessDenied: the swarm is private, and we have no invitation that is good.
        """
        local = {"dtype": _dtype(dtype), "device": device, "head": head_dtype}
        return _open(
            model, initial_peers, credentials, block_service, session_config, revision, cache_dir, token, local
        )


class AutoDistributedModelForSequenceClassification:
    """A model that gives whole sequences labels: blocks on servers of a swarm, a head (`score`) here, to be trained.

    model = AutoDistributedModelForSequenceClassification.from_pretrained(name, initial_peers=[...], num_labels=2)
    """

    def __init__(self) -> None:
        raise TypeError("use AutoDistributedModelForSequenceClassification.from_pretrained(model, initial_peers=[...])")

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = DEFAULT_MODEL,
        *,
        num_labels: int | None = None,
        id2label: Mapping[int, str] | None = None,
        label2id: Mapping[str, int] | None = None,
        problem_type: str | None = None,
        initial_peers: Sequence[str] = (),
        credentials: Credentials | str | Path | None = None,
        block_service: BlockService | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | None = None,
        session_config: SessionConfig | None = None,
    ) -> DistributedModel:
        """Load the embeddings and norms of a model, make a head for labels, and join the swarm that runs its blocks.

        A head that the checkpoint has is loaded; another one begins with transformers' random numbers.

        Args:
            num_labels, id2label, label2id, problem_type: of transformers' config; what isn't given is the checkpoint's.
            model, initial_peers, ...: as for AutoDistributedModelForCausalLM.

        Raises:
            as AutoDistributedModelForCausalLM.
        """
        given = {"num_labels": num_labels, "id2label": id2label, "label2id": label2id, "problem_type": problem_type}
        if num_labels is not None and num_labels < 1:
            raise InvalidRequest(f"num_labels is {num_labels}, need at least 1")
        labels = {name: value for name, value in given.items() if value is not None}
        local = {"dtype": _dtype(dtype), "device": device, "labels": labels}
        return _open(
            model, initial_peers, credentials, block_service, session_config, revision, cache_dir, token, local
        )


def _open(
    model: str | Path,
    initial_peers: Sequence[str],
    credentials: Credentials | str | Path | None,
    block_service: BlockService | None,
    session_config: SessionConfig | None,
    revision: str | None,
    cache_dir: str | Path | None,
    token: str | None,
    local: Mapping[str, Any],
) -> DistributedModel:
    """Find the checkpoint, join the swarm that has its blocks, and load the rest here; `local` is for `distribute`."""
    if credentials is not None and not isinstance(credentials, Credentials):
        credentials = Credentials.load(credentials)
    if credentials is not None and not initial_peers:
        initial_peers = credentials.peers
    if block_service is None and not initial_peers:
        raise InvalidRequest("initial_peers is empty: give the address of at least one peer of the swarm")
    if isinstance(initial_peers, str):
        raise InvalidRequest(f"initial_peers must be a list of addresses, got the string {initial_peers!r}")
    checkpoint = resolve(model, revision=revision, cache_dir=cache_dir, token=token, is_offline=credentials is not None)
    if block_service is None:
        block_service = connect_to(checkpoint, initial_peers, config=session_config, credentials=credentials)
    try:
        return distribute(checkpoint, block_service, **local)
    except BaseException:
        block_service.close()
        raise


def connect_to(
    checkpoint: Checkpoint,
    initial_peers: Sequence[str],
    identity: Identity | None = None,
    *,
    config: SessionConfig | None = None,
    credentials: Credentials | None = None,
) -> "SwarmService":
    """Join a swarm as a client of a checkpoint's blocks; arguments and errors as `swarm.client.runtime.connect`."""
    from swarm.client.runtime import connect

    text = checkpoint.config().get_text_config(decoder=True)
    return connect(
        checkpoint,
        num_blocks=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        initial_peers=initial_peers,
        config=config,
        identity=identity,
        credentials=credentials,
    )


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InvalidRequest(f"dtype {dtype!r} is not a floating type of torch (float32, bfloat16, float16)")
    return found
