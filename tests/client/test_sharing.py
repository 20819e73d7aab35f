"""Concurrent calls of one head become one product, nobody hangs, and nobody can tell from the result."""

import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from swarm.client import sharing
from swarm.client.head import PackedHead, pack
from swarm.client.sharing import SIZES, Combiner, SharedHead, independent_sizes, share

TIMEOUT_S = 30
VOCABULARY = 8192


class Gate:
    """A product of rows by two that notes how many rows it got, and whose first call waits until it is let go."""

    def __init__(self, error: BaseException | None = None):
        self.sizes: list[int] = []
        self.entered, self.go = threading.Event(), threading.Event()
        self.error = error

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(rows))
        if len(self.sizes) == 1:
            self.entered.set()
            assert self.go.wait(TIMEOUT_S)
            if self.error is not None:
                raise self.error
        return rows * 2


def row(value: float, count: int = 1) -> torch.Tensor:
    return torch.full((count, 3), value)


def until_waiting(combiner: Combiner, count: int) -> None:
    """Return when so many calls are queued behind the leader."""
    pause = threading.Event()
    for _ in range(TIMEOUT_S * 1000):
        if len(combiner._waiting) == count:
            return
        pause.wait(0.001)
    raise TimeoutError(f"{len(combiner._waiting)} calls wait, expected {count}")


def behind_a_leader(
    pool: ThreadPoolExecutor, combiner: Combiner, gate: Gate, counts: list[int]
) -> tuple["Future[torch.Tensor]", list["Future[torch.Tensor]"]]:
    """A leader that is held up in its product, and calls of so many rows that have queued behind it, in order."""
    leader = pool.submit(combiner, row(1.0))
    assert gate.entered.wait(TIMEOUT_S)
    followers = []
    for index, count in enumerate(counts):
        followers.append(pool.submit(combiner, row(float(index + 2), count)))
        until_waiting(combiner, index + 1)
    return leader, followers


def test_rows_that_wait_become_one_product() -> None:
    """Three calls behind a busy one are computed together, filled up to a size that was tried out."""
    gate = Gate()
    combiner = Combiner(gate, (1, 4, 8))
    with ThreadPoolExecutor(4) as pool:
        leader, followers = behind_a_leader(pool, combiner, gate, [1, 3, 1])
        gate.go.set()
        assert torch.equal(leader.result(TIMEOUT_S), row(2.0))
        results = [follower.result(TIMEOUT_S) for follower in followers]
    assert [len(result) for result in results] == [1, 3, 1]
    assert [float(result[0, 0]) for result in results] == [4.0, 6.0, 8.0]
    assert gate.sizes == [1, 8]
    assert all(result.untyped_storage().nbytes() == result.nbytes for result in results)


def test_no_product_gets_more_rows_than_allowed() -> None:
    """What doesn't fit waits for the next one, in order."""
    gate = Gate()
    combiner = Combiner(gate, (1, 4))
    with ThreadPoolExecutor(5) as pool:
        _, followers = behind_a_leader(pool, combiner, gate, [2, 3, 2, 1])
        gate.go.set()
        assert [float(it.result(TIMEOUT_S)[0, 0]) for it in followers] == [4.0, 6.0, 8.0, 10.0]
    assert gate.sizes == [1, 4, 4, 4]


