"""Pages that hold a known content, found by that content: a prompt that begins like another one takes its pages.

    inputs of a row ─► PageKeys.extend ─► key per full page ─► PrefixCache.find ─► (page, outputs): nothing to compute
                                                          └──► PrefixCache.insert, once the page has been computed

A key is a chain of blake2b over (entry, exit, variant) and the input hidden states of all pages so far, with a secret
of the process, so that nobody can prepare two contents with one key. What stands in a page depends on nothing else. A
cached page is full and never written again; the allocator takes it back when pages run out. Outputs lie in host memory
under a budget; a page whose outputs are not kept serves those who do not ask for them. Whoever can guess how a prompt
begins can tell from the time of the answer whether somebody has sent it lately; nothing else can be learnt. Pure but
for the secret.
"""

import secrets
from collections import OrderedDict
from dataclasses import dataclass
from hashlib import blake2b

import torch

from swarm.server.pages import PAGE_SIZE, PageAllocator

OUTPUT_BYTES = 256 << 20
"""Host memory for the outputs of cached pages."""
MAX_IDLE_SHARE = 0.5
"""Part of all pages that may hold nothing but what is cached: the rest stays in long runs for those who grow."""
_KEY_BYTES = 24


class PageKeys:
    """Keys of the full pages of one row, from its first token on.

    Once tokens came by that were not shown to it (`stop`), no later page gets a key.

    Args:
        seed: the key of the empty row.
    """

    __slots__ = ("_is_open", "_keys", "_seed", "_tail")

    def __init__(self, seed: bytes):
        self._seed = seed
        self._keys: list[bytes] = []
        self._tail: list[torch.Tensor] = []
        self._is_open = True

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> bytes:
        return self._keys[index]

    def extend(self, inputs: torch.Tensor) -> None:
        """The next tokens of the row come with these input hidden states [n, hidden] on the host."""
        if not self._is_open or not len(inputs):
            return
        joined = torch.cat([*self._tail, inputs]) if self._tail else inputs
        kind = str(joined.dtype).removeprefix("torch.").encode()
        full = len(joined) // PAGE_SIZE * PAGE_SIZE
        data: memoryview = joined[:full].contiguous().view(torch.uint8).numpy().reshape(-1).data
        page_bytes = len(data) // max(1, full // PAGE_SIZE)
        for start in range(0, len(data), page_bytes or 1):
            last = self._keys[-1] if self._keys else self._seed
            self._keys.append(_chain(last, data[start : start + page_bytes], kind))
        self._tail = [joined[full:].clone()] if full < len(joined) else []

    def stop(self) -> None:
        """What follows isn't worth a key."""
        self._is_open, self._tail = False, []

    def truncate(self, length: int) -> None:
        """The row has `length` tokens now, not more than before."""
        keep, rest = divmod(length, PAGE_SIZE)
        if keep >= len(self._keys):
            tail = torch.cat(self._tail)[: length - len(self._keys) * PAGE_SIZE] if self._tail else None
            self._tail = [tail] if tail is not None and len(tail) else []
            return
        del self._keys[keep:]
        self._tail = []
        self._is_open = rest == 0

    def fork(self) -> "PageKeys":
        """The same for a second row with the same tokens."""
        other = PageKeys(self._seed)
        other._keys, other._tail, other._is_open = list(self._keys), list(self._tail), self._is_open
        return other


@dataclass(slots=True)
class _Entry:
    page: int
    outputs: torch.Tensor | None


class PrefixCache:
    """Content of pages of one allocator.

    Args:
        allocator: of the pages.
        output_bytes: host memory for outputs.
    """

    def __init__(self, allocator: PageAllocator, *, output_bytes: int = OUTPUT_BYTES):
        self.num_hits = 0
        """Pages that were found."""
        self._allocator = allocator
        self._secret = secrets.token_bytes(32)
        self._entries: dict[bytes, _Entry] = {}
        self._key_of: dict[int, bytes] = {}
        self._with_outputs: OrderedDict[bytes, None] = OrderedDict()
        self._max_output_bytes, self._output_bytes = output_bytes, 0
        self._max_idle = int(MAX_IDLE_SHARE * allocator.num_pages)

    @property
    def output_bytes(self) -> int:
        """Host memory that outputs take now."""
        return self._output_bytes

    def keys(self, entry: int, exit: int, variant: str = "") -> PageKeys:
        """For a new row that runs blocks [entry, exit), with the adapter `variant`."""
        return PageKeys(_chain(self._secret, f"{entry}:{exit}:{variant}".encode()))

    def find(self, key: bytes, *, with_outputs: bool) -> tuple[int, torch.Tensor | None] | None:
        """The page with this content and its outputs [PAGE_SIZE, hidden]; None where there is no such page.

        Args:
            key: from `PageKeys`.
            with_outputs: whether a page without outputs is of no use.
        """
        entry = self._entries.get(key)
        if entry is None or (with_outputs and entry.outputs is None):
            return None
        if entry.outputs is not None:
            self._with_outputs.move_to_end(key)
        self.num_hits += 1
        return entry.page, entry.outputs

    def insert(self, key: bytes, page: int, outputs: torch.Tensor | None) -> None:
        """This page, in use, holds this content; its outputs, where given, are kept as they are."""
        entry = self._entries.get(key)
        if entry is None:
            if page in self._key_of:  # it is known under another key: it was taken from here
                return
            entry = self._entries[key] = _Entry(page, None)
            self._key_of[page] = key
            self._allocator.keep(page, self)
        if entry.outputs is None and outputs is not None and outputs.nbytes <= self._max_output_bytes:
            entry.outputs = outputs
            self._with_outputs[key] = None
            self._output_bytes += outputs.nbytes
            while self._output_bytes > self._max_output_bytes:
                self._drop_outputs(next(iter(self._with_outputs)))

    def trim(self) -> None:
        """Leave part of the pool to those who grow; to be called when sequences were freed."""
        self._allocator.trim(self._max_idle)

    def evicted(self, page: int) -> None:
        """The allocator has taken the page."""
        key = self._key_of.pop(page)
        self._drop_outputs(key)
        del self._entries[key]

    def moved(self, page: int, new: int) -> None:
        """The allocator has put the content into another page."""
        key = self._key_of.pop(page)
        self._key_of[new] = key
        self._entries[key].page = new

    def _drop_outputs(self, key: bytes) -> None:
        entry = self._entries[key]
        if entry.outputs is not None:
            self._output_bytes -= entry.outputs.nbytes
            entry.outputs = None
            del self._with_outputs[key]


def _chain(last: bytes, data: bytes | memoryview, kind: bytes = b"") -> bytes:
    """The key of what follows `last`; `kind` says how the bytes are to be read."""
    return blake2b(data, key=last, person=kind, digest_size=_KEY_BYTES).digest()
