"""What is known of a swarm at one moment: the words that the page, the API and the metrics share.

Plain frozen values without behaviour but derived facts; `compose` makes them, everything else reads them. Fields are
documented here, and from here in the API's OpenAPI document. Times are unix seconds, durations say their unit.
"""

from enum import StrEnum
from typing import Annotated

import msgspec

from swarm.types import BlockRange


class Status(StrEnum):
    """How a server stands."""

    ONLINE = "online"
    """It takes sessions, and answered when it was asked last."""
    JOINING = "joining"
    """It loads its blocks."""
    DRAINING = "draining"
    """It takes no new sessions and is about to leave."""
    UNREACHABLE = "unreachable"
    """It announces itself, but did not answer this page."""
    GONE = "gone"
    """It announces itself no more; shown for a while."""


class Reach(StrEnum):
    """How this page reaches a server."""

    DIRECT = "direct"
    """Over a TCP connection of its own."""
    P2P = "p2p"
    """Through libp2p: slower."""
    RELAY = "relay"
    """Through another peer, since nobody can connect to it: slower."""
    NONE = "none"
    """Not at all."""
    UNKNOWN = "unknown"
    """It was not asked yet."""


class Verdict(StrEnum):
    """Whether a model can be used."""

    USABLE = "usable"
    """Every block is served by two servers or more."""
    AT_RISK = "at risk"
    """Every block is served, but some by one server only."""
    FAILING = "failing"
    """Every block is served, but the last canary did not come back."""
    INCOMPLETE = "incomplete"
    """Some blocks are served by nobody."""


def _field(text: str) -> msgspec.Meta:
    return msgspec.Meta(description=text)


class Value(msgspec.Struct, frozen=True, kw_only=True):
    """Base of everything in a state."""


class Link(Value, frozen=True):
    """A round trip between a server and another one."""

    peer_id: Annotated[str, _field("The other server.")]
    rtt_ms: Annotated[float, _field("Round trip in milliseconds, as the server measured it.")]


class Adapter(Value, frozen=True):
    """An adapter that a server announces."""

    short: Annotated[str, _field("First 8 hexadecimal digits of its digest.")]
    max_rank: Annotated[int, _field("Largest rank in the server's blocks, rounded up to a multiple of 8; 0 for none.")]
    on_device: Annotated[bool, _field("Whether it lies on the device, not in host memory alone.")]

    @property
    def label(self) -> str:
        """Hash and rank."""
        return f"{self.short} r{self.max_rank}" if self.max_rank else self.short


class Server(Value, frozen=True):
    """One server of a model. What it says of itself is not proven, but was checked for form and range."""

    peer_id: Annotated[str, _field("Its identity.")]
    name: Annotated[str, _field("Chosen by its owner; may be empty.")]
    start: Annotated[int, _field("First block that it serves.")]
    end: Annotated[int, _field("Block after the last one that it serves.")]
    status: Annotated[Status, _field("How it stands.")]
    reach: Annotated[Reach, _field("How this page reaches it.")]
    quantization: Annotated[str, _field("none, int8 or nf4.")]
    dtype: Annotated[str, _field("Number format of its weights and outputs.")]
    version: Annotated[str, _field("Of its software.")]
    decode_tps: Annotated[float, _field("Announced tokens per second through one block, one row at a time.")]
    load: Annotated[float, _field("Share of its capacity in use, 0 to 1.")]
    kv_free_tokens: Annotated[int, _field("Tokens that its KV cache has room for.")]
    seen_at: Annotated[float, _field("When its record was seen last.")]
    rtt_ms: Annotated[float | None, _field("Round trip from this page in milliseconds.")] = None
    kv_total_tokens: Annotated[int | None, _field("Tokens that its KV cache holds in all.")] = None
    tokens_per_s: Annotated[float | None, _field("Tokens of all sessions through its blocks lately.")] = None
    queue_ms: Annotated[float | None, _field("How long tokens waited for their batch lately, on average.")] = None
    step_ms: Annotated[float | None, _field("How long that batch took, on average.")] = None
    num_sessions: Annotated[int | None, _field("Sessions that are open.")] = None
    num_waiting: Annotated[int | None, _field("Sessions whose work waits for room in the cache.")] = None
    num_tokens: Annotated[int | None, _field("Tokens that ran through its blocks since it started.")] = None
    num_opened: Annotated[int | None, _field("Sessions that it let in since it started.")] = None
    num_failed: Annotated[int | None, _field("Sessions among them that ended with an error.")] = None
    uptime_s: Annotated[float | None, _field("Since when it serves, in seconds.")] = None
    links: Annotated[tuple[Link, ...], _field("Round trips to other servers.")] = ()
    adapters: Annotated[
        tuple[Adapter, ...], _field("Adapters that it announces: those on the device, then the most recently used.")
    ] = ()
    trouble: Annotated[str | None, _field("Why it did not answer.")] = None

    @property
    def blocks(self) -> BlockRange:
        """What it serves."""
        return BlockRange(self.start, self.end)

    @property
    def label(self) -> str:
        """Its name, or the end of its identity."""
        return self.name or f"…{self.peer_id[-8:]}"

    @property
    def num_attached(self) -> int:
        """Announced adapters on its device."""
        return sum(adapter.on_device for adapter in self.adapters)

    @property
    def is_serving(self) -> bool:
        """Whether a client can use it now."""
        return self.status is Status.ONLINE