def test_those_who_are_on_their_way_are_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A leader among several lets other threads run as long as more of them come to join it."""
    gate = Gate()
    combiner = Combiner(gate, (1, 2, 4))
    gate.go.set()
    coming = [2.0, 3.0]
    with ThreadPoolExecutor(3) as pool:
        combiner(row(0.0))
        followers = []

        def another_comes(seconds: float) -> None:
            assert seconds == 0
            if coming:
                followers.append(pool.submit(combiner, row(coming.pop(0))))
                until_waiting(combiner, len(followers))

        monkeypatch.setattr(sharing, "time", SimpleNamespace(sleep=another_comes))
        leader = pool.submit(combiner, row(1.0))
        assert torch.equal(leader.result(TIMEOUT_S), row(2.0))
        assert [float(it.result(TIMEOUT_S)[0, 0]) for it in followers] == [4.0, 6.0]
    assert gate.sizes == [1, 4]


def test_a_lone_caller_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """It computes in its own thread, with as many rows as it has, and lets nobody go first."""
    monkeypatch.setattr(sharing, "time", None)
    threads = []

    def compute(rows: torch.Tensor) -> torch.Tensor:
        threads.append(threading.current_thread())
        return rows * 2

    combiner = Combiner(compute, (1, 2, 4))
    for _ in range(3):
        assert torch.equal(combiner(row(3.0)), row(6.0))
    assert threads == [threading.current_thread()] * 3


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=repr)
def test_the_failure_of_a_leader_is_its_own(error: BaseException) -> None:
    """Those who wait behind it, and those whose rows it had, get their results all the same."""
    first, second = Gate(), Gate(error)

    def compute(rows: torch.Tensor) -> torch.Tensor:
        return (second if first.sizes else first)(rows)

    combiner = Combiner(compute, (1, 2, 4))
    with ThreadPoolExecutor(4) as pool:
        leader, [unlucky, carried] = behind_a_leader(pool, combiner, first, [1, 1])
        first.go.set()
        assert second.entered.wait(TIMEOUT_S)
        waiting = pool.submit(combiner, row(9.0))
        until_waiting(combiner, 1)
        second.go.set()
        assert torch.equal(leader.result(TIMEOUT_S), row(2.0))
        with pytest.raises(type(error)):
            unlucky.result(TIMEOUT_S)
        assert torch.equal(carried.result(TIMEOUT_S), row(6.0))
        assert torch.equal(waiting.result(TIMEOUT_S), row(18.0))
    assert torch.equal(combiner(row(1.0)), row(2.0))


def test_ctrl_c_while_waiting_leaves_the_queue() -> None:
    """The main thread gives up; the others go on without its rows."""
    gate = Gate()
    combiner = Combiner(gate, (1, 2, 4))
    main = threading.main_thread().ident
    assert main is not None

    def interrupt_main() -> None:
        until_waiting(combiner, 1)
        signal.pthread_kill(main, signal.SIGINT)

    with ThreadPoolExecutor(3) as pool:
        leader, _ = behind_a_leader(pool, combiner, gate, [])
        pool.submit(interrupt_main)
        with pytest.raises(KeyboardInterrupt):
            combiner(row(5.0))
        assert not combiner._waiting
        gate.go.set()
        assert torch.equal(leader.result(TIMEOUT_S), row(2.0))
    assert torch.equal(combiner(row(1.0)), row(2.0))
    assert gate.sizes == [1, 1]


def test_ctrl_c_in_a_thread_that_was_to_lead_passes_the_lead_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interrupt comes just when the leader has handed over."""
    unlucky: list[threading.Thread] = []

    class Interrupted(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            super().wait(TIMEOUT_S)
            if threading.current_thread() in unlucky:
                raise KeyboardInterrupt
            return True

    gate = Gate()
    combiner = Combiner(gate, (1, 2))
    errors: list[BaseException] = []

    def to_be_interrupted() -> None:
        try:
            combiner(row(5.0, 2))
        except KeyboardInterrupt as error:
            errors.append(error)

    monkeypatch.setattr(sharing, "threading", SimpleNamespace(Event=Interrupted, get_ident=threading.get_ident))
    with ThreadPoolExecutor(2) as pool:
        leader, _ = behind_a_leader(pool, combiner, gate, [])
        unlucky.append(threading.Thread(target=to_be_interrupted))
        unlucky[0].start()
        until_waiting(combiner, 1)
        last = pool.submit(combiner, row(7.0))
        until_waiting(combiner, 2)
        gate.go.set()
        assert torch.equal(leader.result(TIMEOUT_S), row(2.0))
        assert torch.equal(last.result(TIMEOUT_S), row(14.0))
        unlucky[0].join(TIMEOUT_S)
    assert len(errors) == 1
    assert combiner._leader is None


@settings(max_examples=15, deadline=None)
@given(calls=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=6), min_size=2, max_size=8))
def test_any_mix_of_callers_gets_its_own_rows(calls: list[list[int]]) -> None:
    """Threads with calls of various sizes; every result is that of the caller's rows, none has too many rows."""
    largest = []

    def compute(rows: torch.Tensor) -> torch.Tensor:
        largest.append(len(rows))
        return rows * 2

    combiner = Combiner(compute, (1, 2, 4, 8))
    start = threading.Barrier(len(calls))

    def caller(index: int) -> list[bool]:
        start.wait(TIMEOUT_S)
        values = [(float(100 * index + step), count) for step, count in enumerate(calls[index])]
        return [torch.equal(combiner(row(value, count)), row(2 * value, count)) for value, count in values]

    with ThreadPoolExecutor(len(calls)) as pool:
        assert all(all(results) for results in pool.map(caller, range(len(calls)), timeout=TIMEOUT_S))
    assert set(largest) <= {1, 2, 4, 8}
    assert combiner._leader is None and not combiner._waiting


