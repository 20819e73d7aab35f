"""What a server is told to do; `swarm.server.plan` makes a plan of it."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from swarm.errors import ConfigError
from swarm.private.credentials import Credentials
from swarm.transport.relay import BYTES_PER_S
from swarm.types import BlockRange

RelayMode = Literal["auto", "always", "never"]
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSize:
    """Size of the KV cache, in tokens or in bytes; exactly one is given."""

    tokens: int | None = None
    num_bytes: int | None = None

    @classmethod
    def parse(cls, text: str) -> "CacheSize":
        """Read "16384" (tokens) or "2GiB", "512M" (bytes).

        Raises:
            ConfigError: for anything else.
        """
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG](?:IB|B)?|B)?", text.strip().upper())
        if match is None or not float(match[1]):
            raise ConfigError(f"{text!r} is not a cache size; write tokens (16384) or bytes (2GiB)")
        if match[2] is None:
            return cls(tokens=int(float(match[1])))
        return cls(num_bytes=int(float(match[1]) * _UNITS[match[2].rstrip("B").rstrip("I")]))


def parse_bytes(text: str) -> int:
    """Read a size of memory: "512MiB", "2G", "1000000"; "0" is none.

    Raises:
        ConfigError: for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)(?:IB|B)?", text.strip().upper())
    if match is None:
        raise ConfigError(f"{text!r} is not a size of memory; write bytes (1GiB, 512MiB), or 0 for none")
    return int(float(match[1]) * _UNITS[match[2]])


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """One server. `None` and "auto" are resolved once, by `swarm.server.plan`."""

    model: str
    """Embedded name, checkpoint directory or hub id."""
    blocks: BlockRange | None = None
    """Which blocks to serve; None lets the server choose, and move when the swarm gains by it."""
    num_blocks: int | None = None
    """How many blocks to choose; None takes as many as fit."""
    revision: str | None = None
    cache_dir: Path | None = None
    token: str | None = None
    initial_peers: tuple[str, ...] = ()
    """Full addresses of peers to join; none starts a new swarm."""
    host: str = "0.0.0.0"
    """Address to listen on."""
    port: int = 0
    """TCP port of the libp2p daemon; 0 picks a free one."""
    data_port: int = 0
    """TCP port of the direct data plane; 0 picks a free one."""
    announce: tuple[str, ...] = ()
    """Addresses to announce in place of those found."""
    relay: RelayMode = "auto"
    """Whether to be reached through other peers: auto asks some now and then whether they can connect to us."""
    relayed_bytes_per_s: float = BYTES_PER_S
    """What may be carried to and from peers that nobody can connect to; 0 carries nothing."""
    credentials: Credentials | None = None
    """Our invitation into a private swarm; there, `port` carries everything and nothing is downloaded."""
    public_name: str = ""
    identity_path: Path | None = None
    """File with the Ed25519 key; None makes a new identity."""
    device: str = "auto"
    dtype: str = "auto"
    quantization: str = "auto"
    cache_size: CacheSize = CacheSize(tokens=16384)
    history_bytes: int = 1 << 30
    """Memory for what was sent to next servers, for their replacements; 0 keeps nothing."""
    adapters: tuple[str, ...] = ()
    """Adapters to have from the start, and to keep: directories and hub ids."""
    adapter_bytes: int = 1 << 30
    """Host memory for adapters, and device memory for what of them does not lie in the KV cache; 0 takes none."""
    training_bytes: int = 1 << 30
    """Device memory for what training keeps between forward and backward; 0 takes no training."""
    threads: int | None = None
    """CPU threads for the blocks; None leaves torch's choice."""
    metrics_port: int | None = None
    """TCP port of the metrics for Prometheus; 0 picks a free one, None serves none."""
    metrics_host: str = "127.0.0.1"
    """Address on which the metrics are served."""
    announce_period_s: float = 20.0
    """How often the record is renewed; it expires after three periods."""
    drain_timeout_s: float = 30.0
    """How long a server that was told to stop waits for its sessions to move elsewhere; 0 doesn't."""
