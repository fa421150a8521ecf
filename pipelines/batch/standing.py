"""Where a batch stands, told by events: what runs, what waits, and when it may be finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from quantpress.pipelines.batch.tasks import Event, Task, TaskResult

__all__ = ["Standing", "TaskStanding"]

_PRIOR = 10.0  # seconds for which estimates are believed before what tasks really took corrects them
_STEADY = 2.0  # seconds of a phase after which its speed says when it ends


@dataclass(slots=True)
class TaskStanding:
    """Where one task stands.

    Attributes:
        started: when its (last) worker began with it; None while it waits.
        phase, done, total: as its last progress said.
        phase_started, phase_base: when the phase was first heard of, and how much of it was done then.
        memory: resident bytes of its worker, 0 where unknown.
        result: what became of it; None until then.
    """

    task: Task
    started: float | None = None
    phase: str = ""
    done: int = 0
    total: int = 0
    phase_started: float = 0.0
    phase_base: int = 0
    memory: int = 0
    result: TaskResult | None = None

    @property
    def running(self) -> bool:
        """Whether a worker is at it."""
        return self.started is not None and self.result is None

    @property
    def share(self) -> float | None:
        """How much of the phase is done, from 0 to 1; None where nothing was said."""
        return min(1.0, max(0.0, self.done / self.total)) if self.total > 0 else None

    def elapsed(self, now: float) -> float:
        """Seconds since it was started."""
        return max(0.0, now - self.started) if self.started is not None else 0.0

    def phase_left(self, now: float) -> float:
        """Seconds that the phase goes on at the speed it had; 0 where that cannot be said yet."""
        moved, spent = self.done - self.phase_base, now - self.phase_started
        if not self.running or moved <= 0 or spent < _STEADY:
            return 0.0
        return spent * max(0, self.total - self.done) / moved


class Standing:
    """The tasks of a batch.

    Args:
        tasks: all of them, each after those that it needs.
        clock: gives seconds that only grow.
    """

    def __init__(self, tasks: Iterable[Task], clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._most_at_once = 1
        self.tasks: Mapping[str, TaskStanding] = {task.id: TaskStanding(task) for task in tasks}
        self.jobs: dict[str, list[TaskStanding]] = {}
        for each in self.tasks.values():
            self.jobs.setdefault(each.task.job, []).append(each)

    @property
    def now(self) -> float:
        """The clock's time."""
        return self._clock()

    @property
    def elapsed(self) -> float:
        """Seconds since the batch began."""
        return self.now - self._began

    @property
    def finished(self) -> int:
        """How many tasks are finished, whatever became of them."""
        return sum(each.result is not None for each in self.tasks.values())

    @property
    def running(self) -> list[TaskStanding]:
        """Tasks that are worked on, in the order of the batch."""
        return [each for each in self.tasks.values() if each.running]

    def job_finished(self, job: str) -> bool:
        """Whether every task of a job is finished."""
        return all(each.result is not None for each in self.jobs[job])

    def tell(self, event: Event) -> TaskStanding | None:
        """Takes an event in; gives the task that it speaks of, None where there is no such task."""
        each = self.tasks.get(event.task)
        if each is None:
            return None
        each.memory = event.memory or each.memory
        if event.kind == "finished":
            each.result = event.result or TaskResult(event.task, "failed", error="ended without a result")
        elif event.kind in ("started", "retried"):
            each.started, each.phase, each.done, each.total = self.now, "", 0, 0
            self._most_at_once = max(self._most_at_once, len(self.running))
        elif event.kind == "progress":
            if event.phase != each.phase or event.done < each.done:
                each.phase, each.phase_started, each.phase_base = event.phase, self.now, event.done
            each.done, each.total = event.done, event.total
        return each

    def left(self) -> float | None:
        """Guesses the seconds until the last task is finished; None where there is nothing to guess from.

        Estimates are scaled by what finished tasks took. No schedule ends before the longest chain of tasks that need
        each other, nor before all work divided by the tasks that go on at once (Graham, Bounds on Multiprocessing
        Timing Anomalies, 1969); the later of the two is given.
        """
        scale, typical, now = self._scale(), self._typical(), self.now
        ends: dict[str, float] = {}
        work = 0.0
        for name, each in self.tasks.items():
            ends[name] = max((ends.get(need, 0.0) for need in each.task.needs), default=0.0)
            if each.result is not None:
                continue
            whole = scale * each.task.estimate.seconds or typical
            if whole is None:
                return None
            left = max(whole - each.elapsed(now), each.phase_left(now))
            work += left
            ends[name] += left
        return max(max(ends.values(), default=0.0), work / self._most_at_once)

    def _scale(self) -> float:
        """How many times longer tasks take than was estimated."""
        done = [
            (each.result.seconds, each.task.estimate.seconds)
            for each in self.tasks.values()
            if each.result is not None and each.result.state == "done" and each.task.estimate.seconds > 0
        ]
        return (sum(took for took, _ in done) + _PRIOR) / (sum(guess for _, guess in done) + _PRIOR)

    def _typical(self) -> float | None:
        """Seconds of a task of which nothing was estimated: the mean of those that were done."""
        took = [each.result.seconds for each in self.tasks.values() if each.result and each.result.state == "done"]
        return sum(took) / len(took) if took else None
