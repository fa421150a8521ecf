"""Runs tasks in this process, one after another: for tests, debuggers and `--workers 0`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from quantpress.pipelines.batch.tasks import Event, Task, Watch
from quantpress.pipelines.executors.attempt import PERFORM, Perform, attempt, resident_bytes
from quantpress.pipelines.machine import available_threads
from quantpress.quant.errors import CancelledError

__all__ = ["InlinePool"]


class InlinePool:
    """A pool of one, which works on the scheduler's thread while the scheduler waits for events."""

    def __init__(
        self,
        watch: Watch | None = None,
        *,
        cancelled: Callable[[], bool] | None = None,
        threads: int | None = None,
        perform: str | Perform = PERFORM,
    ) -> None:
        """Takes nothing yet.

        Args:
            watch: told "started" and "progress" while a task works, where the scheduler cannot; None leaves them out.
            cancelled: looked at whenever a task tells its progress; the task is stopped there once it is True.
            threads: worker threads of a task; None for all processors.
            perform: does a task; as text "module:function".
        """
        self._watch, self._cancelled = watch, cancelled
        self._threads, self._perform = threads or available_threads(), perform
        self._task: Task | None = None

    def has_room(self, task: Task) -> bool:
        """Whether nothing waits to be done."""
        del task
        return self._task is None

    def start(self, task: Task) -> None:
        """Takes the task; it is done when events are asked for."""
        self._task = task

    def events(self, timeout: float) -> Sequence[Event]:
        """Does the task that was started, however long it takes."""
        del timeout
        if self._task is None:
            return []
        task, self._task = self._task, None
        if self._watch is not None:
            self._watch(Event("started", task.id))
        progress = functools.partial(self._progress, task)
        result = attempt(self._perform, task, progress, self._threads, own_process=False)
        return [Event("finished", task.id, result=result)]

    def _progress(self, task: Task, phase: str, done: int, total: int) -> None:
        if self._cancelled is not None and self._cancelled():
            raise CancelledError(f"{task.job}: {task.title} was cancelled; what was finished is kept")
        if self._watch is not None:
            self._watch(Event("progress", task.id, phase, done, total, memory=resident_bytes()))

    def close(self, *, kill: bool) -> None:
        """Forgets what was not begun."""
        del kill
        self._task = None
