"""What this machine has and what a run takes of it: processors, free memory, peak memory."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

BASE_BYTES = 150 << 20  # interpreter, numpy, tokenizer and the chunks in flight, measured by benchmarks/run.py
_M_ARENA_MAX = -8  # malloc.h


def available_threads() -> int:
    """Gives the number of processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_memory(held: int = 0) -> int:
    """Estimates the bytes that a data-free conversion takes at its peak.

    Args:
        held: bytes of the largest tensor that must be held whole, as one that is stored transposed (Conv1D). All
            others pass in row chunks, so the peak does not grow with the model.
    """
    return BASE_BYTES + held


def peak_rss() -> int:
    """Gives the greatest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_memory() -> int:
    """Gives the bytes that can be taken without swapping; half of 8 GB where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 << 30


def save_memory() -> None:
    """Gives freed memory back, and lets threads that start later share two heaps; only glibc can be told.

    A tokenizer leaves its working memory to the allocator, and every thread that allocates would begin a heap of its
    own: together 100 MB that nobody uses.
    """
    import ctypes

    try:
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(_M_ARENA_MAX, 2)
        library.malloc_trim(0)
    except (OSError, AttributeError):
        return  # another C library
