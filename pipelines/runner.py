"""Runs one job: opens the source, runs a building stage, proves what it wrote, and leaves a sidecar beside it."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from quantpress.convert.arch.registry import find_arch
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.open import open_checkpoint
from quantpress.pipelines.content_proof import chosen_keys
from quantpress.pipelines.hashing import BackgroundHashes
from quantpress.pipelines.judging import JudgeOptions
from quantpress.pipelines.machine import peak_rss
from quantpress.pipelines.merge_stage import (
    adapter_notes,
    input_names,
    stage_record,
)
from quantpress.pipelines.own_inputs import paths_in, refuse_own_input
from quantpress.pipelines.sidecar import rounded, statement, write_sidecar
from quantpress.pipelines.stage import Artifact, BuildingStage, RunContext, Stage
from quantpress.pipelines.upstream import Upstream, run_stages
from quantpress.quant.errors import InputError, ParityError, UnknownFamilyError

if TYPE_CHECKING:
    from quantpress.convert.lora.ledger import LedgerEntry
    from quantpress.pipelines.parity import Parity
    from quantpress.pipelines.references import AnyReference

__all__ = ["Pressed", "Upstream", "only_mergeable", "press"]

log = logging.getLogger(__name__)

_NO_PARTS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Pressed:
    """A finished job.

    Attributes:
        artifact: what was written.
        parity: the verdict, or None where no proof was asked for.
        sidecar: path of the sidecar.
        timings: seconds and peak resident bytes of each step.
        ledger: what became of every tensor of the adapters.
        notes: what a user should know: of the adapters and of the file.
    """

    artifact: Artifact
    parity: Parity | None
    sidecar: Path
    timings: Mapping[str, Any]
    ledger: tuple[LedgerEntry, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def judged_as(self) -> str:
        """Type whose parity limits hold."""
        return self.artifact.judged_as or self.artifact.ftype

    def require_parity(self) -> None:
        """Ends the run where the proof failed.

        Raises:
            ParityError: with the reason.
        """
        if self.parity is not None and not self.parity.passed:
            raise ParityError(f"{self.artifact.path}: {self.parity.reason}; figures are in {self.sidecar}")


class _Clock:
    """Seconds and peak memory of the steps of a job."""

    def __init__(self) -> None:
        self.steps: dict[str, Any] = {}
        self._start = time.perf_counter()

    def step(self, name: str, parts: Mapping[str, Any] = _NO_PARTS) -> None:
        """Ends a step, of whose parts more may be known."""
        now = time.perf_counter()
        self.steps[name] = {"seconds": round(now - self._start, 3), "peak_rss": peak_rss()}
        if parts:
            self.steps[name]["parts"] = dict(parts)
        self._start = now


class _Judge:
    """What proves the output: made ready before anything is written, so that a wrong text costs nothing."""

    def __init__(
        self, source: Checkpoint, options: JudgeOptions, context: RunContext, reference: AnyReference | None
    ) -> None:
        """Makes the source ready.

        Raises:
            QuantpressError: the text or the tokenizer cannot be used.
        """
        self._source, self._options, self._reference = source, options, reference
        self._problem = "" if reference is not None else _no_table(source)
        if reference is None and not self._problem:
            from quantpress.pipelines.references import reference_for  # brings torch

            try:
                self._reference = reference_for(source, options, context.progress)
            except InputError as error:
                if not only_mergeable(source):
                    raise
                self._problem = str(error)
        if self._problem:
            log.warning("the output will not be judged: %s", self._problem)

    def __call__(self, artifact: Artifact, stage: Stage) -> Parity:
        if self._reference is not None:
            chosen = chosen_keys([stage_record(stage)])
            return self._reference.judge(artifact.path, artifact.judged_as or artifact.ftype, chosen=chosen)
        from quantpress.pipelines.parity import unjudged

        limits = self._options.limits(artifact.judged_as or artifact.ftype, self._source.parameters)
        return unjudged(f"could not be judged: {self._problem}", limits)


def only_mergeable(source: Checkpoint) -> bool:
    """Whether a checkpoint's adapters can be merged but not run beside their base, so that nothing can judge them."""
    if source.adapted is None:
        return False
    from quantpress.convert.lora.unmerged import unmerged

    try:
        unmerged(source.adapted.base, source.adapted.applied)
    except InputError:
        return True
    return False


