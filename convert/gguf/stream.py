"""Does many small pieces of work on a few threads and gives their results in order, holding only a few at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def in_order(tasks: Iterable[Callable[[], Result]], *, threads: int, window: int) -> Iterator[Result]:
    """Runs tasks on threads and yields what they return, in the order of the tasks.

    Args:
        tasks: taken one by one, as results are taken, so the iterable may make them on the way.
        threads: number of threads, at least 1.
        window: tasks that are started and not yet taken, at most; bounds the memory.

    Raises:
        Whatever a task raises, at its place. Tasks not yet started are dropped then, and those that run are awaited.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="quantpress") as pool:
        pending: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                pending.append(pool.submit(task))
                if len(pending) >= window:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
