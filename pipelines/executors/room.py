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


def usable_cores() -> int:
    """Gives the processors that this process may use, also where a container may use a share of their time only."""
    cores = available_threads()
    for folder in _own_cgroups():
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit() and int(period):
            cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    return cores


def free_bytes() -> int:
    """Gives the memory that can be taken without swapping and without reaching a container's limit."""
    free = free_memory()
    for folder in _own_cgroups():
        limit, used = _text(folder / "memory.max"), _text(folder / "memory.current")
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


def _own_cgroups() -> list[Path]:
    """Folders of this process's control group and of those around it (cgroups(7), version 2)."""
    for line in _text(_OWN_CGROUP).splitlines():
        if line.startswith("0::"):
            own = _CGROUPS / line.removeprefix("0::").lstrip("/")
            return [folder for folder in (own, *own.parents) if folder == _CGROUPS or _CGROUPS in folder.parents]
    return []


def _reclaimable(folder: Path) -> int:
    """Bytes of files in memory, which count as used and are given up when memory is wanted."""
    for line in _text(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == "inactive_file" and value.isdigit():
            return int(value)
    return 0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
