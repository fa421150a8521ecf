"""The live view of a batch on a terminal: what runs, what waits, and how far all of it has come."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO, cast

from rich.console import Console, Group
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from quantpress.pipelines.batch.lines import finished_line, is_wanted, log_line, phase_text
from quantpress.pipelines.batch.standing import Standing, TaskStanding
from quantpress.pipelines.batch.tasks import Event, TaskResult, Watch
from quantpress.pipelines.batch.wording import duration, printable, roughly
from quantpress.pipelines.commands.showing import size_text

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["LiveView", "live_view"]

_PER_SECOND = 4  # how often the view is drawn again; slow lines and recordings stay small
_BAR = 16  # columns: the line of the whole fits into 80
_ETA_AFTER = 3.0  # seconds; before, a guess of what is left says little


class LiveView:
    """Draws a batch in at most as many lines as the console has; what is finished goes up as lines that stay."""

    def __init__(self, standing: Standing, console: Console) -> None:
        self._standing, self._console = standing, console
        self._lock = threading.Lock()  # the view is drawn on a thread of its own

    def __call__(self, event: Event) -> None:
        """Takes an event in, and prints what stays on the screen."""
        with self._lock:
            each = self._standing.tell(event)
            lines = [] if each is None else self._lines(each, event)
        for line in lines:
            self._console.print(line, soft_wrap=True)

    def __rich__(self) -> RenderableType:
        """Gives the view as it is now."""
        with self._lock:
            return self._draw()

    def _lines(self, each: TaskStanding, event: Event) -> list[Text]:
        if event.kind == "retried" or (event.kind == "log" and is_wanted(event)):
            return [Text(log_line(each.task, event), style="yellow")]
        if each.result is None or not self._standing.job_finished(each.task.job):
            return []
        done = [(task, task.result) for task in self._standing.jobs[each.task.job] if task.result is not None]
        return [_finished(task, result) for task, result in done if _worth_a_line(result, len(done))]

    def _draw(self) -> RenderableType:
        running = self._standing.running
        waiting = [name for name, tasks in self._standing.jobs.items() if all(map(_waits, tasks))]
        room = max(0, self._console.height - 2)  # for the line of the whole, and one for the cursor
        fitting = running
        if len(running) + bool(waiting) > room:
            fitting = running[: max(0, room - 1 - bool(waiting))]
        notes = [f"and {len(running) - len(fitting)} more running"] if len(fitting) < len(running) else []
        notes += [f"{len(waiting)} waiting: {', '.join(map(printable, waiting))}"] if waiting else []
        rows = Table.grid(padding=(0, 2, 0, 0))
        for _ in range(5):
            rows.add_column(no_wrap=True, overflow="ellipsis")
        for each in fitting:
            rows.add_row(*_row(each, self._standing.now))
        quiet = [Text(note, style="dim", no_wrap=True, overflow="ellipsis") for note in notes[: room - len(fitting)]]
        return Group(*([rows] if fitting else []), *quiet, self._whole())

    def _whole(self) -> RenderableType:
        standing = self._standing
        total = len(standing.tasks)
        jobs = list(standing.jobs)
        finished = sum(standing.job_finished(name) for name in jobs)
        failed = sum(each.result is not None and each.result.state == "failed" for each in standing.tasks.values())
        words = [f"{finished}/{len(jobs)} jobs", f"{standing.finished}/{total} steps"]
        words += [f"{failed} failed"] if failed else []
        words += [duration(standing.elapsed)]
        left = standing.left() if standing.elapsed >= _ETA_AFTER else None
        words += [f"{roughly(left)} left"] if left is not None and standing.finished < total else []
        line = Table.grid(padding=(0, 2, 0, 0))
        line.add_column(no_wrap=True)
        line.add_column(no_wrap=True, overflow="ellipsis")
        line.add_row(ProgressBar(total=max(1, total), completed=standing.finished, width=_BAR), Text(", ".join(words)))
        return line


def _waits(each: TaskStanding) -> bool:
    return each.started is None and each.result is None


def _row(each: TaskStanding, now: float) -> tuple[Text, ...]:
    memory = size_text(each.memory) if each.memory else ""
    return (
        Text(printable(each.task.job), style="bold"),
        Text(printable(each.task.title)),
        Text(phase_text(each), style="cyan"),
        Text(duration(each.elapsed(now))),
        Text(memory),
    )


def _worth_a_line(result: TaskResult, steps: int) -> bool:
    """Of a finished job: its outputs, and what went wrong; other steps only where there is nothing else."""
    return steps == 1 or result.output is not None or result.state == "failed"


def _finished(task: TaskStanding, result: TaskResult) -> Text:
    styles = {"failed": "bold red", "skipped": "yellow", "cancelled": "yellow", "cached": "dim"}
    return Text(finished_line(task.task, result), style=styles.get(result.state, "green"))


@contextlib.contextmanager
def live_view(standing: Standing, stream: TextIO) -> Iterator[Watch]:
    """Draws the view until the block ends; then only the lines of what is finished are left.

    Messages of the program's own log are printed above the view meanwhile.
    """
    console = Console(file=stream, markup=False, highlight=False, emoji=False)
    view = LiveView(standing, console)
    above = cast(TextIO, FileProxy(console, stream))
    handlers = [
        each
        for each in logging.getLogger().handlers
        if isinstance(each, logging.StreamHandler) and each.stream is stream
    ]
    for handler in handlers:
        handler.setStream(above)
    try:
        with Live(view, console=console, refresh_per_second=_PER_SECOND, transient=True, redirect_stdout=False):
            yield view
    finally:
        above.flush()
        for handler in handlers:
            handler.setStream(stream)
