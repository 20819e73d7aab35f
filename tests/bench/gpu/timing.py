"""Times of device work, and how much time is left for more."""

import statistics
import time
from collections.abc import Callable

import torch

_FLUSHED_BYTES = 1 << 30


class Bench:
    """What every benchmark gets.

    Args:
        smoke: tiny shapes on the CPU.
        until: time.monotonic() at which nothing new should begin.
    """

    def __init__(self, *, smoke: bool, until: float):
        self.smoke = smoke
        self.device = torch.device("cpu" if smoke else "cuda:0")
        self.left_out: list[str] = []
        self._until = until
        self._flushed = torch.empty(1 if smoke else _FLUSHED_BYTES, dtype=torch.int8, device=self.device)
        self._copy_gbs: float | None = None

    @property
    def seconds_left(self) -> float:
        return max(0.0, self._until - time.monotonic())

    def time_is_up(self, what: str) -> bool:
        """Whether `what` is to be left out; then it is noted."""
        if self.seconds_left:
            return False
        self.left_out.append(what)
        return True

    def fits(self, num_bytes: int) -> bool:
        """Whether so much may be allocated."""
        if self.smoke:
            return True
        torch.cuda.empty_cache()  # what earlier measurements left
        free, _ = torch.cuda.mem_get_info(self.device)
        return num_bytes < 0.8 * free

    def device_us(self, run: Callable[[], object], repeats: int = 20) -> float:
        """Median time on the device, its second-level cache cold, in microseconds."""
        if self.smoke:
            return self.host_us(run, 1)
        run()
        torch.cuda.synchronize(self.device)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in events:
            self._flushed.zero_()  # meanwhile the host gets ahead, so that launching isn't measured
            start.record()
            run()
            end.record()
        torch.cuda.synchronize(self.device)
        return statistics.median(start.elapsed_time(end) for start, end in events) * 1000

    def host_us(self, run: Callable[[], object], repeats: int = 20) -> float:
        """Time that the host needs to enqueue `run`, in microseconds (on a CPU: to run it)."""
        run()
        self.synchronize()
        started = time.perf_counter()
        for _ in range(repeats):
            run()
        spent = time.perf_counter() - started
        self.synchronize()
        return spent / repeats * 1e6

    def wall_us(self, run: Callable[[], object], repeats: int = 10) -> float:
        """Median time from call to result, in microseconds."""
        times = []
        for _ in range(1 if self.smoke else repeats + 2):
            self.synchronize()
            started = time.perf_counter()
            run()
            self.synchronize()
            times.append(time.perf_counter() - started)
        return statistics.median(times[2:] or times) * 1e6

    def synchronize(self) -> None:
        if not self.smoke:
            torch.cuda.synchronize(self.device)

    @property
    def copy_gbs(self) -> float:
        """Bandwidth of a large copy, bytes read and written: the floor of all that is bound by memory."""
        if self._copy_gbs is None:
            size = 1 << 12 if self.smoke else 1 << 30
            source = torch.empty(size, dtype=torch.int8, device=self.device)
            target = torch.empty_like(source)
            self._copy_gbs = 2 * size / self.device_us(lambda: target.copy_(source)) / 1e3
        return self._copy_gbs
