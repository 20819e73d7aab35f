"""Lets the sessions of one process share the head: rows that several threads want at once become one product.

    thread A ─rows─► Combiner: nobody computes ─► A leads: product of A's rows, at once
    thread B ─rows─┐                                        meanwhile
    thread C ─rows─┴► wait ─► A is done ─► B leads: one product of B's and C's rows ─► each gets its own

The head reads its whole matrix for one row as for sixteen, so whoever waits for it anyway should not read it alone.
There are no timers: a lone caller computes at once; where there are several, a leader first lets those go who are ready
to run, for they may be on their way here (a third fewer products with 16 sessions). Sharing must not show in the
result: it is on only for a head whose product gives a row the same bits whatever stands beside it, which is tried out
for each number of rows in use.

Knows nothing of models: a head is any module from [rows, H] to [rows, V].
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

SIZES = (1, 2, 4, 8, 12, 16, 24, 32)
"""Numbers of rows in which products are done; others are filled up with zeros."""
_SAMPLES = 4
"""Rows to try a head out with; a 16-bit result hides most differences, so one row is not enough."""


def share(head: nn.Module, width: int, dtype: torch.dtype) -> nn.Module:
    """Wrap a head on the CPU so that concurrent calls share products; a head that can't be shared stays as it is.

    Args:
        head: from [rows, width] to [rows, V], each row for itself.
        width: of the hidden states.
        dtype: of the hidden states.
    """
    shared = SharedHead(head, width, dtype)
    return shared if shared.is_shared else head


class SharedHead(nn.Module):
    """A head whose concurrent calls are computed together, with the bits that each call would get alone."""

    def __init__(self, head: nn.Module, width: int, dtype: torch.dtype):
        super().__init__()
        self.head = head
        self.in_features = width
        self._dtype = dtype
        self._combiners: dict[int, Combiner | None] = {}

    @property
    def is_shared(self) -> bool:
        """Whether rows are independent in the products of this head, with the present number of threads."""
        return self._combiner() is not None

    @property
    def weight(self) -> torch.Tensor:
        """The matrix of the head."""
        weight: torch.Tensor = self.head.weight  # type: ignore[assignment]
        return weight

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., H] to logits [..., V]; gradients, other types and many rows go straight to the head."""
        num_rows = hidden_states.numel() // hidden_states.shape[-1]
        combiner = self._combiner() if 0 < num_rows <= SIZES[-1] and self._is_plain(hidden_states) else None
        if combiner is None:
            logits: torch.Tensor = self.head(hidden_states)
            return logits
        logits = combiner(hidden_states.reshape(num_rows, -1))
        return logits.view(*hidden_states.shape[:-1], -1)

    def _is_plain(self, hidden_states: torch.Tensor) -> bool:
        """Whether this is what was tried out, and nobody wants gradients."""
        kind = (hidden_states.dtype, hidden_states.device.type, hidden_states.shape[-1])
        if kind != (self._dtype, "cpu", self.in_features):
            return False
        return not (
            torch.is_grad_enabled()
            and (hidden_states.requires_grad or any(it.requires_grad for it in self.head.parameters()))
        )

    def _combiner(self) -> "Combiner | None":
        """That of the number of threads in use, since it may decide how a product is cut up and summed."""
        threads = torch.get_num_threads()
        if threads not in self._combiners:
            sizes = independent_sizes(self.head, self.in_features, self._dtype)
            self._combiners[threads] = Combiner(self.head, sizes) if sizes else None
        return self._combiners[threads]