def _no_table(source: Checkpoint) -> str:
    """Why a model cannot be run here, so that nothing can judge what is made from it; empty if it can."""
    try:
        find_arch(source.config)
    except UnknownFamilyError as error:
        return f"{source.name}: {error}"
    return ""


def _notes(upstream: Upstream) -> tuple[str, ...]:
    """Looks at the adapters' values, and warns of all that a user should know before anything is written."""
    source = upstream.source
    if source.adapted is None:
        return ()
    from quantpress.pipelines.qlora_choice import QloraBase, qlora_notes

    notes = adapter_notes(source)
    if not any(record["name"] == QloraBase.name for record in upstream.records):
        notes = (*notes, *qlora_notes(source))
    for note in notes:
        log.warning("%s", note)
    return notes


def press(
    model: Checkpoint | Path | str,
    stage: BuildingStage,
    context: RunContext,
    *,
    lazy: Sequence[Stage] = (),
    judge: JudgeOptions | None = None,
    reference: AnyReference | None = None,
    hashes: BackgroundHashes | None = None,
    upstream: Upstream | None = None,
) -> Pressed:
    """Runs one building stage on a model, in one pass with the lazy stages before it.

    Args:
        model: folder, file, Hub id or open checkpoint, merged or not; with `upstream` the checkpoint that it speaks of.
        stage: the target.
        context: what the run may use.
        lazy: stages that give views, in order: the adapters to merge, codes that are found when they are read.
        judge: how to prove the output; None leaves it unproved.
        reference: the source made ready for judging, where several outputs share it.
        hashes: a thread that hashes the inputs, where it has been started already.
        upstream: what was done to the model before, where that is more than merging adapters.

    Raises:
        QuantpressError: the source, an option or the output is not usable. A proof that fails is not raised here: the
            file and its sidecar are there and `Pressed.require_parity` says so.
    """
    clock = _Clock()
    source = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    clock.step("open")
    source, before = run_stages(source, lazy, context, upstream)
    yardstick = before.source
    stage = stage.resolved(source)
    texts = [*paths_in(stage, but="output"), *paths_in(judge), *before.read]
    refuse_own_input(stage.target(source), [*(file.path for file in yardstick.files), *texts])
    if judge is not None or yardstick.adapted is not None:
        stage.check_output(source, context)
    notes, names = _notes(before), input_names(yardstick)
    judged = _Judge(yardstick, judge, context, reference) if judge is not None else None
    if lazy:
        clock.step(lazy[-1].name)
    with contextlib.ExitStack() as stack:
        hashing = stack.enter_context(BackgroundHashes()) if hashes is None else hashes
        hashing.add(names)
        artifact = before.described(stack.enter_context(stage.session(source, context)))
        ledger = before.ledger()
        hashed = hashing.results(list(names))
        clock.step(stage.name, artifact.timings)
        parity = None
        if judged is not None:
            parity = judged(artifact, stage)
            clock.step("verify")
        contents = statement(
            inputs=[{"name": names[path], "sha256": sha256, "bytes": size} for path, (sha256, size) in hashed.items()],
            adapters=[rounded(entry.to_json()) for entry in ledger],
            stages=[*before.records, stage_record(stage)],
            device=context.device,
            parameters=yardstick.parameters,
            **_written(artifact),
            parity=rounded(parity.to_json()) if parity is not None else None,
            notes=(*notes, *artifact.notes),
            timings=clock.steps,
        )
        sidecar = write_sidecar(artifact.path, contents)
    return Pressed(artifact, parity, sidecar, clock.steps, ledger, (*notes, *artifact.notes))


def _written(artifact: Artifact) -> dict[str, Any]:
    """What a sidecar says of the files and of the tensors in them."""
    tensors = [
        {"name": t.name, "type": t.type, "bytes": t.nbytes, "relative_error": rounded(t.relative_error)}
        | rounded(dict(t.figures))
        for t in artifact.tensors
    ]
    outputs = [{"name": out.name, "sha256": out.sha256, "bytes": out.nbytes} for out in artifact.outputs]
    return {
        "outputs": outputs,
        "tensors": tensors,
        "calibration": artifact.calibration,
        "mixture": artifact.mixture,
    }
