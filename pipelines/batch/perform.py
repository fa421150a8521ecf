"""Does one task of a batch; this is what workers run."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantpress.convert.disk import remove
from quantpress.convert.open import open_checkpoint
from quantpress.pipelines.batch.chain import Step, walk
from quantpress.pipelines.batch.outputs import OUTPUT, Standing, find_standing, keep, output_material
from quantpress.pipelines.batch.remote import is_url, publish
from quantpress.pipelines.batch.sources import localized, model_place
from quantpress.pipelines.batch.tasks import Task, TaskResult
from quantpress.pipelines.batch.work import Proof, Work
from quantpress.pipelines.cache.input_hashes import InputHashes
from quantpress.pipelines.cache.keys import key_of
from quantpress.pipelines.cache.store import Cache
from quantpress.pipelines.machine import peak_rss
from quantpress.pipelines.progress import Progress
from quantpress.pipelines.reference_material import sized
from quantpress.pipelines.stage import BuildingStage, PreparingStage, RunContext
from quantpress.quant.errors import InputError, ParityError, QuantpressError

if TYPE_CHECKING:
    from quantpress.pipelines.judging import JudgeOptions
    from quantpress.pipelines.verification import Reference

__all__ = ["PROBLEM", "perform"]

PROBLEM = "problem"
"""Key of a reference's record: why nothing can judge the model's outputs."""

_OWN = {"begun": True}  # note of a run: what stands at the output from now on is this work's own


def perform(task: Task, progress: Progress, threads: int) -> TaskResult:
    """Does a task.

    Args:
        task: whose work is a `Work`.
        progress: told how far the work has come.
        threads: that it may use.

    Returns:
        What became of it; an error that names something the user can change is a result, not an exception.
    """
    work, start = task.work, time.perf_counter()
    assert isinstance(work, Work)
    settings = work.job.settings
    context = RunContext(
        progress=progress, threads=settings.threads or threads, device=work.device, max_memory=settings.max_memory,
        force=work.force, allow_nonfinite=settings.allow_nonfinite,
    )  # fmt: skip
    try:
        standing = _KINDS[work.kind](_Bench(work, context), context)
        result = TaskResult(task.id, "done") if standing is None else _judged(task, standing)
    except QuantpressError as error:
        result = TaskResult(task.id, "failed", " ".join(str(error).split()), error.exit_code)
    return replace(result, seconds=time.perf_counter() - start, peak_rss=peak_rss())


def _judged(task: Task, standing: Standing) -> TaskResult:
    """Makes a result of an output: a proof that is not passed is a failure."""
    output, parity = standing.result("done"), standing.sidecar.get("parity")
    if parity is None or parity["passed"]:
        return TaskResult(task.id, "done", output=output)
    error = f"{output.path}: {parity['reason']}"
    return TaskResult(task.id, "failed", error, ParityError.exit_code, output=output)


class _Bench:
    """What a task works with: the cache, hashes of files, and the job's model up to the stage that is meant."""

    def __init__(self, work: Work, context: RunContext) -> None:
        self.work, self._threads, progress = work, context.threads, context.progress
        self.cache, self.hashes = Cache(work.cache, progress), InputHashes(work.cache)
        self.local = partial(localized, cache=work.cache, progress=progress)
        self.source = open_checkpoint(model_place(work.job.model, work.cache, progress))

    def step(self, *, planned: bool = False) -> Step:
        """Walks the job to the stage.

        Args:
            planned: whether what stages before it prepare is only planned with: it may not be finished yet.

        Raises:
            InputError: what it is made from has changed since the batch was planned.
        """
        work = self.work
        folder_of = _not_yet if planned else self.folder
        steps = walk(work.job, self.source, self.hashes, work.device, folder_of, self.local, self._threads)
        return next(step for step in steps if step.index == work.index)

    def expect(self, key: str) -> None:
        """Compares a key with that of the plan.

        Raises:
            InputError: they differ.
        """
        if key != self.work.key:
            raise InputError(
                f"{self.work.job.model}: an input has changed since the batch was planned, or packages or processor of"
                " this worker are others than where it was planned; run it again"
            )

    def folder(self, key: str) -> Path:
        entry = self.cache.find(key)
        if entry is None:
            raise InputError(f"{self.work.cache}: an entry was removed while the batch ran; run it again")
        return entry.folder


def _not_yet(key: str) -> None:
    del key


def _prepare(bench: _Bench, context: RunContext) -> None:
    work, step = bench.work, bench.step()
    bench.expect(step.key)
    stage = step.stage
    assert isinstance(stage, PreparingStage)
    with bench.cache.making(work.key, stage.name, work.material) as making:
        if making.entry is None:
            stage.prepare(step.before.checkpoint, making.folder, context)
            making.commit({})


