"""What stands before an output: the stages that changed the model, and the model that the output is judged against."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantpress.convert.checkpoint import Checkpoint
from quantpress.pipelines.lazy_prepared import LazyPreparedStage
from quantpress.pipelines.merge_stage import ledger_of, merge_records, run_lazy, stage_record
from quantpress.pipelines.own_inputs import paths_in
from quantpress.pipelines.parity_limits import KLD_BY_TYPE
from quantpress.pipelines.stage import Artifact, Prepared, PreparingStage, RunContext, Stage, TensorResult

if TYPE_CHECKING:
    from quantpress.convert.lora.ledger import LedgerEntry

__all__ = ["Upstream", "run_stages"]


@dataclass(frozen=True, slots=True)
class Upstream:
    """All that was done to a model before an output is written from it.

    Attributes:
        source: the model with its adapters, before anything was rounded: the yardstick of every output, and what the
            sidecar names as input.
        records: of the stages, for the sidecar.
        prepared: the model as a stage made it that rounds, searches or calibrates; None where none did.
        read: files and folders that options of the stages name.
    """

    source: Checkpoint
    records: tuple[Mapping[str, Any], ...] = ()
    prepared: Prepared | None = None
    read: tuple[Path, ...] = ()

    @classmethod
    def of(cls, source: Checkpoint) -> Upstream:
        """Gives it for a model that nothing but adapters changed."""
        return cls(source, tuple(merge_records(source)))

    def merged(self, source: Checkpoint, stage: Stage) -> Upstream:
        """Gives it after a stage that what it is judged against goes through too."""
        made = self.prepared and dataclasses.replace(self.prepared, ledger=None)
        return self._after(stage, source, made)

    def with_prepared(self, prepared: Prepared, stage: Stage) -> Upstream:
        """Gives it after a stage that prepared the model; the stage is `resolved`."""
        return self._after(stage, self.source, prepared)

    def _after(self, stage: Stage, source: Checkpoint, prepared: Prepared | None) -> Upstream:
        return Upstream(source, (*self.records, stage_record(stage)), prepared, (*self.read, *paths_in(stage)))

    def ledger(self) -> tuple[LedgerEntry, ...]:
        """Gives what became of every tensor of the adapters; reads what nobody has read yet."""
        known = None if self.prepared is None else self.prepared.ledger
        return ledger_of(self.source) if known is None else known

    def described(self, artifact: Artifact) -> Artifact:
        """Adds to an artifact what the stages before say of the model."""
        made = self.prepared
        if made is None:
            return artifact
        return dataclasses.replace(
            artifact,
            tensors=tuple(_described(tensor, made.reports) for tensor in artifact.tensors),
            notes=tuple(dict.fromkeys((*made.notes, *artifact.notes))),
            judged_as=_coarser(made.judged_as, artifact.judged_as or artifact.ftype),
            calibration=_texts(artifact.calibration, made.calibration),
        )


def run_stages(
    source: Checkpoint, stages: Sequence[Stage], context: RunContext, upstream: Upstream | None = None
) -> tuple[Checkpoint, Upstream]:
    """Runs stages that give views, in order.

    Args:
        source: the model.
        stages: none of them a `PreparingStage`, whose work needs a folder.
        context: what the run may use.
        upstream: what was done before.

    Returns:
        The model to write outputs from, and what stands before them.

    Raises:
        QuantpressError: what a stage says of the model.
    """
    found = upstream or Upstream.of(source)
    for stage in stages:
        if isinstance(stage, PreparingStage):
            raise TypeError(f"stage {stage.name} keeps its work in a folder: call prepare and opened")
        if isinstance(stage, LazyPreparedStage):
            prepared = stage.prepared(source, context)
            found = found.with_prepared(prepared, stage.resolved(source))
            source = prepared.checkpoint
            continue
        changed = run_lazy(source, [stage], context)
        yardstick = changed if found.source is source else run_lazy(found.source, [stage], context)
        source, found = changed, found.merged(yardstick, stage)
    return source, found


def _texts(own: Mapping[str, Any], before: Mapping[str, Any]) -> Mapping[str, Any]:
    """Gives the text that was read; where the output reads one too, that of the stage before is beside it."""
    return {**own, "prepared": dict(before)} if own and before else own or before


def _coarser(one: str, other: str) -> str:
    """Gives the type of which more may be lost."""
    kinds = [kind for kind in (one, other) if kind]
    return max(kinds, key=lambda kind: KLD_BY_TYPE.get(kind.upper(), KLD_BY_TYPE["F32"]), default="")


def _described(tensor: TensorResult, reports: Mapping[str, Mapping[str, Any]]) -> TensorResult:
    """Gives what a preparing stage says of the weight, where the output keeps what it made.

    Where the output rounds once more, `relative_error` is of that step, from what was prepared, and
    `prepared_error` is of the step before.
    """
    report = dict(reports.get(tensor.source or tensor.name, {}))
    if not report:
        return tensor
    before = report.pop("relative_error", None)
    figures = {**report, **tensor.figures}
    if not tensor.relative_error:
        return dataclasses.replace(tensor, relative_error=before, figures=figures)
    return dataclasses.replace(tensor, figures={**figures, "prepared_error": before})
