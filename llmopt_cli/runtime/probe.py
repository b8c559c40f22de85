"""What this machine has: free memory of a device. The only place that asks."""

from __future__ import annotations

from pathlib import Path

import torch

UNKNOWN = 4 * 1024**3
CGROUP_FILES = (  # limit and use, versions 2 and 1
    ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"),
    ("sys/fs/cgroup/memory/memory.limit_in_bytes", "sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    return available_ram()


def available_ram(root: Path = Path("/")) -> int:
    """What Linux says is available, or what a container's limit leaves if that is less; 4 GiB where neither is told."""
    known = [_meminfo(root)]
    for limit, used in CGROUP_FILES:
        known.append(_number(root / limit, -1) - _number(root / used, 0))
    return min((amount for amount in known if amount > 0), default=UNKNOWN)


def _meminfo(root: Path) -> int:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)


def _number(file: Path, otherwise: int) -> int:
    """The number in a file; `otherwise` if there is no file or no limit (`max`)."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return otherwise
