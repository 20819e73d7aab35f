"""What all tests share: no accelerator, no network but loopback, one thread per process."""

import os

# Before anything imports the libraries that read them, and for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nobody listens there: a forgotten download fails at once

from collections.abc import Iterable

import pytest
from hypothesis import settings

settings.register_profile("swarm", deadline=None)  # a busy machine is no failure
settings.load_profile("swarm")


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