@torch.no_grad()
def independent_sizes(head: Callable[[torch.Tensor], torch.Tensor], width: int, dtype: torch.dtype) -> tuple[int, ...]:
    """The numbers of rows for which a row's result has the same bits; empty where only some agree.

    One row may differ: it often gets a kernel of its own. It is then computed as one of two.
    """
    samples = torch.randn(_SAMPLES, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = head(samples)
    agree = []
    for size in SIZES:
        rows = torch.arange(max(size, _SAMPLES)) % _SAMPLES
        found = torch.cat([head(samples[part]) for part in rows.split(size)])
        if bool((found == expected[rows]).all()):
            agree.append(size)
    return tuple(agree) if set(SIZES[1:]) <= set(agree) else ()


class Combiner:
    """Joins concurrent calls of a function of rows; whoever finds nobody computing leads, the others wait.

    Args:
        compute: from [n, H] to [n, V], each row for itself.
        sizes: the numbers of rows n that it may be given, ascending.
    """

    def __init__(self, compute: Callable[[torch.Tensor], torch.Tensor], sizes: Sequence[int]):
        self._compute, self._sizes = compute, tuple(sizes)
        self._lock = threading.Lock()
        self._leader: _Call | None = None
        self._waiting: deque[_Call] = deque()
        self._last_thread = threading.get_ident()
        self._is_alone = True
        """Whether the last two calls came from one thread."""

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """The results of `rows` [n, H], n at most the largest size; a tensor of the caller's own.

        When the product of another thread fails, which had these rows in it, they are computed again alone.
        """
        call = _Call(rows)
        try:
            if not self._enter(call):
                call.released.wait()
            if call.result is None:
                self._run([call, *self._followers(call)])
        finally:
            try:
                self._leave(call)
            except BaseException:  # Ctrl-C may strike here, too, and nobody may be left waiting
                self._leave(call)
                raise
        assert call.result is not None
        return call.result.clone() if call.is_part else call.result

    def _enter(self, call: "_Call") -> bool:
        """Take the lead where nobody has it, else queue."""
        thread = threading.get_ident()
        with self._lock:
            self._is_alone = thread == self._last_thread
            self._last_thread = thread
            if self._leader is None:
                self._leader = call
                return True
            call.released = threading.Event()
            self._waiting.append(call)
            return False

    def _followers(self, call: "_Call") -> list["_Call"]:
        """Those who wait, first come first served, as far as they fit; nobody for a call that doesn't lead."""
        seen = -1
        while self._leader is call and not self._is_alone and len(self._waiting) > seen:
            seen = len(self._waiting)
            time.sleep(0)  # no pause: other threads that are ready to run go first
        with self._lock:
            room = self._sizes[-1] - len(call.rows)
            while self._leader is call and self._waiting and len(self._waiting[0].rows) <= room:
                call.followers.append(self._waiting.popleft())
                room -= len(call.followers[-1].rows)
            return call.followers

    @torch.inference_mode(False)
    @torch.no_grad()
    def _run(self, calls: "list[_Call]") -> None:
        rows = calls[0].rows if len(calls) == 1 else torch.cat([call.rows for call in calls])
        missing = next(size for size in self._sizes if size >= len(rows)) - len(rows)
        results = self._compute(F.pad(rows, (0, 0, 0, missing)) if missing else rows)
        if len(calls) == 1 and not missing:
            calls[0].result = results
            return
        start = 0
        for call in calls:
            call.is_part = True
            call.result = results[start : start + len(call.rows)]
            start += len(call.rows)

    def _leave(self, call: "_Call") -> None:
        """Pass the lead on and release the followers, with or without results; may be called twice."""
        with self._lock:
            if self._leader is call:
                self._leader = self._waiting.popleft() if self._waiting else None
            elif call in self._waiting:
                self._waiting.remove(call)
            following = self._leader
        if following is not None and following is not call:
            following.released.set()
        for follower in call.followers:
            follower.released.set()


_OPEN = threading.Event()
_OPEN.set()


class _Call:
    """Rows of one caller, and what became of them."""

    __slots__ = ("followers", "is_part", "released", "result", "rows")

    def __init__(self, rows: torch.Tensor):
        self.rows = rows
        self.result: torch.Tensor | None = None
        self.is_part = False
        """Whether `result` is a view of more than these rows."""
        self.released = _OPEN
        """Set when there is a result, when the lead has come to this call, or when its leader has failed."""
        self.followers: list[_Call] = []
