"""Measures an importance matrix for the outputs that follow: GGUF's types are chosen and searched with it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from quantpress.convert.atomic import require_space, write_file
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.disk import remove
from quantpress.convert.gguf.importance_file import read_importance, write_importance
from quantpress.convert.json_reader import read_json
from quantpress.pipelines.imatrix_work import (
    MATRIX_NAME,
    TEXT_NOTE,
    ImatrixText,
    empty_matrix,
    filled,
    measure,
    needs,
    text_tokens,
)
from quantpress.pipelines.stage import Prepared, PreparingStage, RunContext
from quantpress.quant.errors import InputError

__all__ = ["Imatrix"]

_RECORD = "imatrix.json"
_LIVE = "live"  # folder for activations that do not fit into memory


@dataclass(frozen=True, kw_only=True)
class Imatrix(PreparingStage):
    """Options of the stage.

    Attributes:
        text: UTF-8 text; None for the built-in one.
        context: tokens of a chunk; None for 512, or what the model was made for.
        chunks: at most so many chunks; None for the whole text.
        calibration_dtype: "f32" or "bf16", how products are computed; None: bf16 where the processor has units for it.
    """

    name: ClassVar[str] = "imatrix"
    version: ClassVar[int] = 1

    text: Path | None = None
    context: int | None = None
    chunks: int | None = None
    calibration_dtype: str | None = None

    def resolved(self, source: Checkpoint) -> Imatrix:
        """Gives the stage with every default filled in that depends on the source."""
        return dataclasses.replace(self, **filled(source, self))

    def text_tokens(self, source: Checkpoint) -> int:
        """Estimates the tokens that the model is run on."""
        return text_tokens(source, self)

    def needs(self, source: Checkpoint) -> tuple[int, int, int]:
        """Estimates bytes of memory, of temporary files, and of what is kept at the end."""
        kept = sum(entry.sums.nbytes for entry in empty_matrix(source, self).entries.values())
        return (*needs(source, self), kept)

    def planned(self, source: Checkpoint) -> Prepared:
        """Gives the model with a matrix in which every column counts alike, for planning."""
        return Prepared(dataclasses.replace(source, importance=empty_matrix(source, self)), self._notes())

    def prepare(self, source: Checkpoint, folder: Path, context: RunContext) -> None:
        """Measures, and keeps the matrix in the folder.

        Raises:
            InputError: the text cannot be used, or values are not finite.
            OutputError: the disk has no room.
        """
        stage, live = self.resolved(source), folder / _LIVE
        text = ImatrixText.of(source, stage)
        require_space(folder, needs(source, stage)[1])
        live.mkdir(exist_ok=True)
        matrix = measure(source, stage, text, live, context)
        write_importance(folder / MATRIX_NAME, matrix, force=True)
        write_file(folder / _RECORD, json.dumps(text.record()).encode(), force=True)
        remove(live)

    def opened(self, source: Checkpoint, folder: Path) -> Prepared:
        """Gives the model with its matrix, from a folder where the work is finished.

        Raises:
            InputError: it is not finished there, or damaged.
        """
        if not (folder / _RECORD).is_file():
            raise InputError(f"{folder}: the importance matrix is not finished")
        record: dict[str, Any] = read_json(folder / _RECORD)
        matrix = read_importance(folder / MATRIX_NAME)
        return Prepared(dataclasses.replace(source, importance=matrix), self._notes(), record)

    def _notes(self) -> tuple[str, ...]:
        return () if self.text is not None else (f"importance matrix {TEXT_NOTE}",)
