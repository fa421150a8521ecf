"""Runs fixed tasks on a number of threads, each with single-threaded linear algebra: results do not depend on it.

What a task computes may not depend on how many others run: tasks are cut by the size of the problem alone, and inside a
task torch uses one thread. torch keeps its number of threads per calling thread (it sets OpenMP's and MKL's own, which
are per thread: ATen/ParallelOpenMP.cpp, `set_num_threads`), so the caller's setting is not touched.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Workers", "chunks"]

Result = TypeVar("Result")


def chunks(count: int, size: int) -> list[slice]:
    """Cuts `count` rows into slices of a fixed size; the last may be shorter."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


class Workers:
    """Threads for tasks; a context manager. torch must have been imported before if the tasks use it."""

    def __init__(self, threads: int) -> None:
        self._threads = max(1, threads)
        self._own: int | None = None
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        torch = sys.modules.get("torch")
        self._own = int(torch.get_num_threads()) if torch else None
        self._pool = ThreadPoolExecutor(self._threads, initializer=_use_one_thread)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._pool is not None
        self._pool.shutdown(cancel_futures=True)
        if self._own is not None:
            # a new thread starts with what was set last anywhere: that must not be the workers' setting
            sys.modules["torch"].set_num_threads(self._own)

    def run(self, tasks: Iterable[Callable[[], Result]]) -> list[Result]:
        """Runs tasks; they should let go of the interpreter's lock where they work long.

        Returns:
            What they gave, in their order. The first error of a task is raised.
        """
        assert self._pool is not None
        return list(self._pool.map(_call, tasks))


def _call(task: Callable[[], Result]) -> Result:
    return task()


def _use_one_thread() -> None:
    torch = sys.modules.get("torch")
    if torch is None:
        return
    # A thread takes the number that was set last anywhere when it first asks for one (`lazy_init_num_threads`), which
    # may be long after it was told its own: where another pool had ended in between, it computed with many.
    torch.get_num_threads()
    torch.set_num_threads(1)
