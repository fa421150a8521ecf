"""Says how the outputs before it are to be proved; the runner does the proving, with one reference for all of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from quantpress.convert.checkpoint import Checkpoint
from quantpress.pipelines.judging import JudgeOptions
from quantpress.pipelines.stage import RunContext, Stage

__all__ = ["Verify"]


@dataclass(frozen=True, kw_only=True)
class Verify(Stage):
    """Options of the stage; None leaves what the job says.

    Attributes:
        text: UTF-8 text to judge on.
        context: tokens per window.
        chunks: number of windows.
        runtime: what runs the output: "auto", "llama.cpp", "onnxruntime" or "torch".
        max_kld: largest mean KL divergence, nats per token.
        max_ppl_change: largest relative change of perplexity, either way.
        min_top1: smallest top-1 agreement.
    """

    name: ClassVar[str] = "verify"
    version: ClassVar[int] = 1

    text: Path | None = None
    context: int | None = None
    chunks: int | None = None
    runtime: str | None = None
    max_kld: float | None = None
    max_ppl_change: float | None = None
    min_top1: float | None = None

    def judged(self, options: JudgeOptions) -> JudgeOptions:
        """Gives a job's way of judging with what this stage says in place of it."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return dataclasses.replace(options, **{name: value for name, value in own.items() if value is not None})

    def run(self, source: Checkpoint, context: RunContext) -> Checkpoint:
        """Changes nothing: what comes after sees the same checkpoint."""
        del context
        return source
