"""Shows a batch while it runs: one live view on a terminal, plain lines elsewhere, JSON for machines."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

from quantpress.pipelines.batch.lines import finished_line, is_error, is_wanted, log_line, phase_text
from quantpress.pipelines.batch.standing import Standing, TaskStanding
from quantpress.pipelines.batch.tasks import Event, Task, Watch
from quantpress.pipelines.batch.wording import duration, roughly, task_name
from quantpress.pipelines.progress import PLAIN_INTERVAL

__all__ = ["batch_display"]

_ETA_AFTER = 2 * PLAIN_INTERVAL  # seconds; before, a guess of what is left says little


@contextlib.contextmanager
def batch_display(
    tasks: Sequence[Task], *, quiet: bool = False, log_format: str = "text", stream: TextIO | None = None
) -> Iterator[Watch]:
    """Shows a batch until the block ends.

    Messages below the level of the root logger are left out, as everywhere in the program.

    Args:
        tasks: all tasks, each after those that it needs.
        quiet: nothing but errors.
        log_format: "text", or "json" for one object per line: "planned" for every task, then every event.
        stream: where to; standard error by default. On a terminal there is a live view.
    """
    stream = sys.stderr if stream is None else stream
    if log_format == "json":
        lines = JsonLines(stream, quiet=quiet)
        lines.plan(tasks)
        yield lines
    elif quiet:
        yield ErrorLines(stream, tasks)
    elif not stream.isatty():
        yield PlainLines(stream, Standing(tasks))
    else:
        from quantpress.pipelines.batch.live_view import live_view

        with live_view(Standing(tasks), stream) as watch:
            yield watch


class _Throttle:
    """Lets a task's progress through when its phase is new or finished, or the last line is old."""

    def __init__(self, standing: Standing) -> None:
        self._standing = standing
        self._last: dict[str, tuple[str, bool, float]] = {}

    def lets(self, event: Event) -> bool:
        now, finished = self._standing.now, event.done >= event.total
        phase, ended, when = self._last.get(event.task, ("", False, 0.0))
        if phase == event.phase and (ended or not finished) and now - when < PLAIN_INTERVAL:
            return False
        self._last[event.task] = event.phase, finished, now
        return True


class JsonLines:
    """One JSON object per line, for `--log-format json`."""

    def __init__(self, stream: TextIO, *, quiet: bool) -> None:
        self._stream, self._quiet = stream, quiet
        self._throttle = _Throttle(Standing(()))

    def plan(self, tasks: Sequence[Task]) -> None:
        """Says what there is to do, so that what follows can be told by its id."""
        if self._quiet:
            return
        for task in tasks:
            estimate = task.estimate
            record = {"event": "planned", "task": task.id, "job": task.job, "title": task.title, "needs": task.needs}
            sizes = {"bytes": estimate.output_bytes, "peak_memory": estimate.memory, "disk_needed": estimate.disk}
            self._write({**record, "estimate": {"seconds": round(estimate.seconds, 1), **sizes}})

    def __call__(self, event: Event) -> None:
        """Writes a line, unless it is progress that is told too often."""
        if self._quiet and not is_error(event):
            return
        if event.kind == "log" and not is_wanted(event):
            return
        if event.kind == "progress" and not self._throttle.lets(event):
            return
        self._write(dict(event.to_json()))

    def _write(self, record: dict[str, object]) -> None:
        self._stream.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._stream.flush()


class ErrorLines:
    """Failed tasks and errors alone, for `-q`."""

    def __init__(self, stream: TextIO, tasks: Sequence[Task]) -> None:
        self._stream, self._tasks = stream, {task.id: task for task in tasks}

    def __call__(self, event: Event) -> None:
        """Writes a line where something failed."""
        task = self._tasks.get(event.task)
        if task is None or not is_error(event):
            return
        line = log_line(task, event) if event.result is None else finished_line(task, event.result)
        self._stream.write(line + "\n")
        self._stream.flush()


class PlainLines:
    """A line per finished task, and every few seconds one of what goes on, for logs."""

    def __init__(self, stream: TextIO, standing: Standing) -> None:
        self._stream, self._standing = stream, standing
        self._last: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        """Writes a line where there is something to say."""
        each = self._standing.tell(event)
        if each is None:
            return
        line = ""
        if each.result is not None:
            place = f"[{self._standing.finished}/{len(self._standing.tasks)}]"
            line = f"{place} {finished_line(each.task, each.result)}"
        elif event.kind == "retried" or (event.kind == "log" and is_wanted(event)):
            line = log_line(each.task, event)
        elif event.kind == "progress":
            line = self._progress(each)
        if line:
            self._stream.write(line + "\n")
            self._stream.flush()

    def _progress(self, each: TaskStanding) -> str:
        """Says where a task is; nothing of one that has just begun or was spoken of a moment ago."""
        now = self._standing.now
        if each.started is None or now - self._last.setdefault(each.task.id, each.started) < PLAIN_INTERVAL:
            return ""
        self._last[each.task.id] = now
        line = f"{task_name(each.task)}: {phase_text(each)}, {duration(each.elapsed(now))}"
        left = self._standing.left() if self._standing.elapsed >= _ETA_AFTER else None
        return line if left is None else f"{line}; {roughly(left)} left for all"
