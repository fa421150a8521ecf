"""What this machine has and what a run takes of it: processors, free memory, peak memory."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

BASE_BYTES = 150 << 20  # interpreter, numpy, tokenizer and the chunks in flight, measured by benchmarks/run.py
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # malloc.h
_MAPPED_BYTES = 2 << 20  # smaller: less memory in vain, but more time to get it from the system (1 MiB: 5 % of a run)

_NO_ROOM = ("can't start new thread", "can't allocate memory", "out of memory")  # Python's threads, torch, CUDA


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
    """Gives the greatest resident size of this process so far, in bytes.

    Linux's own count begins where a program is started; getrusage(2) gives a worker what its parent had by then.
    """
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
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
    """Gives freed memory back, and keeps freed memory few from now on; only glibc can be told.

    A tokenizer leaves its working memory to the allocator. Every thread that allocates would begin a heap of its own:
    threads that start later share two. And heaps that hold large activations of several threads get holes, by chance up
    to a hundred megabytes: these come from the system and go back to it, where glibc would soon keep them too.
    """
    import ctypes

    try:
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(_M_ARENA_MAX, 2)
        library.mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
        library.malloc_trim(0)
    except (OSError, AttributeError):
        return  # another C library


def machine_error(error: Exception) -> str | None:
    """Says in words what the machine did not give, where nobody knew which file it was for; None for other errors."""
    if isinstance(error, OSError):
        reason = error.strerror or str(error) or type(error).__name__
        return f"{error.filename}: {reason}" if error.filename is not None else f"{reason} (errno {error.errno})"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in _NO_ROOM)):
        return "memory or threads are used up; close other programs, or see --max-memory and --threads"
    return None
