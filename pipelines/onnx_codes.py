"""Codes of HQQ, GPTQ and AWQ on their way into an ONNX model, without a quantized checkpoint between.

GPTQ and AWQ run the model layer by layer, as `quantize` does and with its machinery: finished layers are kept beside
the output, a run that is stopped goes on with the next one, and what is kept goes when the output is proved. HQQ reads
nothing but the weight itself, so its codes are found while they are written.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.kept_codes import kept
from quantpress.convert.quantized import LazyQuantized
from quantpress.pipelines.codes_view import Codes, found_when_read, unread, view_with
from quantpress.pipelines.quantize_job import QuantizeJob
from quantpress.pipelines.quantize_plan import PlannedWeight
from quantpress.pipelines.quantize_recipe import CALIBRATED
from quantpress.pipelines.quantize_work import Spooled
from quantpress.pipelines.stage import RunContext

if TYPE_CHECKING:
    from quantpress.convert.onnx.kinds import Ranges
    from quantpress.pipelines.onnx_stage import Onnx

__all__ = ["CODE_METHODS", "MadeCodes", "OnnxCodes", "filled"]

CODE_METHODS = ("hqq", "gptq", "awq")
"""Methods whose codes are found here; those of RTN are found where they are written."""

_BITS = {"int4": 4, "int8": 8}
_DTYPE = "F32"  # of codes that are read as numbers
_PLACES = ("output", "calibration")  # options that say where something lies, not what is written


def _asked(stage: Onnx) -> Codes:
    """Gives the codes that a stage asks for; a finished layer belongs to a run with the same options only."""
    described = dict(stage.describe())
    options = {name: value for name, value in described["options"].items() if name not in _PLACES}
    return Codes(
        output=stage.output,
        method=stage.method,
        bits=_BITS[stage.precision or ""],
        group_size=stage.block_size,
        symmetric=stage.symmetric,
        scale_type="F16" if stage.compute_type == "fp16" else "F32",
        calibration=stage.calibration,
        samples=stage.samples,
        sequence_length=stage.sequence_length,
        seed=stage.seed,
        act_order=stage.act_order,
        damping=stage.damping,
        drift=stage.drift,
        calibration_dtype=stage.calibration_dtype,
        made_for={**described, "options": options},
    )


def filled(stage: Onnx, source: Checkpoint) -> Onnx:
    """Gives a stage with every default of a calibrated method filled in, as `quantize` has them.

    Raises:
        UsageError: options that do not exist.
        UnknownFamilyError: there is no table for the model.
    """
    made = _asked(stage).resolved(source)
    return dataclasses.replace(
        stage, sequence_length=made.sequence_length, drift=made.drift, calibration_dtype=made.calibration_dtype
    )


@dataclass(frozen=True, slots=True)
class MadeCodes:
    """A model with its codes, while an output is written from it.

    Attributes:
        checkpoint: the source with codes as its weights, and norms that scales were folded into; good until the output
            is proved.
        held: whether the lock of the output is held already, so that `write_onnx` must not take it.
        force: what stands at the output may be replaced.
        notes: what a user should know of the text.
        calibrated: what the sidecar says of the text.
        reports: weight -> what the method says of it: "loss", "damping", ...
        timings: step -> seconds.
        ranges: of the inputs of linears, where static int8 rounds them.
        mark_written: to be called when the output stands: where a run is killed before it is proved, the same command
            replaces it.
    """

    checkpoint: Checkpoint
    held: bool
    force: bool
    notes: tuple[str, ...] = ()
    calibrated: Mapping[str, Any] = field(default_factory=dict)
    reports: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    timings: Mapping[str, Any] = field(default_factory=dict)
    ranges: Ranges | None = field(default=None, repr=False)
    mark_written: Callable[[], None] = field(default=lambda: None, repr=False)


class OnnxCodes:
    """Codes for one ONNX model.

    Attributes:
        planned: the source as it will be, its weights' forms known; codes of GPTQ and AWQ cannot be read from it.
    """

    def __init__(self, stage: Onnx, source: Checkpoint) -> None:
        """Plans; reads headers only.

        Args:
            stage: with every default filled in, its output's name too; its method is one of `CODE_METHODS`.
            source: the model.

        Raises:
            QuantpressError: the source cannot be quantized in this way.
        """
        self._job = QuantizeJob(_asked(stage).resolved(source), source)
        self._head = stage.output_tensor_type
        self.planned = view_with(self._job, {}, partial(self._found_when_read, threads=1), dtype=_DTYPE)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know beforehand."""
        notes = self._job.plan.notes
        if self._head in _BITS:
            return (*notes, f"the head is rounded to {self._head} as rtn does, for no method chooses its codes")
        if self._head is None:
            return (
                *notes,
                "the head stays as it is; --output-tensor-type int4 is smaller and faster, less exact",
            )
        return notes

    @property
    def peak_memory(self) -> int:
        """Bytes of memory, estimated."""
        return self._job.plan.peak_memory

    @property
    def work_bytes(self) -> int:
        """Bytes that are kept beside the output until it is proved."""
        return self._job.plan.work_bytes if self._spooled else 0

    def check_output(self, context: RunContext) -> None:
        """Checks that the output may be written.

        Raises:
            UsageError: something is there, and neither --force is given nor did a killed run of this job leave it.
        """
        self._job.check_output(context)

    @contextlib.contextmanager
    def session(self, context: RunContext, nbytes: int) -> Iterator[MadeCodes]:
        """Finds the codes; what is finished is kept on the disk until the block has ended well.

        Args:
            context: what the run may use.
            nbytes: of the output.

        Raises:
            UsageError, BusyError, InputError, LayoutError, OutputError: see `QuantizeJob.spooled`.
        """
        if not self._spooled:
            found = partial(self._found_when_read, threads=context.threads)
            view = view_with(self._job, {}, found, dtype=_DTYPE)
            yield MadeCodes(view, held=False, force=context.force)
            return
        with self._job.spooled(context, nbytes + self.work_bytes) as work:
            yield self._made(work)

    def _made(self, work: Spooled) -> MadeCodes:
        parts = work.spool.tensors()
        view = view_with(self._job, parts, lambda weight: kept(weight.name, weight.form, parts), dtype=_DTYPE)
        return MadeCodes(
            view, held=True, force=work.force, notes=work.notes, calibrated=work.calibrated, reports=work.reports,
            timings=work.timings, mark_written=work.mark_written,
        )  # fmt: skip

    @property
    def _spooled(self) -> bool:
        return self._job.recipe.method in CALIBRATED

    def _found_when_read(self, weight: PlannedWeight, *, threads: int) -> LazyQuantized:
        if self._spooled:
            return unread(weight)
        return found_when_read(self._job, weight, threads)