# -- heads ------------------------------------------------------------------------------------------------------


def packed(width: int, dtype: torch.dtype = torch.float32) -> PackedHead:
    torch.manual_seed(0)
    head = pack(nn.Linear(width, VOCABULARY, bias=True).requires_grad_(False), dtype, is_tied=False)
    if head is None:
        pytest.skip(f"no packed {dtype} on this CPU")
    return head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [576, 2048])
def test_shared_logits_have_the_bits_of_lone_ones(width: int, dtype: torch.dtype) -> None:
    """Sixteen threads at once, against the same rows one after another; also for widths that one row sums otherwise."""
    head = share(packed(width, dtype), width, dtype)
    if not isinstance(head, SharedHead):
        pytest.skip("this CPU's product depends on the number of rows")
    hidden = [torch.randn(1 + index % 3, 1, width).to(dtype) for index in range(16)]
    start = threading.Barrier(16)

    def logits(states: torch.Tensor) -> torch.Tensor:
        start.wait(TIMEOUT_S)
        with torch.no_grad():
            found: torch.Tensor = head(states)
        return found

    with torch.no_grad():
        alone = [head(states) for states in hidden]
    with ThreadPoolExecutor(16) as pool:
        for _ in range(4):
            for found, expected in zip(pool.map(logits, hidden), alone, strict=True):
                assert torch.equal(found, expected)


def dependent(rows: torch.Tensor) -> torch.Tensor:
    return rows + len(rows) * 1e-3


def odd_when_alone(rows: torch.Tensor) -> torch.Tensor:
    return rows + (1e-3 if len(rows) == 1 else 0.0)


def odd_in_twelves(rows: torch.Tensor) -> torch.Tensor:
    return rows + (1e-3 if len(rows) == 12 else 0.0)


@pytest.mark.parametrize(
    ("compute", "sizes"), [(dependent, ()), (odd_in_twelves, ()), (odd_when_alone, SIZES[1:]), (torch.neg, SIZES)]
)
def test_only_products_with_independent_rows_are_shared(
    compute: Callable[[torch.Tensor], torch.Tensor], sizes: tuple[int, ...]
) -> None:
    """Where one row alone gets other bits, it is computed as one of two; anything else is not shared."""
    assert independent_sizes(compute, 8, torch.float32) == sizes

    class Head(nn.Module):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return compute(rows)

    head = share(Head(), 8, torch.float32)
    assert isinstance(head, SharedHead) is bool(sizes)
    if sizes:
        expected = compute(torch.ones(2, 8))[:1]
        assert torch.equal(head(torch.ones(1, 1, 8)), expected[None])


def test_gradients_other_types_and_many_rows_go_to_the_head_itself() -> None:
    """Only what was tried out is shared; the rest is computed as without sharing."""
    inner = packed(64)
    head = SharedHead(inner, 64, torch.float32)
    shared: list[int] = []
    head._combiners = {torch.get_num_threads(): lambda rows: shared.append(len(rows)) or inner(rows)}  # type: ignore
    hidden = torch.randn(2, 3, 64)
    leaf = hidden.clone().requires_grad_()
    expected = F.linear(leaf, inner.weight, inner.bias)
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    found = head(leaf)
    (found_gradient,) = torch.autograd.grad(found.sum(), leaf)
    torch.testing.assert_close(found_gradient, gradient)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    head(hidden.double())
    head(torch.randn(SIZES[-1] + 1, 64))
    assert head(torch.empty(0, 64)).shape == (0, VOCABULARY)
    assert not shared
    with torch.inference_mode():
        assert head(torch.randn(2, 1, 64)).shape == (2, 1, VOCABULARY)
    assert not head(hidden).requires_grad
    assert shared == [2, 6]


def test_results_for_inference_mode_serve_everybody() -> None:
    """A leader in inference mode hands out plain tensors, which others may use under autograd."""
    head = SharedHead(packed(64), 64, torch.float32)
    with torch.inference_mode():
        logits = head(torch.randn(1, 64))
    assert not logits.is_inference()
