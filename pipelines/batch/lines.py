"""What is said of one task in one line."""

from __future__ import annotations

import logging

from quantpress.pipelines.batch.results import OutputResult
from quantpress.pipelines.batch.standing import TaskStanding
from quantpress.pipelines.batch.summary_table import verdict
from quantpress.pipelines.batch.tasks import Event, Task, TaskResult
from quantpress.pipelines.batch.wording import duration, error_line, printable, task_name
from quantpress.pipelines.commands.showing import size_text

__all__ = ["finished_line", "is_error", "is_wanted", "log_line", "phase_text"]


def phase_text(each: TaskStanding) -> str:
    """Gives a task's phase and how much of it is done: "quantizing 43 %"."""
    phase = printable(each.phase) or "running"
    return phase if each.share is None else f"{phase} {int(100 * each.share)} %"


def finished_line(task: Task, result: TaskResult) -> str:
    """Says what became of a task: "smol: gguf Q8_0 done, 144.8 MB, verified (KLD 0.004), 4.2 s, 210.0 MB of memory"."""
    name = task_name(task)
    if result.state == "cached":
        return ", ".join((f"{name} cached", *_output(result.output)))
    if result.state != "done":
        state = "FAILED" if result.state == "failed" else result.state
        return f"{name} {state}: {error_line(result.error)}" if result.error else f"{name} {state}"
    memory = (f"{size_text(result.peak_rss)} of memory",) if result.peak_rss else ()
    return ", ".join((f"{name} done", *_output(result.output), duration(result.seconds), *memory))


def _output(output: object) -> tuple[str, ...]:
    """Size and verdict, of a task that writes an output."""
    if not isinstance(output, OutputResult):
        return ()
    if output.parity is None:
        return (size_text(output.nbytes),)
    divergence = output.parity.get("mean_kld")
    figure = f" (KLD {divergence:.2g})" if isinstance(divergence, float) and output.parity.get("tokens") else ""
    return size_text(output.nbytes), f"{verdict(output)}{figure}"


def log_line(task: Task, event: Event) -> str:
    """Gives a message of a task as the program's own messages look; further lines of it are indented."""
    level = event.level.upper() or "WARNING"
    first, *more = event.message.splitlines() or [""]
    if not first and event.kind == "retried":
        first = "its worker was lost; it is tried again"
    return "\n  ".join((f"{level}: {task_name(task)}: {printable(first)}", *map(printable, more)))


def is_error(event: Event) -> bool:
    """Whether an event is to be told even when nothing else is."""
    if event.result is not None:
        return event.result.state == "failed"
    return event.kind == "log" and _level(event) >= logging.ERROR


def is_wanted(event: Event) -> bool:
    """Whether a message is of a level that the program's log lets through."""
    return _level(event) >= logging.getLogger().getEffectiveLevel()


def _level(event: Event) -> int:
    found = logging.getLevelName(event.level.upper())
    return found if isinstance(found, int) else logging.WARNING
