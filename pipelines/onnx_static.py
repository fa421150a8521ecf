"""Static int8: the model is run on a text before it is written, to find what range the inputs of each linear have."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from quantpress.convert.atomic import check_replaceable, held_output, require_space, work_folder
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.disk import remove
from quantpress.convert.preflight import preflight
from quantpress.pipelines.default_text import BUILT_IN_NOTE
from quantpress.pipelines.onnx_calibration import RangeText, calibrated_ranges, planned_ranges
from quantpress.pipelines.onnx_codes import MadeCodes
from quantpress.pipelines.quantize_calibration import needs
from quantpress.pipelines.quantize_stage import Quantize
from quantpress.pipelines.stage import RunContext

if TYPE_CHECKING:
    from quantpress.convert.onnx.kinds import Ranges
    from quantpress.pipelines.onnx_stage import Onnx

__all__ = ["StaticRanges"]

_WAIT = 1.0  # seconds for another run on the same output; it may take hours


class StaticRanges:
    """Finds the ranges for one ONNX model.

    Attributes:
        planned: the source.
        planned_ranges: of the inputs of every linear, in place of what will be found.
    """

    def __init__(self, stage: Onnx, source: Checkpoint) -> None:
        """Takes a stage with every default filled in, its output's name too, and the model."""
        self._stage, self.planned = stage, source
        self.planned_ranges: Ranges = planned_ranges(preflight(source))

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know beforehand."""
        return (BUILT_IN_NOTE,) if self._stage.calibration is None else ()

    @property
    def peak_memory(self) -> int:
        """Bytes of memory, estimated."""
        return self._needs[0]

    @property
    def work_bytes(self) -> int:
        """Bytes of activations that are kept beside the output meanwhile."""
        return self._needs[1]

    @property
    def _needs(self) -> tuple[int, int]:
        stage = self._stage
        walk = Quantize(  # of all methods the one that takes only the greatest inputs of the whole weights
            output=stage.output, method="smoothquant", samples=stage.samples, sequence_length=stage.sequence_length
        )
        return needs(self.planned, walk)

    def check_output(self, context: RunContext) -> None:
        """Checks that the output may be written.

        Raises:
            UsageError: something is there, and --force is not given.
        """
        check_replaceable(self._stage.output, force=context.force)

    @contextlib.contextmanager
    def session(self, context: RunContext, nbytes: int) -> Iterator[MadeCodes]:
        """Finds the ranges, and holds the output until the block has ended.

        Args:
            context: what the run may use.
            nbytes: of the output.

        Raises:
            InputError: the text or the tokenizer cannot be used, or values are not finite.
            UsageError, BusyError, OutputError: see `held_output`.
        """
        stage = self._stage
        text = RangeText(stage.calibration, stage.samples, stage.sequence_length, stage.seed)
        with held_output(stage.output, wait=_WAIT) as target:
            check_replaceable(target, force=context.force)
            require_space(target, nbytes + self.work_bytes)
            work = work_folder(target)
            remove(work)  # of a run that was killed
            try:
                work.mkdir()
                found = calibrated_ranges(
                    self.planned, text, threads=context.threads, folder=work, device=context.device,
                    max_memory=context.max_memory, progress=partial(context.progress, "calibrate"),
                )  # fmt: skip
            finally:
                remove(work)
            notes = (found.note,) if found.note else ()
            yield MadeCodes(
                self.planned, held=True, force=context.force, notes=notes, calibrated=found.record, ranges=found.ranges
            )
