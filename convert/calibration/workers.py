"""Threads that compute slices of a calibration text, each with single-threaded operations.

So the numbers do not depend on how many threads there are: a product that torch splits over threads sums in another
order for another number of them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import TypeVar

import torch

from quantpress.quant import workers as quant_workers

__all__ = ["Workers"]

T = TypeVar("T")


class Workers(quant_workers.Workers):
    """Such threads that keep no gradients and count their time."""

    def __init__(self, threads: int) -> None:
        """Starts threads when they are needed."""
        super().__init__(threads)
        self.threads = threads
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = {}

    def submit(self, kind: str, task: Callable[[], T]) -> Future[T]:
        """Queues a task, whose time counts as time of a kind."""
        assert self._pool is not None, "they are used inside of their context"
        return self._pool.submit(self._timed, kind, task)

    def in_order(self, kind: str, tasks: Sequence[Callable[[], T]]) -> Iterator[T]:
        """Gives results in the order of the tasks; only a few tasks are under way, so that few results are held."""
        running: deque[Future[T]] = deque()
        for task in tasks:
            running.append(self.submit(kind, task))
            if len(running) > self.threads + 1:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()

    def take_seconds(self) -> dict[str, float]:
        """Gives the seconds per kind since the last call, divided by the number of threads."""
        with self._lock:
            taken, self._seconds = self._seconds, {}
        return {kind: seconds / self.threads for kind, seconds in taken.items()}

    def _timed(self, kind: str, task: Callable[[], T]) -> T:
        started = time.perf_counter()
        with torch.no_grad():
            result = task()
        seconds = time.perf_counter() - started
        with self._lock:
            self._seconds[kind] = self._seconds.get(kind, 0.0) + seconds
        return result
