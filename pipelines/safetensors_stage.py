"""Writes a checkpoint as a Hugging Face folder, in its own types, cast to one, or with the codes it has packed."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.preflight import Preflight, check_tied_head, preflight, refuse_quantized
from quantpress.convert.safetensors_writer import planned_tensors, write_checkpoint
from quantpress.pipelines.machine import peak_memory
from quantpress.pipelines.merge_stage import merged_names
from quantpress.pipelines.stage import (
    Artifact,
    BuildingStage,
    OutputFile,
    Plan,
    PlannedTensor,
    RunContext,
    TensorResult,
    fill_name,
)
from quantpress.quant.errors import UnknownFamilyError, UsageError

if TYPE_CHECKING:
    from quantpress.pipelines.quantize_stage import Quantize

log = logging.getLogger(__name__)


def checked_or_unknown(source: Checkpoint) -> Preflight | UnknownFamilyError:
    """Checks a checkpoint against its family's table, or gives the reason why there is no table to check it with.

    Raises:
        InputError: it does not fit its family, or it is quantized already.
    """
    try:
        return preflight(source)
    except UnknownFamilyError as error:
        refuse_quantized(source)
        return error


@dataclass(frozen=True, kw_only=True)
class Safetensors(BuildingStage):
    """Options of the stage.

    Attributes:
        output: the folder; may hold `{ftype}` and `{name}`.
        dtype: "f32", "f16" or "bf16" for all floating-point tensors; None keeps each tensor's type.
        format: "gptq", "gptq_v2", "awq", "compressed-tensors" or "bitsandbytes": how the codes of a quantized model
            are packed, bit for bit; None writes the numbers they stand for.
        scale_type: "F16", "BF16" or "F32", where the format leaves the choice; None: as the codes have it.
    """

    name: ClassVar[str] = "safetensors"
    version: ClassVar[int] = 1

    output: Path
    dtype: str | None = None
    format: str | None = None
    scale_type: str | None = None

    def resolved(self, source: Checkpoint) -> Safetensors:
        """Fills in what depends on the source.

        Raises:
            UsageError: options that do not go together, or no codes to pack.
        """
        if self.format is None:
            if self.scale_type is not None:
                raise UsageError(f"scale_type {self.scale_type}: only a format of codes has scales; give format too")
            return self
        if self.dtype is not None:
            raise UsageError(f"dtype {self.dtype}: with format {self.format} every tensor keeps its type; leave it out")
        if not source.quantized or source.adapted is not None:
            raise UsageError(
                f"format {self.format}: {source.name} has no codes to pack; it needs a stage that quantizes before it:"
                " rtn, hqq, gptq, awq or smoothquant"
            )
        return dataclasses.replace(self, scale_type=_packing(self).resolved(source).scale_type)

    def check_output(self, source: Checkpoint, context: RunContext) -> None:
        """Checks that the target may be written; what this very run has left there may be replaced."""
        if self.format is None:
            super().check_output(source, context)
        else:
            _packing(self.resolved(source)).check_output(source, context)

    @contextlib.contextmanager
    def session(self, source: Checkpoint, context: RunContext) -> Iterator[Artifact]:
        """Writes the folder; inside the block it is proved."""
        if self.format is None:
            yield self.run(source, context)
            return
        with _packing(self.resolved(source)).session(source, context) as artifact:
            yield artifact

    def plan(self, source: Checkpoint) -> Plan:
        """Says what would be written, without reading a weight."""
        if self.format is not None:
            return _packing(self.resolved(source)).plan(source)
        checked = checked_or_unknown(source)
        merged = merged_names(source)
        tensors = tuple(
            PlannedTensor(name, shape, dtype, nbytes, merged=name in merged)
            for name, shape, dtype, nbytes in planned_tensors(source, self.dtype)
        )
        notes: list[str] = []
        if not isinstance(checked, Preflight):
            notes.append(f"{checked}; tensors are passed on by their names, unchecked")
        if source.codes_origin is not None and source.adapted is None:
            notes.append("codes are written as the numbers that they stand for; an option `format` packs them")
        return Plan(self._path(source), tensors, sum(tensor.nbytes for tensor in tensors), peak_memory(), tuple(notes))

    def run(self, source: Checkpoint, context: RunContext) -> Artifact:
        """Writes the folder."""
        if self.format is not None:
            return _packing(self.resolved(source)).run(source, context)
        plan = self.plan(source)
        checked = checked_or_unknown(source)
        if isinstance(checked, Preflight):
            check_tied_head(checked)
        for note in plan.notes:
            log.warning("%s", note)
        files = write_checkpoint(
            source,
            plan.output,
            dtype=self.dtype,
            force=context.force,
            allow_nonfinite=context.allow_nonfinite,
            progress=context.progress,
            threads=context.threads,
        )
        return Artifact(
            path=plan.output,
            kind="safetensors",
            ftype=self._ftype(source),
            outputs=tuple(
                OutputFile(path.relative_to(plan.output).as_posix(), file.sha256, file.nbytes)
                for path, file in files.items()
            ),
            tensors=tuple(TensorResult(t.name, t.type, t.nbytes) for t in plan.tensors),
            notes=plan.notes,
        )

    def _ftype(self, source: Checkpoint) -> str:
        """Name of the main type, as parity limits are kept by it."""
        named = {"f32": "F32", "f16": "F16", "bf16": "BF16", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
        if self.dtype is not None:
            return named.get(self.dtype.lower(), self.dtype.upper())
        largest = max(source.tensors.values(), key=lambda tensor: tensor.nbytes)
        return largest.dtype if largest.dtype in ("F32", "F16", "BF16") else "F32"

    def _path(self, source: Checkpoint) -> Path:
        return fill_name(self.output, {"ftype": self._ftype(source), "name": Path(source.name).name})


def _packing(stage: Safetensors) -> Quantize:
    """Gives the stage that keeps codes as they are, and packs them."""
    from quantpress.pipelines.quantize_stage import Quantize  # which checks models as it is done here

    return Quantize(output=stage.output, format=stage.format, scale_type=stage.scale_type)
