"""Units of work that a batch comes to, and what executors tell of them; all of it can be pickled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Estimate", "Event", "Task", "TaskResult", "Watch"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a task will take, found without reading a weight.

    Attributes:
        seconds: a guess by arithmetic; only its order of magnitude is meant.
        memory: bytes at the peak.
        disk: bytes that the task adds to the disk, while it runs, with its output.
        output_bytes: bytes of its output alone.
        gpu: whether it computes on a CUDA device.
    """

    seconds: float = 0.0
    memory: int = 0
    disk: int = 0
    output_bytes: int = 0
    gpu: bool = False


@dataclass(frozen=True, slots=True)
class Task:
    """One unit of work; two jobs that need the same codes or the same reference share one task.

    Attributes:
        id: unique in the batch.
        job: the (first) job that it is for.
        title: what a person reads: "gptq", "reference", "gguf Q8_0".
        needs: ids of the tasks that must be done before.
        work: what `quantpress.pipelines.batch.perform.perform` is to do.
        estimate: what it will take.
    """

    id: str
    job: str
    title: str
    needs: tuple[str, ...] = ()
    work: Any = None
    estimate: Estimate = field(default_factory=Estimate)


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What became of a task.

    Attributes:
        task: its id.
        state: "done", "cached" (nothing was left to do), "failed", "skipped" (one that it needs failed) or "cancelled".
        error: one line where it failed; the exit code that a command would have ended with.
        seconds, peak_rss: time, and bytes of the process that did it.
        output: of a task that writes an output: what the batch's results say of it, see `results.OutputResult`.
    """

    task: str
    state: str
    error: str = ""
    exit_code: int = 0
    seconds: float = 0.0
    peak_rss: int = 0
    output: Any = None


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a task.

    Attributes:
        kind: "started", "progress", "log", "retried" (its worker was lost) or "finished".
        task: id.
        phase, done, total: of "progress", as `Progress` has them.
        level, message: of "log" ("WARNING", ...) and "retried".
        memory: resident bytes of the worker at this moment, 0 where unknown.
        result: of "finished".
    """

    kind: str
    task: str
    phase: str = ""
    done: int = 0
    total: int = 0
    level: str = ""
    message: str = ""
    memory: int = 0
    result: TaskResult | None = None

    def to_json(self) -> Mapping[str, Any]:
        """Gives the event for `--log-format json`; nothing that is empty."""
        record: dict[str, Any] = {"event": self.kind, "task": self.task}
        if self.kind == "progress":
            record |= {"phase": self.phase, "done": self.done, "total": self.total}
        if self.message:
            record |= {"level": self.level.lower(), "message": self.message}
        if self.memory:
            record["memory"] = self.memory
        if self.result is not None:
            result = self.result
            record |= {"state": result.state, "seconds": result.seconds, "peak_rss": result.peak_rss}
            if result.error:
                record |= {"error": result.error, "exit_code": result.exit_code}
        return record


Watch = Callable[[Event], None]
"""What is told every event of a batch, on the thread that runs the batch."""
