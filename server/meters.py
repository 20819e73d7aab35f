"""What a server counts of its work: batches on the device thread, sessions on the loop.

    executor ──scheduled, ran, failed──► BatchMeter ──┐
    handler, sessions ──admitted, ended, ...──► SessionMeter ──┴─► metrics (Prometheus), describe (Info)

Plain numbers that only grow, each written by one thread and read by any. Pure: time enters as `now` or as a duration.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

from swarm.errors import SwarmError
from swarm.protocol import Forwarding, LinkDown, Message, Waiting
from swarm.server.host_pages import CopyPage, SwapIn, SwapOut
from swarm.server.load import LoadMeter
from swarm.server.scheduler import Batch
from swarm.server.work import Produced

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
LEFT = ("done", "PeerDisconnected", "CancelledError")
"""Ends of a session that are nobody's failure."""
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Histogram:
    """How often a value was at most each of `edges`, or above all of them.

    Args:
        edges: upper ends of the buckets, ascending.
    """

    def __init__(self, edges: Sequence[float]):
        self.edges = tuple(edges)
        self.counts = [0] * (len(self.edges) + 1)
        self.sum = 0.0

    @property
    def count(self) -> int:
        """Values so far."""
        return sum(self.counts)

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.edges, value)] += 1
        self.sum += value

    def cumulative(self) -> list[tuple[str, int]]:
        """Pairs of an edge, as text, and how many values were at most that; the last edge is "+Inf"."""
        pairs, total = [], 0
        for edge, count in zip((*map(str, self.edges), "+Inf"), self.counts, strict=True):
            total += count
            pairs.append((edge, total))
        return pairs


class BatchMeter:
    """What the device thread did."""

    def __init__(self) -> None:
        self.step_s = Histogram(SECONDS)
        """Seconds of each batch."""
        self.tokens = Histogram(TOKENS)
        """Tokens of each batch."""
        self.rows = Histogram(TOKENS)
        """Rows of each batch."""
        self.plain: dict[tuple[int, int], tuple[int, float]] = {}
        """Batches of nothing but decoding without adapters, by their rows and blocks: how many, and their seconds."""
        self.num_failed = 0
        """Batches that raised an error."""
        self.num_decode = 0
        """Tokens that were decoded one by one."""
        self.num_prompt = 0
        """Tokens that came several to a row."""
        self.num_cached = 0
        """Tokens that were known from another session's prompt, and not run."""
        self.num_copied = self.num_swapped_out = self.num_swapped_in = 0
        """Pages that were copied on write, moved to host memory, and moved back."""

    def scheduled(self, batch: Batch) -> None:
        """A batch was chosen, with what is to be told and moved before it runs."""
        for _, notice in batch.notices:
            if isinstance(notice, Produced):
                self.num_cached += notice.num_tokens
        for move in batch.moves:
            self.num_copied += isinstance(move, CopyPage)
            self.num_swapped_out += len(move.pages) if isinstance(move, SwapOut) else 0
            self.num_swapped_in += len(move.pages) if isinstance(move, SwapIn) else 0

    def ran(self, batch: Batch, seconds: float) -> None:
        """A batch has run; one without rows only moved pages."""
        if batch.rows:
            self.step_s.observe(seconds)
            self.tokens.observe(batch.num_tokens)
            self.rows.observe(len(batch.rows))
            self.num_decode += batch.num_decode
            self.num_prompt += batch.num_tokens - batch.num_decode
            if batch.num_decode == batch.num_tokens == len(batch.rows) and not batch.adapters.num_adapters:
                self._ran_plain(batch, seconds)

    def _ran_plain(self, batch: Batch, seconds: float) -> None:
        ways = {(row.chunk.entry, row.chunk.exit) for row in batch.rows}
        if len(ways) == 1:
            ((entry, end),) = ways
            key = len(batch.rows), end - entry
            count, total_s = self.plain.get(key, (0, 0.0))
            self.plain[key] = count + 1, total_s + seconds

    def failed(self) -> None:
        """A batch could not be run."""
        self.num_failed += 1


class SessionMeter:
    """What became of sessions and their work."""

    def __init__(self) -> None:
        self.load = LoadMeter()
        self.queue_s = Histogram(SECONDS)
        """How long each session's part of a batch waited for it."""
        self.num_tokens = 0
        self.num_opened = 0
        self.num_replays = 0
        """Sessions that came in the middle, because the server that had them was lost ..."""
        self.num_replayed = 0
        """... and the tokens that they brought along."""
        self.num_given = self.given_bytes = 0
        """Sessions that were handed to another server, and their size ..."""
        self.num_taken = self.taken_bytes = 0
        """... and those that came from one."""
        self.num_hops = 0
        """Receivers that were connected: next servers, or the client."""
        self.num_waits = 0
        """Times that a client was told that there is no room."""
        self.refused: Counter[str] = Counter()
        """Sessions that were not let in, by the kind of error."""
        self.ended: Counter[str] = Counter()
        """Sessions that are over, by the kind of error, or "done"."""
        self.links_down: Counter[str] = Counter()
        """Receivers that were lost, by the kind of fault."""

    @property
    def num_failed(self) -> int:
        """Sessions that ended with an error, other than that the client or this server went away."""
        return sum(count for kind, count in self.ended.items() if kind not in LEFT)

    def record(self, now: float, produced: Produced) -> None:
        """A batch did something for a session."""
        self.load.record(now, queue_s=produced.queue_s, compute_s=produced.compute_s, num_tokens=produced.num_tokens)
        self.queue_s.observe(produced.queue_s)
        self.num_tokens += produced.num_tokens

    def opened(self) -> None:
        """A session was let in."""
        self.num_opened += 1

    def refuse(self, error: SwarmError) -> None:
        """A session was not let in."""
        self.refused[type(error).__name__] += 1

    def end(self, error: BaseException | None) -> None:
        """A session is over."""
        self.ended["done" if error is None else type(error).__name__] += 1

    def replayed(self, num_tokens: int) -> None:
        """A session began here in the middle, with so many tokens in its first message."""
        self.num_replays += 1
        self.num_replayed += num_tokens

    def given(self, num_bytes: int) -> None:
        """A session was handed to another server."""
        self.num_given += 1
        self.given_bytes += num_bytes

    def took(self, num_bytes: int) -> None:
        """A session has come from another server."""
        self.num_taken += 1
        self.taken_bytes += num_bytes

    def told(self, message: Message) -> None:
        """A session's client was told something."""
        self.num_hops += isinstance(message, Forwarding)
        self.num_waits += isinstance(message, Waiting)
        if isinstance(message, LinkDown):
            self.links_down[message.fault.name] += 1
