"""What a batch comes to: which outputs stand already, and the tasks that make the others."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.open import open_checkpoint
from quantpress.pipelines.batch.chain import walk
from quantpress.pipelines.batch.job_plan import JobPlan, PlannedOutput
from quantpress.pipelines.batch.plan_table import CACHED, TO_DO, PlanRow, shared_with
from quantpress.pipelines.batch.remote import fetch, is_url
from quantpress.pipelines.batch.sources import localized, model_place
from quantpress.pipelines.batch.specs import BatchSpec, JobSpec
from quantpress.pipelines.batch.tasks import Task
from quantpress.pipelines.cache.explain import History
from quantpress.pipelines.cache.input_hashes import InputHashes
from quantpress.pipelines.cache.store import Cache
from quantpress.pipelines.judging import JudgeOptions
from quantpress.pipelines.progress import Progress, no_progress
from quantpress.pipelines.stage import BuildingStage, PreparingStage
from quantpress.pipelines.verify_stage import Verify
from quantpress.quant.errors import InputError, QuantpressError, UsageError

__all__ = ["BatchPlan", "PlannedJob", "Planner", "label_of", "plan_batch", "resolve_device"]


@dataclass(frozen=True)
class PlannedJob:
    """A job.

    Attributes:
        spec: the job.
        outputs: in order; empty where the job cannot be planned.
        tasks: ids of all tasks that it needs, those of other jobs among them.
        error: why it cannot be planned.
    """

    spec: JobSpec
    outputs: tuple[PlannedOutput, ...] = ()
    tasks: tuple[str, ...] = ()
    error: QuantpressError | None = None


@dataclass(frozen=True)
class BatchPlan:
    """A batch.

    Attributes:
        spec: what was asked for.
        jobs: in order.
        tasks: each after those that it needs.
        rows: for people, in the order of jobs and stages.
        cache: holds the entries that the tasks read for as long as it is open.
    """

    spec: BatchSpec
    jobs: tuple[PlannedJob, ...]
    tasks: tuple[Task, ...]
    rows: tuple[PlanRow, ...]
    cache: Cache = field(repr=False)


def plan_batch(
    spec: BatchSpec, *, force: bool = False, fresh: bool = False, dry_run: bool = False, explain: bool = False,
    device_of: Callable[[str], str] | None = None, progress: Progress = no_progress,
) -> BatchPlan:  # fmt: skip
    """Plans a batch; reads headers, and hashes files that are not remembered.

    Args:
        spec: from `load_batch`.
        force: outputs may be replaced.
        fresh: nothing that earlier runs have kept is used; the outputs that they wrote are written anew.
        dry_run: nothing but the inputs' hashes is kept in the cache.
        explain: rows say why there is something to do.
        device_of: gives "cpu" or "cuda" for a job's `device`; default: what this machine has.
        progress: told how far the hashing has come.

    Raises:
        UsageError: the cache's folder is something else.
    """
    planner = Planner(spec, force, fresh, dry_run, explain, device_of or resolve_device, progress)
    jobs = tuple(planner.job(job) for job in spec.jobs)
    return BatchPlan(spec, jobs, tuple(planner.tasks.values()), planner.shown(), planner.cache)


class Planner:
    """What is known while jobs are planned one after the other.

    Attributes:
        force: outputs may be replaced.
        fresh: nothing that is kept may be used.
        cache: of the batch.
        tasks, rows: so far.
    """

    def __init__(
        self, spec: BatchSpec, force: bool, fresh: bool, dry_run: bool, explain: bool,
        device_of: Callable[[str], str], progress: Progress,
    ) -> None:  # fmt: skip
        self.force, self.fresh, self._dry_run = force, fresh, dry_run
        self._progress, self._device_of = progress, device_of
        self.cache, self._hashes = Cache(spec.cache, progress), InputHashes(spec.cache)
        self._history = History(self.cache) if explain else None
        self._models: dict[str, Checkpoint] = {}
        self._kept: dict[str, bool] = {}
        self._makers: dict[str, str] = {}  # key, or path of an output -> the job that makes it
        self.tasks: dict[str, Task] = {}
        self.rows: list[tuple[PlanRow, str]] = []

    def hashes(self, paths: Iterable[Path]) -> Mapping[Path, tuple[str, int]]:
        """Gives SHA-256 and size of files."""
        return self._hashes.hashes(paths, self._progress)

    def job(self, spec: JobSpec) -> PlannedJob:
        """Plans one job; what is wrong with it is its own failure, and nothing is done for it."""
        before = dict(self.tasks), list(self.rows), dict(self._makers)
        try:
            return self._planned(spec)
        except QuantpressError as error:
            self.tasks, self.rows, self._makers = before
            return PlannedJob(spec, error=error)

    def _planned(self, spec: JobSpec) -> PlannedJob:
        if spec.missing:
            raise InputError(spec.missing)
        device, folder = self._device_of(spec.settings.device), self.cache.folder
        place = model_place(spec.model, folder, self._progress)
        if place not in self._models:
            self._models[place] = open_checkpoint(place)
        judges = _judges(spec, device, folder, self._progress)
        local = partial(localized, cache=folder, progress=self._progress)
        part = JobPlan(self, spec, device)
        for step in walk(spec, self._models[place], self, device, lambda _: None, local):
            if isinstance(step.stage, PreparingStage):
                part.preparing(step)
            else:
                part.output(step, judges[step.index])
        return PlannedJob(spec, tuple(part.outputs), tuple(part.needed))

    def is_kept(self, key: str) -> bool:
        """Whether the cache has an entry, whole; it is held from now on."""
        if key not in self._kept:
            if self.fresh and not self._dry_run:
                self.cache.remove(key, work=True)
            self._kept[key] = not self.fresh and self.cache.find(key) is not None
        return self._kept[key]

    def state_of(self, key: str, job: str) -> str:
        """Says for people who makes an entry."""
        maker = self._makers.get(key, job)
        return shared_with(maker) if maker != job else CACHED if self.is_kept(key) else TO_DO

    def claim(self, path: str, job: str) -> None:
        """Notes who writes an output.

        Raises:
            UsageError: another output of the batch has the same place.
        """
        if path in self._makers:
            raise UsageError(f"{path}: job {self._makers[path]} writes this output too; give each its own name")
        self._makers[path] = job

    def add(self, task: Task, *, key: str = "", path: str = "") -> None:
        """Takes a task; one that another job has brought stays as it is."""
        if task.id in self.tasks:
            return
        self.tasks[task.id] = task
        if key:
            self._makers[key] = task.job
        if path:
            self.show(PlanRow(task.job, task.title, TO_DO, task.estimate, path), task.work.key)

    def show(self, row: PlanRow, key: str = "") -> None:
        """Takes a row for people."""
        self.rows.append((row, key))

    def shown(self) -> tuple[PlanRow, ...]:
        """Gives the rows with what their tasks take, and why there is something to do."""
        by_key = {task.work.key: task for task in self.tasks.values()}
        return tuple(self._filled(row, by_key.get(key)) for row, key in self.rows)

    def _filled(self, row: PlanRow, task: Task | None) -> PlanRow:
        if task is None or row.state != TO_DO:
            # a stage whose work nobody needs, for all that follows from it stands
            return replace(row, state=CACHED) if row.state == TO_DO else row
        if self._history is None:
            why: tuple[str, ...] = ()
        elif task.work.kind == "prove":
            why = ("it stands, and is to be proved in another way",)
        else:
            why = self._history.why(label_of(task), task.work.material)
        return replace(row, estimate=task.estimate, reasons=why)


def label_of(task: Task) -> str:
    """Names a task from run to run, whatever its options are."""
    return f"{task.work.job.name}/{task.work.index}/{task.work.kind.replace('prove', 'build')}"


def _judges(spec: JobSpec, device: str, cache: Path, progress: Progress) -> dict[int, JudgeOptions | None]:
    """Gives how each output is proved: by the next `verify` stage, else by what the job says."""
    common = replace(_local_text(spec.settings.judge, cache, progress), device=device)
    default = common if spec.settings.verify else None
    found: dict[int, JudgeOptions | None] = {}
    waiting: list[int] = []
    for index, call in enumerate(spec.stages):
        if isinstance(call.stage, Verify):
            said = localized(call.stage, cache=cache, progress=progress)
            assert isinstance(said, Verify)
            judge = said.judged(common)
            found |= dict.fromkeys(waiting, judge)
            waiting = []
        elif isinstance(call.stage, BuildingStage):
            waiting.append(index)
    return found | dict.fromkeys(waiting, default)


def _local_text(judge: JudgeOptions, cache: Path, progress: Progress) -> JudgeOptions:
    """Gives the options with a text that is on this machine."""
    text = judge.text
    return replace(judge, text=fetch(text, cache, progress)) if isinstance(text, str) and is_url(text) else judge


def resolve_device(device: str) -> str:
    """Turns "auto" into what is there, and does not load torch where no driver of a GPU is.

    Raises:
        OutputError: "cuda" was asked for and no CUDA device is usable.
    """
    from quantpress.pipelines.commands.options import resolve_device as resolve

    drivers = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
    if device == "auto" and sys.platform == "linux" and not any(map(os.path.exists, drivers)):
        return "cpu"
    return resolve(device)