class CanaryHop(Value, frozen=True):
    """One server on a canary's way."""

    peer_id: str
    name: str
    start: int
    end: int


class Canary(Value, frozen=True):
    """The last time that this page sent a token through all blocks of a model."""

    at: Annotated[float, _field("When it was sent.")]
    ok: Annotated[bool, _field("Whether it came back.")]
    has_text: Annotated[bool, _field("A real token; if false, made-up hidden states through all blocks.")]
    first_ms: Annotated[float | None, _field("Milliseconds to the first token: route, sessions, prompt.")] = None
    next_ms: Annotated[float | None, _field("Milliseconds for the token after it.")] = None
    text: Annotated[str | None, _field("What the model said.")] = None
    route: Annotated[tuple[CanaryHop, ...], _field("The servers that it went through.")] = ()
    error: Annotated[str | None, _field("Why it did not come back.")] = None


class Model(Value, frozen=True):
    """A model and who serves it."""

    digest: Annotated[str, _field("Content digest of the checkpoint: what a model is known by.")]
    name: Annotated[str, _field("What people call it.")]
    num_blocks: Annotated[int, _field("Transformer blocks that it has.")]
    verdict: Annotated[Verdict, _field("Whether it can be used.")]
    reason: Annotated[str, _field("Why, in a few words.")]
    replicas: Annotated[tuple[int, ...], _field("For each block, how many servers serve it now.")]
    missing: Annotated[str, _field("Ranges of blocks that nobody serves, as 3:6, 9:10.")]
    room_tokens: Annotated[int, _field("Tokens of KV cache that are free on the block that has least.")]
    tokens_per_s: Annotated[float, _field("Tokens per second lately: the median over blocks, each of which sees all.")]
    num_sessions: Annotated[int, _field("Open sessions, in the same way.")]
    num_waiting: Annotated[int, _field("Sessions that wait for room, on all servers.")]
    servers: Annotated[tuple[Server, ...], _field("In order of their blocks.")]
    num_unlisted: Annotated[int, _field("Servers beyond the limit of this list.")] = 0
    canary: Annotated[Canary | None, _field("The last token that was sent through; null before the first.")] = None

    @property
    def serving(self) -> tuple[Server, ...]:
        """Servers that a client can use now."""
        return tuple(server for server in self.servers if server.is_serving)

    @property
    def is_usable(self) -> bool:
        """Whether a client gets an answer now."""
        return self.verdict in (Verdict.USABLE, Verdict.AT_RISK)

    @property
    def num_covered(self) -> int:
        """Blocks that somebody serves."""
        return sum(count > 0 for count in self.replicas)


class State(Value, frozen=True):
    """A swarm at one moment, as this page sees it."""

    at: Annotated[float, _field("When it was looked at.")]
    version: Annotated[str, _field("Of this page's software.")]
    peer_id: Annotated[str, _field("This page's own identity.")]
    dht_peers: Annotated[int, _field("Peers in this page's routing table.")]
    refresh_ms: Annotated[float, _field("How long looking took, in milliseconds.")]
    stale_s: Annotated[float, _field("How old the records are because the DHT does not answer; 0 when it does.")]
    models: Annotated[tuple[Model, ...], _field("Those of most servers first.")] = ()

    def model(self, digest: str) -> Model | None:
        """The model of this digest, or of the only one that begins so."""
        found = [model for model in self.models if model.digest.startswith(digest)]
        return found[0] if len(found) == 1 else None
