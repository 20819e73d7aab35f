"""What all tests share: no accelerator, no network but loopback, one thread per process."""

import os

# Before anything imports the libraries that read them, and for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("TQDM_DISABLE", None)  # progress bars are tested, too
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nobody listens there: a forgotten download fails at once

import signal
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import settings

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as shells start what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("swarm", deadline=None)  # a busy machine is no failure
settings.load_profile("swarm")


@pytest.fixture(autouse=True)
def ctrl_c_stays_what_it_was() -> Iterator[None]:
    """A test that leaves another handler of SIGINT fails itself, and not a later one that wants to be interrupted."""
    before = signal.getsignal(signal.SIGINT)
    yield
    after = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)
    assert after == before


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
