"""Compiles launches side by side before they are measured one after the other.

Triton compiles one kernel at a time and keeps what it made on the disk. So processes of their own run each launch once,
and the process that measures finds it there.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType

from quantpress.kernels.launch import Launch, Problem
from quantpress.kernels.tuning.products import Products
from quantpress.kernels.tuning.search import Refused

__all__ = ["Ahead"]


class Ahead:
    """A pool of processes, each of which has the GPU open (half a gigabyte of its memory) and one weight there."""

    def __init__(self, jobs: int, device: str = "cuda") -> None:
        """Starts nothing yet.

        Args:
            jobs: processes; with fewer than two, nothing is compiled ahead.
            device: where launches run.
        """
        self._jobs, self._device = jobs, device
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Ahead:
        """Gives itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def compile(self, problem: Problem, launches: Sequence[Launch]) -> None:
        """Compiles launches of a problem; what is wrong with one is found when it is measured."""
        if self._jobs < 2 or len(launches) < 2:
            return
        if self._pool is None:
            # a process that has a GPU open cannot be forked
            self._pool = ProcessPoolExecutor(self._jobs, multiprocessing.get_context("spawn"))
        try:
            for _ in self._pool.map(functools.partial(_run, problem, self._device), launches):
                pass
        except BrokenProcessPool:  # a compiler that crashes, or no memory: the launches are met again one by one
            self._pool.shutdown()
            self._pool, self._jobs = None, 1


def _run(problem: Problem, device: str, launch: Launch) -> None:
    with contextlib.suppress(Refused):
        _products(problem, device).check(launch)


@functools.lru_cache(maxsize=1)
def _products(problem: Problem, device: str) -> Products:
    return Products(problem, device)
