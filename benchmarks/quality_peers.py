"""GPTQ of others on the very windows that ours was calibrated with."""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from original_gptq import Range, full_range, quantize_folder, symmetric_range
from quality_cases import Subject
from quantize import peer as peer_command

from quantpress.convert.calibration.windows import calibration_windows
from quantpress.convert.open import open_checkpoint
from quantpress.convert.tokenizer import Tokenizer, TokenizerFiles

GROUP_SIZE = 128


@dataclass(frozen=True, slots=True)
class Peer:
    """A checkpoint that somebody else quantizes; `make` does it and gives the folder."""

    name: str
    bits: int
    group_size: int
    make: Callable[[], Path]


def cut(subject: Subject) -> NDArray[np.int32]:
    """The windows that `quantpress.quantize` cuts with the seed 0: (samples, length)."""
    source = open_checkpoint(subject.folder)
    tokenizer = Tokenizer(TokenizerFiles(source.tokenizer_files, name=source.name))
    ids = tokenizer.encode(subject.calibration.read_text(encoding="utf-8"), special=False)
    bos = tokenizer.bos_id if tokenizer.add_bos else None
    return np.stack(calibration_windows(ids, samples=subject.samples, length=subject.length, seed=0, bos=bos))


def peers(subject: Subject, folder: Path, options: argparse.Namespace, *, quick: bool) -> Iterator[Peer]:
    """Gives the formula in float64 and the tools that were named, on symmetric grids."""
    windows = cut(subject)
    stored = folder / "windows.npy"
    np.save(stored, windows)
    grids: dict[str, Range] = {"original GPTQ, float64, our grid": full_range}
    if not quick:
        grids["original GPTQ, float64, its grid"] = symmetric_range
    tools = {"GPTQModel": (options.gptqmodel, "peer_gptqmodel.py")}
    tools["llm-compressor"] = (options.llmcompressor, "peer_llmcompressor.py")
    for bits in (4, 3):
        for name, grid in grids.items():
            yield Peer(name, bits, GROUP_SIZE, partial(_formula, subject, folder / "formula", windows, bits, grid))
        for name, (python, script) in tools.items():
            if python:
                out = folder / f"{name}-{bits}"
                yield Peer(name, bits, GROUP_SIZE, partial(_tool, subject, out, stored, bits, python, script))


def _formula(subject: Subject, out: Path, windows: NDArray[np.int32], bits: int, grid: Range) -> Path:
    quantize_folder(subject.folder, out, windows, bits=bits, group_size=GROUP_SIZE, grid=grid)
    return out


def _tool(subject: Subject, out: Path, windows: Path, bits: int, python: str, script: str) -> Path:
    command = peer_command(python, script, subject.folder, windows, out, bits=bits, group_size=GROUP_SIZE)
    subprocess.run(command, check=True, capture_output=True)
    return out
