"""What this machine has: memory of a device, all and free. The only place that asks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

UNKNOWN = 4 * 1024**3


@dataclass(frozen=True, slots=True)
class ControlGroup:
    """Where a version of Linux control groups tells a container's memory limit, use, and the page cache in that use."""

    limit: str
    used: str
    stat: str
    page_cache: str  # the line of `stat`


CONTROL_GROUPS = (
    ControlGroup("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ControlGroup(
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    return available_ram()


def total_memory(device: torch.device) -> int:
    """Bytes that `device` has, in use or not."""
    if device.type == "cuda":
        total: int = torch.cuda.mem_get_info(device)[1]
        return total
    return installed_ram()


def installed_ram(root: Path = Path("/")) -> int:
    """What Linux says is installed, or a container's limit if that is less; 4 GiB where neither is told."""
    known = [_number(root / "sys/fs/cgroup" / group.limit) for group in CONTROL_GROUPS]
    machine = _field(root / "proc/meminfo", "MemTotal:")
    known.append(machine * 1024 if machine is not None else None)
    return min((limit for limit in known if limit is not None), default=UNKNOWN)


def available_ram(root: Path = Path("/")) -> int:
    """What Linux says is available, or what a container's limit leaves if that is less; 4 GiB where neither is told.

    A limit leaves its bytes less those in use; page cache does not count as use, the kernel drops it when asked.
    """
    known = [_room(root / "sys/fs/cgroup", group) for group in CONTROL_GROUPS]
    machine = _field(root / "proc/meminfo", "MemAvailable:")
    known.append(machine * 1024 if machine is not None else None)
    return min((room for room in known if room is not None), default=UNKNOWN)


def _room(folder: Path, group: ControlGroup) -> int | None:
    limit, used = _number(folder / group.limit), _number(folder / group.used)
    if limit is None or used is None:
        return None
    return max(limit - used + (_field(folder / group.stat, group.page_cache) or 0), 0)


def _number(file: Path) -> int | None:
    """The number that a file holds; None if there is no file, or no limit (`max`)."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _field(file: Path, name: str) -> int | None:
    """The number in the line `name NUMBER ...`; None if there is no such line or file."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), None)
