"""The self-test passes a form that is right, and finds one that is wrong in any of the known ways."""

import logging
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from swarm.kernels import lora, lora_self_test, torch_lora

CPU = torch.device("cpu")


def test_a_right_form_passes():
    """On the CPU, forth and back."""
    assert lora_self_test.self_test(torch_lora, CPU) == []


@pytest.mark.gpu
def test_compiled_kernels_pass_on_this_device():
    """In bf16, too."""
    from swarm.kernels import triton_lora

    assert lora_self_test.self_test(triton_lora, torch.device("cuda", 0)) == []


def faulty(**parts):
    """torch's form with some functions replaced."""
    names = ("add", "shrink", "expand", "pool_gradients")
    return SimpleNamespace(**{name: getattr(torch_lora, name) for name in names} | parts)


def nan_in_wide_blocks(y, x, targets, batch):
    """Right but for a NaN in columns of blocks of 128, as on Hopper."""
    torch_lora.add(y, x, targets, batch)
    if y.shape[1] > 512:
        y[0, 128] = float("nan")


def first_adapter_for_all(y, x, targets, batch):
    """The weights and scale of one adapter for every row of a small batch."""
    torch_lora.add(y, x, targets, lora.LoraBatch([0] * batch.num_rows))


def nothing(into, h, targets, side, batch):
    """Skips its work."""


def no_scale(y, x, targets, batch):
    """Twice what should be added."""
    torch_lora.add(y, x, targets, batch)
    torch_lora.add(y, x, targets, batch)


def unwritten(h, source, targets, side, batch):
    """Leaves gradients as the allocator gave them."""
    return [(rows, torch.full_like(sums, float("nan"))) for rows, sums in
            torch_lora.pool_gradients(h, source, targets, side, batch)]  # fmt: skip


@pytest.mark.parametrize(
    ("part", "function", "words"),
    [
        ("add", nan_in_wide_blocks, "y has 1 numbers that are not finite"),
        ("add", first_adapter_for_all, "y is off by"),
        ("add", no_scale, "y is off by"),
        ("expand", nothing, "dx is off by"),
        ("pool_gradients", unwritten, "da0 has"),
    ],
)
def test_a_wrong_form_is_found(part, function, words):
    """The failure names the batch, the shapes, the dtype and what is wrong."""
    failures = lora_self_test.self_test(faulty(**{part: function}), CPU)
    assert any(words in failure for failure in failures)
    assert any("512 to 640+192+192 in torch.float32" in failure for failure in failures)


def test_a_device_whose_kernels_fail_runs_the_torch_form(caplog):
    """A server starts all the same, and says so once."""
    pytest.importorskip("triton")
    device = torch.device("cuda", 7)
    with mock.patch.object(lora_self_test, "self_test", return_value=["y is off"]) as test:
        with caplog.at_level(logging.WARNING):
            assert [lora.lora_form(device) for _ in range(2)] == [torch_lora] * 2
        assert test.call_count == 1
    assert "y is off" in caplog.text


def test_a_device_whose_kernels_pass_runs_triton():
    """The self-test decides, once per device."""
    triton_lora = pytest.importorskip("swarm.kernels.triton_lora")
    with mock.patch.object(lora_self_test, "self_test", return_value=[]):
        assert lora.lora_form(torch.device("cuda", 6)) is triton_lora


@pytest.fixture(autouse=True)
def forget_choices():
    """What a test chose for a device that isn't there is not for others."""
    yield
    lora.lora_form.cache_clear()
