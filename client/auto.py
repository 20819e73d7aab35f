"""`from swarm import AutoDistributedModelForCausalLM`: one call from a model's name to a model that generates.

    from_pretrained ─► swarm.checkpoint.resolve ─► swarm.client.runtime.connect ─► swarm.client.model.distribute

Knows nothing of how any of the three does its work.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from swarm.checkpoint.source import DEFAULT_MODEL, Checkpoint, resolve
from swarm.client.cache import BlockService
from swarm.client.config import SessionConfig
from swarm.client.generation import DistributedModel
from swarm.client.head import HeadFormat
from swarm.client.model import distribute
from swarm.errors import InvalidRequest
from swarm.private.credentials import Credentials


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
            session_config: a `swarm.client.config.SessionConfig`: patience, wire encoding, whether servers push.

        Returns:
            A `transformers.GenerationMixin`, in eval mode; close it, or use it as a context manager.

        Raises:
            UnknownModel, UnsupportedModel, CheckpointMismatch, InvalidRequest, ConfigError: about the arguments.
            PeerUnreachable: no initial peer answers.
            AccessDenied: the swarm is private, and we have no invitation that is good.
        """
        local_dtype = _dtype(dtype)
        if credentials is not None and not isinstance(credentials, Credentials):
            credentials = Credentials.load(credentials)
        if credentials is not None and not initial_peers:
            initial_peers = credentials.peers
        if block_service is None and not initial_peers:
            raise InvalidRequest("initial_peers is empty: give the address of at least one peer of the swarm")
        if isinstance(initial_peers, str):
            raise InvalidRequest(f"initial_peers must be a list of addresses, got the string {initial_peers!r}")
        checkpoint = resolve(
            model, revision=revision, cache_dir=cache_dir, token=token, is_offline=credentials is not None
        )
        service = block_service or _connect(checkpoint, initial_peers, session_config, credentials)
        try:
            return distribute(checkpoint, service, dtype=local_dtype, device=device, head=head_dtype)
        except BaseException:
            service.close()
            raise


def _connect(
    checkpoint: Checkpoint,
    initial_peers: Sequence[str],
    session_config: SessionConfig | None,
    credentials: Credentials | None,
) -> BlockService:
    from swarm.client.runtime import connect

    text = checkpoint.config().get_text_config(decoder=True)
    return connect(
        checkpoint,
        num_blocks=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        initial_peers=initial_peers,
        config=session_config,
        credentials=credentials,
    )


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InvalidRequest(f"dtype {dtype!r} is not a floating type of torch (float32, bfloat16, float16)")
    return found