def _reference(bench: _Bench, context: RunContext) -> None:
    from quantpress.pipelines.kept_reference import make_reference

    work, proof = bench.work, _proof(bench.work)
    source, judge, without = bench.step(planned=True).before.upstream.source, _judge(proof, context), None
    if work.key == proof.base:
        assert source.adapted is not None
        source, judge = source.adapted.base, sized(judge, source)
    elif proof.base:
        without = bench.folder(proof.base)
    with bench.cache.making(work.key, "reference", work.material) as making:
        if making.entry is not None:
            return
        try:
            make_reference(source, judge, making.folder, context, without=without)
            making.commit({})
        except InputError as error:
            from quantpress.pipelines.runner import only_mergeable

            if not only_mergeable(source):
                raise
            making.commit({PROBLEM: str(error)})


def _build(bench: _Bench, context: RunContext) -> Standing:
    work, step = bench.work, bench.step()
    bench.expect(key_of(output_material(step.material or {}, work.path, bench.cache.folder)))
    with bench.cache.making(work.key, OUTPUT, work.material) as making:
        if making.entry is not None:
            standing = find_standing(bench.cache, work.material, work.path, bench.hashes)
            if standing is not None and _is_proved(standing, work.proof) and not work.force:
                return standing  # another run has made it meanwhile
            making.redo()
        local = _local_place(work)
        context = replace(context, force=context.force or making.note == _OWN or is_url(work.path))
        assert isinstance(step.stage, BuildingStage)
        stage = replace(step.stage, output=local)
        stage.check_output(step.before.checkpoint, context)
        making.write_note(_OWN)
        try:
            record, sidecar = _pressed(bench, step, stage, context)
        except BaseException:
            if not os.path.lexists(local):
                making.drop_note()
            raise
        if is_url(work.path):
            record["remote"] = publish(local, work.path, force=work.force, progress=context.progress)
            remove(local.parent)
        return keep(making, record, sidecar)


def _pressed(
    bench: _Bench, step: Step, stage: BuildingStage, context: RunContext
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Writes and proves an output; gives what the cache keeps of it, and its sidecar's contents."""
    from quantpress.pipelines.runner import press

    work, point = bench.work, step.before
    judge = None if work.proof is None else _judge(work.proof, context)
    with bench.hashes.background() as hashes:
        pressed = press(
            point.checkpoint, stage, context, judge=judge, reference=_opened(bench, step, context), hashes=hashes,
            upstream=point.upstream,
        )  # fmt: skip
    artifact = pressed.artifact
    record = {
        "path": work.path,
        "stage": stage.name,
        "kind": artifact.kind,
        "ftype": artifact.ftype,
        "judged_as": artifact.judged_as or artifact.ftype,
        "folder": artifact.path.is_dir(),
        "outputs": [{"name": out.name, "sha256": out.sha256, "bytes": out.nbytes} for out in artifact.outputs],
        "verdict": None if work.proof is None else work.proof.key,
    }
    return record, json.loads(pressed.sidecar.read_bytes())


def _prove(bench: _Bench, context: RunContext) -> Standing:
    """Judges an output that stands, by other limits or on another text."""
    from quantpress.pipelines.kept_reference import prove_again

    work, step, proof = bench.work, bench.step(planned=True), _proof(bench.work)
    standing = find_standing(bench.cache, work.material, work.path, bench.hashes)
    reference = _opened(bench, step, context)
    if standing is None or reference is None:
        return _build(bench, replace(context, force=True))
    with bench.cache.making(work.key, OUTPUT, work.material) as making:
        sidecar = prove_again(Path(work.path), standing.sidecar, reference, standing.record["judged_as"])
        making.redo()
        return keep(making, {**standing.record, "verdict": proof.key}, sidecar)


def _is_proved(standing: Standing, proof: Proof | None) -> bool:
    return proof is None or bool(standing.record["verdict"] == proof.key)


def _opened(bench: _Bench, step: Step, context: RunContext) -> Reference | None:
    """Gives what is kept of the source; None where nothing can judge it, or no proof is asked for."""
    proof = bench.work.proof
    if proof is None or not proof.reference:
        return None
    entry = bench.cache.find(proof.reference)
    if entry is None:
        raise InputError(
            f"{bench.work.cache}: what is kept of the source was removed while the batch ran; run it again"
        )
    if PROBLEM in entry.record:
        return None
    from quantpress.pipelines.kept_reference import open_reference

    without = bench.folder(proof.base) if proof.base else None
    source = step.before.upstream.source
    return open_reference(source, _judge(proof, context), entry.folder, context.progress, without=without)


def _judge(proof: Proof, context: RunContext) -> JudgeOptions:
    return replace(proof.judge, threads=context.threads, max_memory=context.max_memory, device=context.device)


def _proof(work: Work) -> Proof:
    assert work.proof is not None
    return work.proof


def _local_place(work: Work) -> Path:
    """Where an output is written: its place, or one in the cache where it is sent on from there."""
    if not is_url(work.path):
        return Path(work.path)
    folder = work.cache / "staging" / work.key[:32]
    folder.mkdir(parents=True, exist_ok=True)
    return folder / work.path.rstrip("/").rpartition("/")[2]


_KINDS: dict[str, Callable[[_Bench, RunContext], Standing | None]] = {
    "prepare": _prepare,
    "reference": _reference,
    "build": _build,
    "prove": _prove,
}
