"""Prints which measure notices which damage in which type of file: python -m tests.damage.table [onnx]."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from quantpress.pipelines.candidate import ftype_of
from quantpress.pipelines.judging import JudgeOptions
from quantpress.pipelines.reference import Reference
from tests.damage.gguf_damages import DAMAGES, flipped_scale, planted
from tests.damage.gguf_files import FILES, File, findings_of, good_file, model_of, opened
from tests.damage.onnx_rows import onnx_rows

__all__ = ["bit_rows", "gguf_rows", "main"]

Row = tuple[str, str, Sequence[str]]
_BITS = range(16)
_TENSOR = "ffn_up.weight"
_BLOCKS = 3, 40, 77, 100, 150  # of which a bit is caught only if it is in all


def gguf_rows(scratch: Path, model: str = "trained") -> Iterator[Row]:
    """Judges every damage in every file of a model: damage, file, and the measures that failed ("-": no place)."""
    files = [file for file in FILES if file.model == model]
    reference = Reference(opened(model_of(files[0], scratch)), JudgeOptions(context=64, chunks=4))
    bad = scratch / "bad.gguf"
    for name, plant in DAMAGES.items():
        for file in files:
            if planted(good_file(file, scratch), bad, plant):
                yield name, file.name, reference.judge(bad, ftype_of(bad)).failures
            else:
                yield name, file.name, ("-",)


def bit_rows(scratch: Path, model: str = "trained") -> Iterator[tuple[str, list[int], list[int]]]:
    """Flips each bit of one block's scale: file, bits that are caught in all of some blocks, bits that are in none."""
    bad = scratch / "bad.gguf"
    for file in (file for file in FILES if file.model == model and file.name != "f16"):
        good, source = good_file(file, scratch), model_of(file, scratch)
        caught = [[_caught(good, bad, source, bit, block) for block in _BLOCKS] for bit in _BITS]
        yield file.name, [b for b in _BITS if all(caught[b])], [b for b in _BITS if not any(caught[b])]


def _caught(good: Path, bad: Path, source: Path, bit: int, block: int) -> bool:
    return planted(good, bad, flipped_scale(_TENSOR, bit, block=block)) and bool(findings_of(bad, source))


def markdown(rows: Sequence[Row]) -> str:
    """Makes a table of rows: a line for each damage, a column for each file."""
    files = list(dict.fromkeys(file for _, file, _ in rows))
    cells = {(damage, file): ", ".join(measures) or "**passes**" for damage, file, measures in rows}
    lines = [f"| damage | {' | '.join(files)} |", "|---" * (len(files) + 1) + "|"]
    for damage in dict.fromkeys(damage for damage, _, _ in rows):
        lines.append(f"| {damage} | {' | '.join(cells.get((damage, file), '') for file in files)} |")
    return "\n".join(lines)


def _numbers(bits: list[int]) -> str:
    return ", ".join(map(str, bits)) or "none"


def main(argv: Sequence[str]) -> int:
    """Prints the tables of GGUF files, of a shared model if one is named; with "onnx" those of ONNX models."""
    if list(argv) == ["onnx"]:
        sys.stdout.write(markdown(onnx_rows()) + "\n")
        return 0
    model = File(argv[0] if argv else "trained", "").model
    with tempfile.TemporaryDirectory() as folder:
        lines = [markdown(list(gguf_rows(Path(folder), model))), ""]
        lines += ["| one block's float16 scale | bits always caught | bits never caught |", "|---|---|---|"]
        for name, caught, missed in bit_rows(Path(folder), model):
            lines.append(f"| {name} | {_numbers(caught)} | {_numbers(missed)} |")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
