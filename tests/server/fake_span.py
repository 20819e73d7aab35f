"""A span without layers that stores what it is given in pages: any mix-up of pages gives wrong outputs."""

from dataclasses import dataclass, field

import torch

from swarm.server.blocks.step import Chunk
from swarm.server.pages import PAGE_SIZE
from swarm.types import BlockRange

BLOCKS = BlockRange(0, 4)
HIDDEN = 2


class FakeState:
    """What a recurrent block would keep of a sequence: the sum of its tokens."""

    num_bytes = 8

    def __init__(self):
        self.total = 0.0
        self.is_parked = False

    def fork(self):
        other = FakeState()
        other.total, other.is_parked = self.total, self.is_parked
        return other


@dataclass(frozen=True)
class FakeDelta:
    """What an adapter does: its rows' outputs grow by `value`, as long as its pages hold what was put there."""

    value: float
    num_pages: int = 1
    linears: dict = field(default_factory=dict)


class FakeSpan:
    """Stands for the blocks: each output depends on all tokens so far, their positions, the blocks that are run, and
    the adapter of the row.

    Args:
        num_pages: of the pool.
        stateful: whether sequences bring a state along.
    """

    blocks = BLOCKS
    hidden_size = HIDDEN
    page_bytes = 1024
    device = torch.device("cpu")
    failure: Exception | None = None

    def __init__(self, num_pages: int = 64, *, stateful: bool = False):
        self.num_pages = num_pages
        self.stateful = stateful
        self.shares_prefixes = not stateful
        self.cells = torch.full((num_pages, PAGE_SIZE), float("nan"), dtype=torch.float64)
        self.num_tokens = 0
        self.adapters: dict[int, tuple[float, list[int]]] = {}
        self.attach_failure: Exception | None = None
        self.num_attached = 0

    def adapter_pages(self, deltas, pages=()):
        count = sum(delta.num_pages for delta in deltas.values())
        return count if not pages else max(0, count + pages[0] % 2 - len(pages))  # a run that begins odd loses one

    def adapter_bytes(self, deltas, *, paged):
        return 0 if paged else self.page_bytes * self.adapter_pages(deltas)

    def attach(self, deltas, pages):
        if self.attach_failure is not None:
            raise self.attach_failure
        assert pages is None or not pages or not self.adapter_pages(deltas, pages)
        value = sum(delta.value for delta in deltas.values())
        self.cells[list(pages or ())] = -value
        self.num_attached += 1
        self.adapters[self.num_attached] = (value, list(pages or ()))
        return self.num_attached

    def detach(self, handle):
        del self.adapters[handle]

    def new_state(self):
        return FakeState() if self.stateful else None

    def copy_pages(self, pairs):
        for source, destination in pairs:
            self.cells[destination] = self.cells[source]

    def read_pages(self, pages, blocks):
        return self.cells[list(pages)].clone()

    def write_pages(self, pages, blocks, saved):
        assert len(saved) == len(pages)
        self.cells[list(pages)] = saved

    def pack_cache(self, saved, states, blocks):
        totals = torch.tensor([state.total for state in states], dtype=torch.float64)
        return bytearray(saved.numpy().tobytes() + totals.numpy().tobytes())

    def unpack_cache(self, data, num_pages, num_states, blocks):
        numbers = torch.frombuffer(data, dtype=torch.float64)
        num_cells = num_pages * PAGE_SIZE
        states = []
        for total in numbers[num_cells:].tolist():
            states.append(FakeState())
            states[-1].total, states[-1].is_parked = total, True
        assert len(states) == (num_states if self.stateful else 0)
        return numbers[:num_cells].view(num_pages, PAGE_SIZE), states

    def park_states(self, states):
        for state in states:
            assert not state.is_parked
            state.is_parked = True

    def unpark_states(self, states):
        for state in states:
            assert state.is_parked
            state.is_parked = False

    def run(self, chunks: list[Chunk]) -> list[torch.Tensor]:
        if self.failure is not None:
            raise self.failure
        written: set[int] = set()
        for chunk in chunks:
            for position in range(chunk.position, chunk.position + chunk.num_tokens):
                cell = chunk.pages[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE
                assert cell not in written, "two rows write one cell"
                written.add(cell)
                self.cells.view(-1)[cell] = chunk.hidden_states[position - chunk.position, 0].double()
        self.num_tokens += len(written)
        return [self._outputs(chunk) for chunk in chunks]

    def _outputs(self, chunk: Chunk) -> torch.Tensor:
        length = chunk.position + chunk.num_tokens
        tokens = self.cells[list(chunk.pages[: -(-length // PAGE_SIZE)])].reshape(-1)[:length]
        if chunk.state is not None:
            assert not chunk.state.is_parked, "the state of a swapped session"
            assert chunk.state.total == tokens[: chunk.position].sum(), "the state of another sequence"
            chunk.state.total = float(tokens.sum())
        value = 0.0
        if chunk.adapter >= 0:
            value, pages = self.adapters[chunk.adapter]
            assert (self.cells[pages] == -value).all(), "somebody wrote into an adapter's pages"
        return expected(tokens, BlockRange(chunk.entry, chunk.exit), value)[chunk.position :]


def expected(tokens: torch.Tensor, blocks: BlockRange, adapter: float = 0.0) -> torch.Tensor:
    """Outputs [n, HIDDEN] of a sequence of n tokens that nobody disturbed."""
    tokens = tokens.double()
    positions = torch.arange(1, len(tokens) + 1, dtype=torch.float64)
    sums = (tokens * positions).cumsum(0) % 10007 + tokens.cumsum(0) / 4 + 100 * blocks.start + blocks.end
    return torch.stack([sums + 20_000 * adapter, tokens], dim=1).float()


def inputs(tokens: torch.Tensor) -> torch.Tensor:
    """Hidden states [n, HIDDEN] that stand for these tokens."""
    return torch.stack([tokens.float(), -tokens.float()], dim=1)
