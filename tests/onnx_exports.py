"""Runs the stage that writes ONNX as the program does, on tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import quantpress as qp
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.open import open_checkpoint
from quantpress.pipelines.onnx_stage import Onnx
from quantpress.pipelines.runner import Pressed, press
from quantpress.pipelines.stage import RunContext

WINDOWS: dict[str, Any] = {"samples": 4, "sequence_length": 32}
GPTQ: dict[str, Any] = {"method": "gptq", "block_size": 32, **WINDOWS}
LAYERS = 3  # of the tiny models


def export(
    model: Path | Checkpoint,
    out: Path,
    *,
    judge: qp.JudgeOptions | None = None,
    progress: Callable[[str, int, int], None] = lambda _phase, _done, _total: None,
    threads: int = 2,
    force: bool = False,
    **options: Any,
) -> Pressed:
    """Runs the stage as the program does."""
    stage = Onnx(output=out, **{"precision": "int4", **options})
    context = RunContext(progress=progress, threads=threads, force=force)
    source = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    return press(source, stage, context, judge=judge)


def files(folder: Path) -> dict[str, bytes]:
    """Everything but the sidecar, whose timings differ."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "quantpress.json"}
