"""How a file is to be judged: the options that the command line, pipelines and the library share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from quantpress.pipelines.parity_limits import KLD_BY_TYPE, Limits, limits_for

RUNTIMES = ("auto", "torch", "llama.cpp", "onnxruntime")


@dataclass(frozen=True, slots=True)
class JudgeOptions:
    """How to judge.

    Attributes:
        text: UTF-8 file, or None for the built-in text.
        context: tokens per window, or None for 512 or the model's context where that is less.
        chunks: number of windows, or None for `default_chunks`.
        runtime: what runs the candidate: "auto", "llama.cpp" or "torch".
        max_kld, max_ppl_change, min_top1: limits that replace the defaults of the file's type.
        device: where the source runs, "cpu" or "cuda".
        threads: processor threads of both runtimes.
        max_memory: bytes of weights that are kept in memory, or None for half of what is free.
    """

    text: Path | None = None
    context: int | None = None
    chunks: int | None = None
    runtime: str = "auto"
    max_kld: float | None = None
    max_ppl_change: float | None = None
    min_top1: float | None = None
    device: str = "cpu"
    threads: int | None = None
    max_memory: int | None = None

    def limits(self, ftype: str, parameters: int) -> Limits:
        """Gives the limits for a file type and a model's size, with the user's in place of the defaults."""
        base = limits_for(ftype if ftype.upper() in KLD_BY_TYPE else "F32", parameters)
        own = {name: getattr(self, name) for name in ("max_kld", "max_ppl_change", "min_top1")}
        return dataclasses.replace(base, **{name: value for name, value in own.items() if value is not None})
