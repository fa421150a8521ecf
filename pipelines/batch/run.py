"""Runs a pipeline file: plans it, has its tasks done, and says what became of every job."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quantpress.pipelines.batch.load import load_batch
from quantpress.pipelines.batch.outputs import restore
from quantpress.pipelines.batch.plan import BatchPlan, PlannedJob, label_of, plan_batch, resolve_device
from quantpress.pipelines.batch.remote import is_url
from quantpress.pipelines.batch.results import BatchResult, JobResult, OutputResult
from quantpress.pipelines.batch.tasks import Event, TaskResult, Watch
from quantpress.pipelines.cache.explain import History
from quantpress.pipelines.executors.schedule import run_tasks
from quantpress.pipelines.progress import Progress, no_progress
from quantpress.quant.errors import BusyError, OutputError, ParityError, UsageError

if TYPE_CHECKING:
    from quantpress.pipelines.executors.pool import Pool

__all__ = ["EXECUTORS", "device_on", "require_disk", "run_batch", "run_pipeline"]

log = logging.getLogger(__name__)

EXECUTORS = ("local", "ray")


def run_pipeline(
    path: Path | str,
    *,
    jobs: Sequence[str] = (),
    sets: Mapping[str, object] | Sequence[str] = (),
    executor: str = "local",
    workers: int | None = None,
    force: bool = False,
    fresh: bool = False,
    cancel: threading.Event | None = None,
    watch: Watch | None = None,
    progress: Progress = no_progress,
) -> BatchResult:
    """Runs the jobs of a pipeline file; what earlier runs have made and still stands is not made again.

    Args:
        path: the file (INTERFACE: Pipeline files).
        jobs: names of the jobs to run, or patterns as in `smol-*`; all of them if empty.
        sets: values in place of the file's: variables, or keys with dots, `{"defaults.device": "cpu"}` or
            `["defaults.device=cpu"]`.
        executor: "local", processes of this machine, or "ray".
        workers: tasks at once; None for what fits; 0 for this very process, one after another.
        force: existing outputs may be replaced.
        fresh: use nothing that earlier runs have kept.
        cancel: once it is set, workers are stopped and what has not finished is "cancelled".
        watch: told every event of every task, on this thread.
        progress: told how far the hashing of inputs has come, before the first task.

    Returns:
        What became of every job; a job that failed is no exception, see `BatchResult.require_success`.

    Raises:
        UsageError: the file, or an argument, is wrong.
        OutputError: the disk has no room for the outputs, or Ray is not installed.
    """
    spec = load_batch(path, sets=_flags(sets), jobs=tuple(jobs))
    plan = plan_batch(spec, force=force, fresh=fresh, device_of=device_on(executor), progress=progress)
    require_disk(plan)
    return run_batch(plan, executor=executor, workers=workers, cancel=cancel, watch=watch)


def run_batch(
    plan: BatchPlan,
    *,
    executor: str = "local",
    workers: int | None = None,
    cancel: threading.Event | None = None,
    watch: Watch | None = None,
) -> BatchResult:
    """Does what is planned; see `run_pipeline`."""
    start = time.perf_counter()
    cancelled = (lambda: False) if cancel is None else cancel.is_set
    tell = _holding(plan, watch if watch is not None else _logged)
    results: dict[str, TaskResult] = {}
    if plan.tasks:
        pool = _pool(plan, executor, workers, tell, cancelled)
        results = run_tasks(plan.tasks, pool, tell, cancelled)
    _remember(plan, results)
    jobs = tuple(_job_result(job, results) for job in plan.jobs)
    plan.cache.close()
    return BatchResult(plan.spec.path, jobs, time.perf_counter() - start)


def _flags(sets: Mapping[str, object] | Sequence[str]) -> tuple[str, ...]:
    """Gives values as `--set` has them; what is no text is written as JSON, which YAML reads."""
    if not isinstance(sets, Mapping):
        return tuple(sets)
    return tuple(f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in sets.items())


def require_disk(plan: BatchPlan) -> None:
    """Checks that the disks have room for everything that is to be written.

    Raises:
        OutputError: one has not, naming what is needed and what is free.
    """
    needed: dict[int, tuple[Path, int, int]] = {}
    for task in plan.tasks:
        work, estimate = task.work, task.estimate
        place = work.cache if work.kind in ("prepare", "reference") or is_url(work.path) else Path(work.path).parent
        folder = _existing(place)
        device = folder.stat().st_dev
        _, kept, most = needed.get(device, (folder, 0, 0))
        needed[device] = (folder, kept + estimate.output_bytes, max(most, estimate.disk - estimate.output_bytes))
    for folder, kept, most in needed.values():
        free = shutil.disk_usage(folder).free
        if free < kept + most:
            raise OutputError(
                f"{plan.spec.path}: {kept + most} bytes are needed and {free} are free on the disk of {folder}:"
                f" {kept} for what stays and {most} for the work on it"
            )


def _existing(folder: Path) -> Path:
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def _pool(plan: BatchPlan, executor: str, workers: int | None, watch: Watch, cancelled: Callable[[], bool]) -> Pool:
    if executor not in EXECUTORS:
        raise UsageError(f"--executor {executor}: must be one of {', '.join(EXECUTORS)}")
    if executor == "ray":
        from quantpress.pipelines.executors.ray_pool import RayPool

        return RayPool(workers, cache=plan.cache.folder)
    stores = any(task.work.path.startswith("memory://") for task in plan.tasks)
    if workers == 0 or stores:  # what fsspec keeps in memory is seen by this process alone
        from quantpress.pipelines.executors.inline import InlinePool

        return InlinePool(watch, cancelled=cancelled)
    from quantpress.pipelines.executors.local import LocalPool

    return LocalPool(workers)


def device_on(executor: str) -> Callable[[str], str]:
    """Gives what turns a job's device into "cpu" or "cuda": on other machines "auto" is the processor."""
    return resolve_device if executor == "local" else lambda device: "cpu" if device == "auto" else device


