"""What a session machine wants done: the words between `swarm.session.Session` and whoever drives it.

    Session.next_action ─► FindRoute | Open | Connect | Send | Wait | Done ─► driver

Plain values. How an action is carried out, and what follows from that, is said elsewhere.
"""

from dataclasses import dataclass

import torch

from swarm.step_chunk import StepChunk
from swarm.types import BlockRange, Hop


@dataclass(frozen=True, slots=True, kw_only=True)
class FindRoute:
    """Find servers for these blocks and report them with `routed`."""

    blocks: BlockRange


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """Open a session with this server and report with `opened` or `failed`; see also `Session.pending_opens`."""

    link: int
    hop: Hop
    is_last: bool
    """Whether its outputs are the client's from the start; the outputs of any other wait for a `Connect`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Connect:
    """Tell the server of `link` that its outputs go to the server of link `target`, or (None) to the client.

    The other fields mean what they mean in `swarm.protocol.Forward`. Nothing is reported, unless the server says that
    it can't: `link_down`.
    """

    link: int
    epoch: int
    target: int | None
    held: tuple[int, ...]
    as_of: int
    max_step_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    """Send this chunk to the server of `link`. Nothing is reported, unless it fails: `failed`."""

    link: int
    hop: Hop
    chunk: StepChunk


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Everything is sent: wait for results or bad news."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The step is complete; `outputs` is [sum(num_outputs), hidden], row after row."""

    outputs: torch.Tensor


Action = FindRoute | Open | Connect | Send | Wait | Done
