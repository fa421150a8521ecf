"""Runs the stage that writes GGUF as the program does, on tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

import quantpress as qp
from quantpress.convert.open import open_checkpoint
from quantpress.pipelines.gguf_stage import Gguf
from quantpress.pipelines.runner import Pressed, press
from quantpress.pipelines.stage import RunContext
from tests.tiny import tiny_checkpoint

WINDOWS: dict[str, Any] = {"samples": 4, "sequence_length": 32}
GPTQ: dict[str, Any] = {"outtype": "q3_k_m", "method": "gptq", **WINDOWS}
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512}
"""Sizes of a model whose rows divide into super-blocks."""


def wide_model(folder: Path, **options: Any) -> Path:
    """A tiny Llama of three layers whose rows are multiples of 256."""
    return tiny_checkpoint(folder, "llama", dtype="bfloat16", **{**WIDE, **options})


def export(
    model: Any,
    out: Path,
    *,
    judge: qp.JudgeOptions | None = None,
    progress: Callable[[str, int, int], None] = lambda _phase, _done, _total: None,
    threads: int = 2,
    force: bool = False,
    max_memory: int | None = None,
    **options: Any,
) -> Pressed:
    """Runs the stage as the program does."""
    source = open_checkpoint(model) if isinstance(model, Path) else model
    context = RunContext(progress=progress, threads=threads, force=force, max_memory=max_memory)
    return press(source, Gguf(output=out, **options), context, judge=judge)


def tensors_of(path: Path) -> dict[str, gguf.ReaderTensor]:
    """The tensors of a file, by name, as llama.cpp's own package reads them."""
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def values_of(tensor: gguf.ReaderTensor) -> np.ndarray:
    """What a tensor's blocks stand for, (N, K) float32."""
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return np.asarray(values, np.float32).reshape(tuple(int(size) for size in tensor.shape[::-1]))
