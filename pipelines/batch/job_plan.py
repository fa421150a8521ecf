"""Plans one job: which of its outputs stand, and the tasks for the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantpress.convert.arch.registry import find_arch
from quantpress.convert.atomic import check_replaceable
from quantpress.pipelines.batch import estimates
from quantpress.pipelines.batch.chain import Known, Step
from quantpress.pipelines.batch.outputs import Standing, find_standing, output_material
from quantpress.pipelines.batch.plan_table import CACHED, PlanRow
from quantpress.pipelines.batch.remote import check_publishable, is_url, remote_target
from quantpress.pipelines.batch.specs import JobSpec
from quantpress.pipelines.batch.tasks import Estimate, Task
from quantpress.pipelines.batch.work import Proof, Work
from quantpress.pipelines.cache.keys import key_of
from quantpress.pipelines.judging import JudgeOptions
from quantpress.pipelines.own_inputs import paths_in, refuse_own_input
from quantpress.pipelines.reference_material import reference_material, shareable_base, sized
from quantpress.pipelines.sidecar import environment, version_of
from quantpress.pipelines.stage import BuildingStage, Plan, PreparingStage, Stage
from quantpress.quant.errors import UnknownFamilyError

if TYPE_CHECKING:
    from quantpress.pipelines.batch.plan import Planner

__all__ = ["JobPlan", "PlannedOutput"]

_RUNTIMES = ("llama-cpp-python", "onnxruntime", "torch", "xllamacpp")
_FORMS = {"gguf": False, "onnx": True, "quantize": True, "safetensors": True}  # whether a folder is written
_TITLED = ("outtype", "precision", "format", "bits", "dtype")


@dataclass(frozen=True)
class PlannedOutput:
    """An output of a job.

    Attributes:
        stage: name of its stage.
        path: where it goes, a path or a URL.
        task: id of the task that makes or proves it; empty where it stands.
        standing: what stands there, where nothing is left to do.
    """

    stage: str
    path: str
    task: str = ""
    standing: Standing | None = None


@dataclass
class JobPlan:
    """What is found out about a job, stage by stage."""

    planner: Planner
    spec: JobSpec
    device: str
    outputs: list[PlannedOutput] = field(default_factory=list)
    needed: dict[str, None] = field(default_factory=dict)
    _preparing: dict[str, Step] = field(default_factory=dict)
    _shown: set[str] = field(default_factory=set)

    @property
    def gpu(self) -> bool:
        """Whether models run on a GPU."""
        return self.device.startswith("cuda")

    def preparing(self, step: Step) -> None:
        """Takes a stage whose work is kept; it is done only if an output needs it."""
        self._preparing[step.key] = step
        title = title_of(step.stage)
        self.planner.show(PlanRow(self.spec.name, title, self.planner.state_of(step.key, self.spec.name)), step.key)

    def output(self, step: Step, judge: JudgeOptions | None) -> None:
        """Takes a stage that writes.

        Raises:
            QuantpressError: it cannot be written.
        """
        stage, planner = step.stage, self.planner
        assert isinstance(stage, BuildingStage)
        plan = stage.plan(step.before.checkpoint)
        path = self._path(step, plan)
        planner.claim(path, self.spec.name)
        material = output_material(step.material or {}, path, planner.cache.folder)
        key = key_of(material)
        known = find_standing(planner.cache, material, path, planner)
        proof = self._proof(step, judge) if judge is not None and stage.proved and not _only_vocabulary(stage) else None
        standing = None if planner.fresh else known
        title = title_of(stage)
        if standing is not None and (proof is None or standing.record["verdict"] == proof.key):
            self.outputs.append(PlannedOutput(stage.name, path, standing=standing))
            row = PlanRow(self.spec.name, title, CACHED, Estimate(output_bytes=plan.output_bytes), path)
            planner.show(row)
            return
        force = planner.force or known is not None
        if standing is None and not force and not planner.cache.was_begun(key):
            self._refuse_existing(path, stage, key)
        self._refuse_inputs(path, step, judge)
        again = standing is not None and proof is not None and proof.reference and not is_url(path)
        kind = "prove" if again else "build"
        work = self._work(kind, step.index, key, material, path=path, proof=proof, force=force)
        needs = () if kind == "prove" else self._needs(step.before.needs)
        if proof is not None and proof.reference:
            needs = (*needs, *self._reference(step, proof))
        estimate = estimates.building(
            plan, stage, step.before.checkpoint, judge if proof else None, gpu=self.gpu
        )  # fmt: skip
        task = Task(
            f"{self.spec.name}: {title} [{len(self.outputs) + 1}]", self.spec.name, title, needs, work, estimate
        )
        planner.add(task, path=path)
        self.needed[task.id] = None
        self.outputs.append(PlannedOutput(stage.name, path, task.id))

    def _path(self, step: Step, plan: Plan) -> str:
        remote = self.spec.stages[step.index].remote
        return remote_target(remote, plan.output.name) if remote else str(plan.output.absolute())

    def _work(self, kind: str, index: int, key: str, material: Mapping[str, Any], **more: Any) -> Work:
        return Work(kind, self.spec, index, self.planner.cache.folder, self.device, key, material, **more)

    def _needs(self, keys: tuple[str, ...]) -> tuple[str, ...]:
        """Gives the tasks that make what an output reads, and adds those that are not there."""
        tasks: tuple[str, ...] = ()
        for key in keys:
            if self.planner.is_kept(key):
                continue
            step = self._preparing[key]
            stage = step.stage
            assert isinstance(stage, PreparingStage)
            estimate = estimates.preparing(stage, step.before.checkpoint, gpu=self.gpu)
            work = self._work("prepare", step.index, key, step.material or {})
            task = Task(f"{stage.name} {key[:16]}", self.spec.name, title_of(stage), tasks, work, estimate)
            self.planner.add(task, key=key)
            self.needed[task.id] = None
            tasks = (*tasks, task.id)
        return tasks

    def _proof(self, step: Step, judge: JudgeOptions) -> Proof:
        """Says how an output is proved, and with what is kept of the source."""
        point = step.before
        material = _judged_on(point.yardstick, judge, self.device)
        reference = key_of(material) if material else ""
        base = point.known(shareable_base(judge, point.yardstick.checkpoint)) if material else None
        beside = _judged_on(base, sized(judge, point.yardstick.checkpoint), self.device) if base else {}
        limits = {name: getattr(judge, name) for name in ("runtime", "max_kld", "max_ppl_change", "min_top1")}
        runtimes = {name: version_of(name) or "" for name in _RUNTIMES}
        verdict = {"reference": reference, "limits": limits, "runtimes": runtimes}
        if material and find_arch(point.yardstick.checkpoint.config).kind == "encoder":
            return Proof(judge, "", {}, key_of(verdict))  # nothing is kept of these: they are run with each output
        return Proof(judge, reference, material, key_of(verdict), key_of(beside) if beside else "", beside)

    def _reference(self, step: Step, proof: Proof) -> tuple[str, ...]:
        """Gives the tasks that run the source, and the base of its adapters, on the judge's text."""
        source, needs = step.before.yardstick.checkpoint, tuple[str, ...]()
        for key, material, title in (
            (proof.base, proof.base_material, "reference of the base"),
            (proof.reference, proof.material, "reference"),
        ):
            if not key:
                continue
            state = self.planner.state_of(key, self.spec.name)
            if not self.planner.is_kept(key):
                work = self._work("reference", step.index, key, material, proof=proof)
                estimate = estimates.reference(proof.judge, source, gpu=self.gpu)
                task = Task(f"reference {key[:16]}", self.spec.name, title, needs, work, estimate)
                self.planner.add(task, key=key)
                self.needed[task.id] = None
                needs = (*needs, task.id)
            if key not in self._shown:
                self._shown.add(key)
                self.planner.show(PlanRow(self.spec.name, title, state), key)
        return needs

    def _refuse_existing(self, path: str, stage: Stage, key: str) -> None:
        """Refuses an output where something stands that this job has not written.

        Raises:
            UsageError: see above.
        """
        if not is_url(path):
            check_replaceable(path, force=False)
        elif stage.name in _FORMS:  # what others write is known when it is written; it is looked at again then
            entry = self.planner.cache.peek(key)
            outputs = None if entry is None else entry.record["outputs"]
            check_publishable(path, folder=_FORMS[stage.name], force=False, outputs=outputs)

    def _refuse_inputs(self, path: str, step: Step, judge: JudgeOptions | None) -> None:
        if not is_url(path):
            texts = [*paths_in(step.stage, but="output"), *paths_in(judge)]
            files = [file.path for file in step.before.upstream.source.files]
            refuse_own_input(Path(path), [*files, *texts])


def title_of(stage: Stage) -> str:
    """Names a stage for people: "gguf Q8_0", "gptq 4 bits"."""
    found = [str(getattr(stage, name)) for name in _TITLED if getattr(stage, name, None) not in (None, "")]
    return " ".join([stage.name, *found[:2]])


def _judged_on(yardstick: Known, judge: JudgeOptions, device: str) -> dict[str, Any]:
    """What is kept of a source for judging depends on; nothing where no table says how to run the source."""
    try:
        find_arch(yardstick.checkpoint.config)
    except UnknownFamilyError:
        return {}
    return {
        "reference": reference_material(judge, yardstick.checkpoint),
        "environment": environment(device),
        "input": yardstick.material,
    }


def _only_vocabulary(stage: Stage) -> bool:
    return bool(getattr(stage, "vocab_only", False))
