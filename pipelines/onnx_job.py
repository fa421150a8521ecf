"""One run of the stage that writes ONNX: plans, has codes found where a method does that, and writes the folder."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantpress.convert.atomic import check_replaceable
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.preflight import Preflight, check_tied_head, preflight
from quantpress.pipelines.machine import peak_memory
from quantpress.pipelines.merge_stage import merged_names
from quantpress.pipelines.onnx_codes import CODE_METHODS, MadeCodes, OnnxCodes
from quantpress.pipelines.parity_limits import KLD_BY_TYPE
from quantpress.pipelines.quantize_plan import main_type
from quantpress.pipelines.sidecar import version_of
from quantpress.pipelines.stage import (
    Artifact,
    OutputFile,
    Plan,
    PlannedTensor,
    RunContext,
    TensorResult,
    fill_name,
    shortened,
)
from quantpress.quant.errors import OutputError

if TYPE_CHECKING:
    from quantpress.convert.onnx.export import OnnxPlan
    from quantpress.convert.onnx.kinds import Ranges
    from quantpress.convert.onnx.stored import StoredGroup
    from quantpress.pipelines.onnx_stage import Onnx
    from quantpress.pipelines.onnx_static import StaticRanges

__all__ = ["QUANTIZED", "OnnxJob", "keeps_codes", "type_of_codes"]

log = logging.getLogger(__name__)

QUANTIZED = ("int8", "int4")
"""Precisions whose weights are codes."""

_EXTRA = ("onnx", "onnx_ir")
_ONNX_BYTES = 110 << 20  # onnx and onnx-ir, and what rounding takes beside GGUF's: measured, 260 MB in all for int4
_EIGHT_BITS = "INT8 g"  # how labels of such blocks begin
_SLOW = (
    "onnxruntime computes 8-bit blocks many times slower on a CPU at accuracy level 0 than at level 4;"
    " --accuracy-level 4 rounds inputs to 8 bits too"
)
_JUDGED_AS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "int8": "INT8", "int4": "INT4"}


def keeps_codes(source: Checkpoint) -> bool:
    """Whether a model's codes are kept; with an adapter merged into them they are quantized anew."""
    return bool(source.quantized) and source.adapted is None


def type_of_codes(source: Checkpoint) -> str:
    """Names what most values of a quantized model are quantized to: "INT4"."""
    return main_type(lazy.form for lazy in source.quantized.values()).upper()


