"""What a server will do: its configuration with every "auto" but the blocks resolved against machine and model.

ServerConfig ─resolve, choose─► Plan ─► swarm.server.tenancy       (which blocks: swarm.server.mover, in the swarm)
"""

from dataclasses import dataclass

import torch

from swarm.checkpoint.source import Checkpoint, resolve
from swarm.errors import ConfigError
from swarm.server.config import ServerConfig
from swarm.types import BlockRange

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A ServerConfig with every "auto" resolved against the machine and the model."""

    checkpoint: Checkpoint
    num_blocks: int
    blocks: BlockRange
    """To be served; all, as long as it is not chosen which (`is_auto`)."""
    is_auto: bool
    """Whether the server chooses its blocks itself."""
    device: torch.device
    dtype: torch.dtype
    quantization: str


def make_plan(config: ServerConfig) -> Plan:
    """Resolve the model and every "auto".

    Raises:
        UnknownModel: no such model.
        ConfigError: a device, dtype or block range that can't be.
    """
    checkpoint = resolve(
        config.model,
        revision=config.revision,
        cache_dir=config.cache_dir,
        token=config.token,
        is_offline=config.credentials is not None,
    )
    text_config = checkpoint.config().get_text_config()
    num_blocks = int(text_config.num_hidden_layers)
    blocks = config.blocks or BlockRange(0, num_blocks)
    if config.num_blocks is not None and config.blocks is not None:
        raise ConfigError("give --blocks or --num-blocks, not both")
    if config.num_blocks is not None and config.num_blocks > num_blocks:
        raise ConfigError(f"--num-blocks is {config.num_blocks}, {checkpoint.name} has {num_blocks} blocks")
    if blocks.end > num_blocks:
        raise ConfigError(f"blocks {blocks} are outside {checkpoint.name}, which has blocks 0:{num_blocks}")
    device = _choose_device(config.device)
    quantization = config.quantization
    if quantization == "auto":
        quantization = "int8" if device.type == "cuda" else "none"
    return Plan(
        checkpoint=checkpoint,
        num_blocks=num_blocks,
        blocks=blocks,
        is_auto=config.blocks is None,
        device=device,
        dtype=_choose_dtype(config.dtype, device, getattr(text_config, "dtype", None)),
        quantization=quantization,
    )


def _choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {name!r}; use cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} can't serve blocks; use cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name} asked, but torch finds {torch.cuda.device_count()} CUDA devices here")
    return device


def _choose_dtype(name: str, device: torch.device, stored: torch.dtype | None) -> torch.dtype:
    """On CPU fp32: exact and, without AMX, fastest. Elsewhere what the checkpoint holds, at most 16 bits."""
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    return stored if stored in (torch.float16, torch.bfloat16) else torch.bfloat16
