"""Decides which task runs when: in order, as soon as what it needs is done and the pool has room."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from graphlib import TopologicalSorter

from quantpress.pipelines.batch.tasks import Event, Task, TaskResult, Watch
from quantpress.pipelines.executors.pool import Pool
from quantpress.quant.errors import CancelledError

__all__ = ["run_tasks"]

_POLL = 0.2  # seconds between two looks at `cancelled`; events are told at once
_LOOK_AHEAD = 64  # ready tasks that are offered to the pool: a large one is passed by smaller ones, but not by all


def _never() -> bool:
    return False


def run_tasks(
    tasks: Sequence[Task], pool: Pool, watch: Watch, cancelled: Callable[[], bool] = _never
) -> dict[str, TaskResult]:
    """Runs all tasks and ends the pool, whatever happens.

    A task whose needs failed is "skipped"; its error names the task that failed, and its exit code is that one's. An
    exception that arrives here (Ctrl-C, one of `watch`) stops the workers and is raised again.

    Args:
        tasks: in the order in which they are to run where there is a choice.
        pool: where they run; it cannot be used again.
        watch: told every event, on this thread; tasks that never start get a "finished" too.
        cancelled: looked at several times a second; once it is True the workers are stopped, and what has not
            finished is "cancelled".

    Returns:
        Task's id -> what became of it, in the order of `tasks`.

    Raises:
        ValueError: two tasks have one id, or one needs a task that is not there, or itself.
    """
    run = _Run(tasks, pool, watch)
    try:
        while run.unfinished:
            if cancelled():
                run.cancel()
                break
            run.start_ready()
            if run.unfinished:
                run.tell(pool.events(_POLL))
    except BaseException:
        pool.close(kill=True)
        raise
    pool.close(kill=False)
    return {task.id: run.results[task.id] for task in tasks}


class _Run:
    """What is waiting, running and finished."""

    def __init__(self, tasks: Sequence[Task], pool: Pool, watch: Watch) -> None:
        """Checks the tasks.

        Raises:
            ValueError: two have one id, or one needs a task that is not there, or itself.
        """
        self._tasks = {task.id: task for task in tasks}
        if len(self._tasks) != len(tasks):
            raise ValueError("two tasks have the same id")
        for task in tasks:
            if missing := [need for need in task.needs if need not in self._tasks]:
                raise ValueError(f"task {task.id} needs {missing[0]}, which is not among the tasks")
        self._places = {task.id: place for place, task in enumerate(tasks)}
        self._order = TopologicalSorter({task.id: task.needs for task in tasks})
        self._order.prepare()
        self._ready: list[str] = []  # in the order of the tasks
        self._changed = True  # whether a start may succeed that has not before
        self._pool, self._watch = pool, watch
        self.results: dict[str, TaskResult] = {}

    @property
    def unfinished(self) -> bool:
        """Whether something is still to come."""
        return len(self.results) < len(self._tasks)

    def start_ready(self) -> None:
        """Starts what can be started, and skips what never can."""
        while self._order.is_active() and (found := self._order.get_ready()):
            self._changed = True
            for name in found:
                self._queue(self._tasks[name])
            self._ready.sort(key=self._places.__getitem__)
        if not self._changed:
            return
        self._changed = False
        for name in self._ready[:_LOOK_AHEAD]:
            task = self._tasks[name]
            if self._pool.has_room(task):
                self._ready.remove(name)
                self._pool.start(task)

    def _queue(self, task: Task) -> None:
        for need in task.needs:
            result = self.results[need]
            if result.state not in ("done", "cached"):
                self._end(task, "skipped", self._reason(self._tasks[need], result), result.exit_code)
                return
        self._ready.append(task.id)

    @staticmethod
    def _reason(need: Task, result: TaskResult) -> str:
        """Names the task that failed, which may be one that a skipped one needed."""
        if result.state == "skipped":
            return result.error
        return f"needs {need.title} of {need.job}, which {result.state}: {result.error}"

    def _end(self, task: Task, state: str, error: str, exit_code: int) -> None:
        result = TaskResult(task.id, state, error=error, exit_code=exit_code)
        self.tell([Event("finished", task.id, result=result)])

    def tell(self, events: Sequence[Event]) -> None:
        """Notes what has finished, and hands all events on."""
        for event in events:
            if event.kind == "finished" and event.result is not None:
                self.results[event.task] = event.result
                self._order.done(event.task)
                self._changed = True
            self._watch(event)

    def cancel(self) -> None:
        """Stops the workers; what finished in the meantime counts."""
        self._pool.close(kill=True)
        for event in self._pool.events(0):
            if event.kind == "finished" and event.result is not None:
                self.results[event.task] = event.result
                self._watch(event)
        for task in self._tasks.values():
            if task.id not in self.results:
                result = TaskResult(task.id, "cancelled", error="cancelled", exit_code=CancelledError.exit_code)
                self.results[task.id] = result
                self._watch(Event("finished", task.id, result=result))