class OnnxJob:
    """A stage with its source."""

    def __init__(self, stage: Onnx, source: Checkpoint) -> None:
        """Takes a stage that is `resolved`."""
        self.stage = stage
        self.kept = stage.precision in QUANTIZED and keeps_codes(source)
        self.source = source if self.kept or stage.precision not in QUANTIZED else replace(source, quantized={})

    @property
    def ftype(self) -> str:
        """Name of the main type."""
        return type_of_codes(self.source) if self.kept else str(self.stage.precision).upper()

    @property
    def output(self) -> Path:
        """The folder."""
        return fill_name(self.stage.output, {"ftype": self.ftype, "name": Path(self.source.name).name})

    @property
    def plan(self) -> Plan:
        """What would be written."""
        found, finder = self._planned, self._finder
        memory = peak_memory(found.held) + _ONNX_BYTES
        return Plan(
            output=self.output,
            tensors=_tensors(self.source, found),
            output_bytes=found.nbytes,
            peak_memory=memory if finder is None else max(memory, finder.peak_memory),
            notes=self._notes(found),
            work_bytes=0 if finder is None else finder.work_bytes,
        )

    def check_output(self, context: RunContext) -> None:
        """Checks that the output may be written, and that the model can be.

        Raises:
            UsageError: something is there that may not be replaced.
        """
        self._planned  # noqa: B018 - what cannot be written is refused before anything is read
        if self._finder is None:
            check_replaceable(self.output, force=context.force)
        else:
            self._finder.check_output(context)

    @property
    def judged_as(self) -> str:
        """Type whose limits hold: the coarsest of what is rounded here."""
        stage = self.stage
        overrides = (stage.output_tensor_type, stage.token_embedding_type)
        found = [_JUDGED_AS[kind] for kind in overrides if kind is not None]
        found.append("F16" if stage.compute_type == "fp16" else "F32")
        if stage.int8 != "weight-only" or (stage.precision in QUANTIZED and stage.accuracy_level == 4):
            found.append("W8A8")  # inputs are rounded too
        if not self.kept:
            found.append(_JUDGED_AS[str(stage.precision)])
        return max(found, key=lambda kind: KLD_BY_TYPE[kind])

    @contextlib.contextmanager
    def session(self, context: RunContext) -> Iterator[Artifact]:
        """Does the work; codes that took long are kept on the disk until the block has ended well."""
        self.check_output(context)
        check_tied_head(self._checked)
        if self._finder is None:
            yield self._write(context, MadeCodes(self.source, held=False, force=context.force))
            return
        with self._finder.session(context, self._planned.nbytes) as made:
            artifact = self._write(context, made)
            made.mark_written()
            yield artifact

    @cached_property
    def _checked(self) -> Preflight:
        return preflight(self.source)

    @cached_property
    def _finder(self) -> OnnxCodes | StaticRanges | None:
        """What finds codes, or ranges of inputs, before the first byte is written."""
        stage = replace(self.stage, output=self.output)
        if stage.method in CODE_METHODS:
            return OnnxCodes(stage, self.source)
        if stage.int8 == "static":
            from quantpress.pipelines.onnx_static import StaticRanges

            return StaticRanges(stage, self.source)
        return None

    @cached_property
    def _planned(self) -> OnnxPlan:
        if isinstance(self._finder, OnnxCodes):
            return self._prepare(self._finder.planned)
        return self._prepare(self.source, ranges=None if self._finder is None else self._finder.planned_ranges)

    def _write(self, context: RunContext, made: MadeCodes) -> Artifact:
        from quantpress.convert.onnx.export import write_onnx

        plan = self._planned
        if self._finder is not None or context.allow_nonfinite:
            plan = self._prepare(made.checkpoint, ranges=made.ranges, allow_nonfinite=context.allow_nonfinite)
        notes = (*self._notes(plan), *made.notes)
        for note in notes:
            log.warning("%s: %s", self.output.name, note)
        files = write_onnx(
            self.output, plan, threads=context.threads, force=made.force, held=made.held, progress=context.progress
        )
        tensors = _tensors(self.source, plan)
        return Artifact(
            path=self.output,
            kind="onnx",
            ftype=self.ftype,
            outputs=tuple(
                OutputFile(path.relative_to(self.output).as_posix(), file.sha256, file.nbytes)
                for path, file in files.items()
            ),
            tensors=tuple(_result(tensor, made.reports.get(tensor.name, {})) for tensor in tensors),
            notes=notes,
            judged_as=self.judged_as,
            calibration=made.calibrated,
            timings=made.timings,
        )

    def _prepare(self, source: Checkpoint, *, ranges: Ranges | None = None, allow_nonfinite: bool = False) -> OnnxPlan:
        """Builds the graph.

        Raises:
            OutputError: the packages that build it are not installed.
        """
        try:
            from quantpress.convert.onnx.export import plan_onnx
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in _EXTRA:
                raise
            raise OutputError(
                f"ONNX models are written with the package {error.name}, which is not installed:"
                " pip install 'quantpress[onnx]'"
            ) from error
        checked = self._checked if source is self.source else preflight(source)
        return plan_onnx(
            source,
            checked,
            self.stage.options(),
            version=version_of("quantpress") or "",
            ranges=ranges,
            allow_nonfinite=allow_nonfinite,
        )

    def _notes(self, plan: OnnxPlan) -> tuple[str, ...]:
        notes = (f"{group.source or group.tensors[0].name}: {group.note}" for group, _ in plan.groups if group.note)
        slow = self.stage.accuracy_level == 0 and any(group.label.startswith(_EIGHT_BITS) for group, _ in plan.groups)
        found = () if self._finder is None else self._finder.notes
        return (*found, *((_SLOW,) if slow and not self.stage.standard_ops else ()), *shortened(tuple(notes)))


def _tensors(source: Checkpoint, plan: OnnxPlan) -> tuple[PlannedTensor, ...]:
    merged = merged_names(source)
    return tuple(
        PlannedTensor(
            group.source or group.tensors[0].name,
            _shape(source, group),
            group.label,
            group.nbytes,
            group.note,
            merged=group.source in merged,
        )
        for group, _ in plan.groups
    )


def _shape(source: Checkpoint, group: StoredGroup) -> tuple[int, ...]:
    return source.tensors[group.source].shape if group.source in source.tensors else group.tensors[0].shape


def _result(tensor: PlannedTensor, report: Mapping[str, Any]) -> TensorResult:
    figures = dict(report)
    return TensorResult(tensor.name, tensor.type, tensor.nbytes, figures.pop("relative_error", None), figures)
