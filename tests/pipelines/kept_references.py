"""Sources that say what is read of them, and references that are kept of them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

from quantpress.convert.checkpoint import Array, Checkpoint, LazyTensor
from quantpress.pipelines.judging import JudgeOptions
from quantpress.pipelines.kept_reference import make_reference
from quantpress.pipelines.stage import RunContext


def watched(source: Checkpoint, reads: Counter[str]) -> Checkpoint:
    """The same checkpoint, which counts how often the first row of each tensor is read."""

    def watch(tensor: LazyTensor) -> LazyTensor:
        def read(start: int, stop: int) -> Array:
            reads[tensor.name] += start == 0
            return tensor.exact_rows(start, stop)

        return dataclasses.replace(tensor, read_rows=read, wide_rows=None)

    tensors = {name: watch(tensor) for name, tensor in source.tensors.items()}
    adapted = source.adapted
    if adapted is not None:
        adapted = dataclasses.replace(adapted, base=watched(adapted.base, reads))
    return dataclasses.replace(source, tensors=tensors, adapted=adapted)


def kept(source: Checkpoint, judge: JudgeOptions, folder: Path, *, without: Path | None = None) -> Path:
    """Makes a reference in a new folder."""
    folder.mkdir()
    make_reference(source, judge, folder, RunContext(threads=1), without=without)
    return folder