def _holding(plan: BatchPlan, watch: Watch) -> Watch:
    """Gives a watch that first holds what a task has kept: `cache prune` must not take it before others read it."""
    works = {task.id: task.work for task in plan.tasks}

    def tell(event: Event) -> None:
        if event.result is not None and event.result.state == "done":
            work = works[event.task]
            if work.kind in ("prepare", "reference"):
                with contextlib.suppress(OutputError, BusyError):
                    plan.cache.hold(work.key)
        watch(event)

    return tell


def _logged(event: Event) -> None:
    """Hands what workers log on to this process's logging, where nobody watches."""
    if event.message:
        level = logging.getLevelName(event.level)
        log.log(level if isinstance(level, int) else logging.WARNING, "%s", event.message)


def _remember(plan: BatchPlan, results: Mapping[str, TaskResult]) -> None:
    """Keeps what was asked for, so that the next run can say what has changed."""
    history = History(plan.cache)
    for task in plan.tasks:
        if results[task.id].state == "done":
            with contextlib.suppress(OutputError):
                history.remember(label_of(task), task.work.material)


def _job_result(job: PlannedJob, results: Mapping[str, TaskResult]) -> JobResult:
    name = job.spec.name
    if job.error is not None:
        return JobResult(
            name, "failed", error=" ".join(str(job.error).split()), exit_code=job.error.exit_code, model=job.spec.model
        )
    outputs = list[OutputResult]()
    error, exit_code, state = "", 0, ""
    for need in job.tasks:
        result = results[need]
        if result.state != "done" and not state:
            state, error, exit_code = (
                "cancelled" if result.state == "cancelled" else "failed",
                result.error,
                result.exit_code,
            )
    for output in job.outputs:
        found = results[output.task].output if output.task else None
        if output.standing is not None:
            restore(output.standing)
            found = output.standing.result("cached")
            parity = found.parity
            if parity is not None and not parity["passed"] and not state:
                state, error, exit_code = "failed", f"{found.path}: {parity['reason']}", ParityError.exit_code
        if found is not None:
            outputs.append(found)
    proved = all(output.parity is not None for output in outputs)
    return JobResult(
        name, state or ("verified" if proved else "written"), tuple(outputs), error, exit_code,
        cached=not job.tasks, seconds=sum(results[task].seconds for task in job.tasks), model=job.spec.model,
    )  # fmt: skip
