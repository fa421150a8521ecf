"""What the tests of runs that are stopped have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import quantpress as qp

LAYERS = 3  # of the models that are stopped
LOOSE = qp.JudgeOptions(chunks=1, context=32, max_kld=9, max_ppl_change=9, min_top1=0)  # random models lose much


def work(out: Path) -> Path:
    return out.parent / f".quantpress-{out.name}.work"


def stop_at(phase: str, layers: float) -> Callable[[str, int, int], None]:
    """A progress display that presses Ctrl-C when so many layers are done."""

    def progress(name: str, done: int, total: int) -> None:
        if name == phase and done >= layers * total / LAYERS:
            raise KeyboardInterrupt

    return progress
