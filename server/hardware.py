"""What this machine has: a name for its device, and the memory that is free on it now, whoever uses the rest."""

import os
import platform
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")


def device_name(device: torch.device) -> str:
    """What the device is, and for a CPU how many threads blocks get on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def free_bytes(device: torch.device) -> int:
    """Memory of the device that is free now; of a CPU, what the system and the container would still give."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_available_bytes(Path("/proc/meminfo")), _cgroup_left_bytes(_CGROUP))


def _available_bytes(meminfo: Path) -> int:
    """MemAvailable: what can be had without swapping."""
    for line in meminfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) << 10
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_left_bytes(root: Path) -> int:
    """What the container's limit leaves, files that can be dropped not counted; huge where there is no limit."""
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
        lines = (root / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):
        return 1 << 62
    if limit == "max":
        return 1 << 62
    droppable = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    return max(0, int(limit) - used + droppable)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
