"""Writes an importance matrix as a file that llama-quantize reads."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from quantpress.convert.atomic import check_replaceable, held_output, require_space, work_folder
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.disk import remove
from quantpress.convert.gguf.importance_file import plan_importance, write_importance
from quantpress.pipelines.imatrix_work import TEXT_NOTE, ImatrixText, empty_matrix, filled, measure, needs
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
from quantpress.quant.errors import UsageError

__all__ = ["ImatrixFile"]

log = logging.getLogger(__name__)

_KIND = "imatrix"
_WAIT = 5.0  # seconds for another run that writes the same output


@dataclass(frozen=True, kw_only=True)
class ImatrixFile(BuildingStage):
    """Options of the stage, which the command `imatrix` runs; in pipeline files `Imatrix` takes its place.

    Attributes:
        output: the file; may hold `{name}`.
        text, context, chunks, calibration_dtype: as `Imatrix`.
    """

    name: ClassVar[str] = _KIND
    version: ClassVar[int] = 1
    proved: ClassVar[bool] = False

    output: Path
    text: Path | None = None
    context: int | None = None
    chunks: int | None = None
    calibration_dtype: str | None = None

    @property
    def runs_model(self) -> bool:
        """Whether the model is run on a device before anything can be written."""
        return True

    def resolved(self, source: Checkpoint) -> ImatrixFile:
        """Fills in what depends on the source.

        Raises:
            UsageError: windows that the model was not made for, or the name of a file in another form.
            UnknownFamilyError: there is no table for the model.
        """
        if self.output.suffix == ".dat":
            raise UsageError(f"{self.output}: the older form .dat is only read; give a name that ends in .gguf")
        return dataclasses.replace(self, **filled(source, self))

    def plan(self, source: Checkpoint) -> Plan:
        """Says what would be written, without reading a weight."""
        stage = self.resolved(source)
        matrix = empty_matrix(source, stage)
        memory, work = needs(source, stage)
        tensors = tuple(
            PlannedTensor(name, (entry.sums.size,), "F32", entry.sums.nbytes) for name, entry in matrix.entries.items()
        )
        return Plan(self._path(source), tensors, plan_importance(matrix).nbytes(), memory, self._notes(), work)

    def run(self, source: Checkpoint, context: RunContext) -> Artifact:
        """Writes the file."""
        with self.session(source, context) as artifact:
            return artifact

    @contextlib.contextmanager
    def session(self, source: Checkpoint, context: RunContext) -> Iterator[Artifact]:
        """Measures and writes the file; a run that is stopped begins anew."""
        stage, path = self.resolved(source), self._path(source)
        for note in self._notes():
            log.warning("%s", note)
        with held_output(path, wait=_WAIT) as target:
            check_replaceable(target, force=context.force)
            text = ImatrixText.of(source, stage)
            require_space(target, needs(source, stage)[1])
            folder = work_folder(target)
            remove(folder)
            folder.mkdir(exist_ok=True)
            try:
                matrix = measure(source, stage, text, folder, context)
            finally:
                remove(folder)
            matrix = dataclasses.replace(matrix, name=path.name)
            written = write_importance(target, matrix, force=context.force, held=True)
            yield Artifact(
                path=path,
                kind=_KIND,
                ftype=_KIND,
                outputs=(OutputFile(path.name, written.sha256, written.nbytes),),
                tensors=tuple(TensorResult(name, "F32", each.sums.nbytes) for name, each in matrix.entries.items()),
                notes=(*self._notes(), *matrix.notes()),
                calibration=text.record(),
            )

    def _path(self, source: Checkpoint) -> Path:
        return fill_name(self.output, {"ftype": _KIND, "name": Path(source.name).name})

    def _notes(self) -> tuple[str, ...]:
        return () if self.text is not None else (TEXT_NOTE,)
