"""The table of damages of ONNX models: which measures of a file's content notice which."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.damage import onnx_damages as damages
from tests.damage.onnx_files import FILES, File, good_file, measures_of, model_of

__all__ = ["onnx_rows"]

_SHOWN = 4  # kinds of files: float32, int4 with zeros, GPTQ, dynamic int8
_BITS = (31, 30, 25, 23, 22, 20, 18, 16, 12)  # of a float32


def onnx_rows() -> list[tuple[str, str, tuple[str, ...]]]:
    """Gives damage, kind of file, and measures that notice it; a damage that a file cannot have is left out."""
    every = list(damages.ALL)
    for where, blocks in (("all scales of a matrix", None), ("one scale", 1)):
        for bit in _BITS:
            every.append(damages.Damage(f"bit {bit} of {where}, in float32", damages.bit_of_scales(bit, blocks)))
    with tempfile.TemporaryDirectory() as scratch:
        return [
            (damage.name, file.name, found)
            for file in FILES[:_SHOWN]
            for number, damage in enumerate(every)
            if (found := _noticed(damage, file, Path(scratch), number)) is not None
        ]


def _noticed(damage: damages.Damage, file: File, scratch: Path, number: int) -> tuple[str, ...] | None:
    try:
        bad = damage.copy(good_file(file, scratch), scratch / f"{file}-{number}")
    except damages.NotHereError:
        return None
    return measures_of(bad, model_of(file, scratch))
