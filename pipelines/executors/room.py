"""What this machine has room for: processors, free memory and GPUs, with the limits of a container."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

from quantpress.pipelines.machine import available_threads, free_memory

__all__ = ["free_bytes", "usable_cores", "visible_gpus"]

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")
_DEVICES = Path("/dev")
_RECLAIMABLE = ("inactive_file", "total_inactive_file")  # lines of memory.stat, version 2 and 1 (with its groups)


def usable_cores() -> int:
    """Gives the processors that this process may use, also where a container may use a share of their time only."""
    cores = available_threads()
    for folder in _own_cgroups("cpu"):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        quota, period = quota or _text(folder / "cpu.cfs_quota_us"), period or _text(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):
            cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    return cores


def free_bytes() -> int:
    """Gives the memory that can be taken without swapping and without reaching a container's limit."""
    free = free_memory()
    for folder in _own_cgroups("memory"):
        limit = _text(folder / "memory.max") or _text(folder / "memory.limit_in_bytes")
        used = _text(folder / "memory.current") or _text(folder / "memory.usage_in_bytes")
        if limit.isdigit() and used.isdigit():
            free = min(free, max(0, int(limit) - int(used) + _reclaimable(folder)))
    return free


def visible_gpus(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Gives ids of CUDA devices for CUDA_VISIBLE_DEVICES; found without loading CUDA, which takes seconds."""
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        ids = [part.strip() for part in named.split(",")]
        end = next((place for place, text in enumerate(ids) if text in ("", "-1")), len(ids))  # as CUDA reads it
        return tuple(ids[:end])
    numbers = (path.name.removeprefix("nvidia") for path in _DEVICES.glob("nvidia[0-9]*"))
    count = sum(number.isdigit() for number in numbers)
    return tuple(str(number) for number in range(count))


def _own_cgroups(controller: str) -> list[Path]:
    """Folders of this process's control group and of those around it, of version 2 and of version 1 (cgroups(7)).

    In a container the path may be that of the host, where the folder that is mounted is the group itself.
    """
    found = []
    for line in _text(_OWN_CGROUP).splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        top = _CGROUPS / controller if controllers else _CGROUPS
        own = top / path.lstrip("/")
        found += [folder for folder in (own, *own.parents) if folder == top or top in folder.parents]
    return found


def _reclaimable(folder: Path) -> int:
    """Bytes of files in memory, which count as used and are given up when memory is wanted."""
    lines = [line.partition(" ") for line in _text(folder / "memory.stat").splitlines()]
    return max((int(value) for name, _, value in lines if name in _RECLAIMABLE and value.isdigit()), default=0)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
