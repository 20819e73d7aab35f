"""Free memory is what the system and the container still give."""

import torch

from swarm.server import hardware
from swarm.server.hardware import _available_bytes, _cgroup_left_bytes, device_name, free_bytes


def test_a_container_leaves_its_limit_less_what_is_used_and_cannot_be_dropped(tmp_path):
    """Cached files don't count as used; without a limit the system's memory decides."""
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 300000\ninactive_file 250000\nactive_file 50000\n")
    assert _cgroup_left_bytes(tmp_path) == 550_000
    (tmp_path / "memory.max").write_text("max\n")
    assert _cgroup_left_bytes(tmp_path) == 1 << 62
    assert _cgroup_left_bytes(tmp_path / "nowhere") == 1 << 62


def test_available_memory_is_read_from_the_system(tmp_path):
    """MemAvailable, in bytes."""
    (tmp_path / "meminfo").write_text("MemTotal: 2048 kB\nMemFree: 100 kB\nMemAvailable:    1024 kB\n")
    assert _available_bytes(tmp_path / "meminfo") == 1 << 20


def test_the_smaller_of_both_counts(monkeypatch):
    """A container on a large machine has no more than its limit."""
    monkeypatch.setattr(hardware, "_cgroup_left_bytes", lambda root: 123)
    assert free_bytes(torch.device("cpu")) == 123
    assert "threads" in device_name(torch.device("cpu"))
