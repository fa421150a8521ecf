"""Does one task where it runs, and makes a result of whatever happens: one bad job must not end the others."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from quantpress.pipelines.batch.tasks import Task, TaskResult
from quantpress.pipelines.machine import machine_error, peak_rss
from quantpress.pipelines.progress import Progress
from quantpress.quant.errors import CancelledError, OutputError, QuantpressError

__all__ = ["PERFORM", "Perform", "attempt", "find_perform", "reset_peak_rss", "resident_bytes"]

Perform = Callable[[Task, Progress, int], TaskResult]
"""Does a task with so many threads; an error that a user can act on is a result and not an exception."""

PERFORM = "quantpress.pipelines.batch.perform:perform"
"""Where the one of batches is found, as "module:function"; workers import it."""

log = logging.getLogger(__name__)


def find_perform(name: str) -> Perform:
    """Imports what does the tasks."""
    module, _, function = name.partition(":")
    found: Perform = getattr(importlib.import_module(module), function)
    return found


def attempt(
    perform: str | Perform, task: Task, progress: Progress, threads: int, *, own_process: bool = True
) -> TaskResult:
    """Does a task; every error becomes its result, a bug's traceback is logged.

    Args:
        perform: does the task; as text "module:function".
        task: what to do.
        progress: told how far the work has come.
        threads: worker threads.
        own_process: whether the process is the executor's, so that its peak memory may be counted anew.

    Returns:
        The result, with time and peak memory where `perform` has not said them.
    """
    if own_process:
        reset_peak_rss()
    started = time.perf_counter()
    try:
        function = find_perform(perform) if isinstance(perform, str) else perform
        result = function(task, progress, threads)
    except QuantpressError as error:
        result = TaskResult(task.id, "failed", error=str(error), exit_code=error.exit_code)
    except MemoryError:
        result = TaskResult(task.id, "failed", error=_out_of_memory(task), exit_code=OutputError.exit_code)
    except Exception as error:  # the edge of a job: a bug in it, or in a plug-in, ends this job only
        said = machine_error(error)
        if said is None:
            log.exception("an error that nobody expected")
        code = QuantpressError.exit_code if said is None else OutputError.exit_code
        result = TaskResult(task.id, "failed", error=said or _bug(error), exit_code=code)
    if result.state == "failed" and result.exit_code == CancelledError.exit_code:
        result = dataclasses.replace(result, state="cancelled")
    return dataclasses.replace(
        result,
        seconds=result.seconds or time.perf_counter() - started,
        peak_rss=result.peak_rss or peak_rss(),
    )


def _out_of_memory(task: Task) -> str:
    wanted = f", {task.estimate.memory / 1e9:.1f} GB were expected" if task.estimate.memory else ""
    return f"memory ran out{wanted}; give the batch fewer workers or the job a smaller max_memory"


def _bug(error: Exception) -> str:
    """One line with the type of an unexpected error and the place it comes from."""
    text = " ".join(str(error).split())[:500]
    frames = traceback.extract_tb(error.__traceback__)
    place = f" (at {Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"internal error: {type(error).__name__}: {text}{place}"


def reset_peak_rss() -> None:
    """Lets the greatest resident size be counted anew, where the system can (proc_pid_clear_refs(5): Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def resident_bytes() -> int:
    """Gives the resident size of this process at this moment; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
