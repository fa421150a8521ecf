"""What the commands that write print: plans, results, and the account of adapters."""

from __future__ import annotations

import json
import math
import os
from typing import TYPE_CHECKING, Any

import click

from quantpress.pipelines.commands.quantized_table import quantized_json, show_quantized, summary

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from quantpress.convert.lora.ledger import LedgerEntry
    from quantpress.pipelines.parity import Parity
    from quantpress.pipelines.runner import Pressed
    from quantpress.pipelines.stage import Plan, PlannedTensor

WIDTH = 160  # columns of a table whose reader is no terminal: names of tensors in one line


def size_text(nbytes: float) -> str:
    """Gives bytes in decimal units, as llama.cpp and disks count them."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def show_plan(plan: Plan, notes: Sequence[str], *, as_json: bool) -> None:
    """Prints what would be written.

    Args:
        plan: of the building stage.
        notes: of the stages before it.
        as_json: as one object.
    """
    notes = (*notes, *plan.notes)
    if as_json:
        record = {"output": str(plan.output), "bytes": plan.output_bytes, "peak_memory": plan.peak_memory}
        record["disk_needed"] = plan.output_bytes + plan.work_bytes
        click.echo(json.dumps(record | {"notes": notes, "tensors": [_planned(t) for t in plan.tensors]}, indent=2))
        return
    from rich.table import Table

    table = Table("tensor", "shape", "type", "bytes", "note")
    for tensor in plan.tensors:
        shape = " x ".join(str(size) for size in tensor.shape)
        note = ", ".join(word for word in ("merged" if tensor.merged else "", tensor.note) if word)
        table.add_row(tensor.name, shape, tensor.type, f"{tensor.nbytes:,}", note)
    plain_console().print(table)
    for note in notes:
        click.echo(f"note: {note}")
    merged = sum(tensor.merged for tensor in plan.tensors)
    meanwhile = f", {size_text(plan.work_bytes)} of disk meanwhile" if plan.work_bytes else ""
    click.echo(
        f"{plan.output}: {size_text(plan.output_bytes)} to write, about {size_text(plan.peak_memory)} of memory"
        f"{meanwhile}{f', {merged} tensors merged' if merged else ''}; nothing was written"
    )


def plain_console() -> Console:
    """Gives a console that prints names from files as they stand, and wide tables where no terminal sets a limit."""
    from rich.console import Console

    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDTH
    return console


def _planned(tensor: PlannedTensor) -> dict[str, Any]:
    record = {"name": tensor.name, "shape": tensor.shape, "type": tensor.type, "bytes": tensor.nbytes}
    return record | {"note": tensor.note, "merged": tensor.merged}


def show_result(pressed: Pressed, *, as_json: bool, tables: bool, every_tensor: bool = False) -> None:
    """Prints what was written, what the adapters changed, and how it was judged.

    Args:
        pressed: the finished job.
        as_json: as one object, with the whole ledger.
        tables: with a table of each adapter's changes, else one line.
        every_tensor: with a row for every tensor of the adapters, and for every quantized weight.
    """
    artifact, parity = pressed.artifact, pressed.parity
    nbytes = sum(output.nbytes for output in artifact.outputs)
    if as_json:
        record: dict[str, Any] = {"output": str(artifact.path), "ftype": artifact.ftype, "bytes": nbytes}
        record["sidecar"] = str(pressed.sidecar)
        record["parity"] = parity.to_json() if parity is not None else None
        record["adapters"] = [entry.to_json() for entry in pressed.ledger]
        if weights := quantized_json(artifact.tensors):
            record["tensors"] = weights
        click.echo(json.dumps(record | {"notes": pressed.notes}, indent=2))
        return
    if pressed.ledger and (tables or every_tensor):
        from quantpress.pipelines.commands.ledger_table import show_ledger

        show_ledger(pressed.ledger, every_tensor=every_tensor)
    if every_tensor and quantized_json(artifact.tensors):
        show_quantized(artifact.tensors)
    for line in filter(None, (*_summaries(pressed.ledger), summary(artifact.tensors))):
        click.echo(line)
    files = len(artifact.outputs) if artifact.path.is_file() else 1
    click.echo(f"{artifact.path}: {artifact.ftype}, {size_text(nbytes)}{f' in {files} files' if files > 1 else ''}")
    if parity is None:
        click.echo("not verified (--no-verify)")
    elif parity.tokens:
        click.echo(_verdict(parity))


def _summaries(ledger: Sequence[LedgerEntry]) -> list[str]:
    """One line per adapter: how many of its tensors went where."""
    lines = []
    for key in dict.fromkeys((entry.adapter, entry.weight) for entry in ledger):
        own = [entry for entry in ledger if (entry.adapter, entry.weight) == key]
        targets = len({entry.target for entry in own})
        lines.append(f"merged {key[0]} (weight {key[1]:g}): {len(own)} tensors of it changed {targets} of the model")
    return lines


def _verdict(parity: Parity) -> str:
    figures = []
    if (vectors := parity.vectors) is not None:
        cosines = f"{vectors.mean_cosine:.6f} mean, {vectors.min_cosine:.6f} least"
        figures.append(f"cosine of the vectors of {vectors.texts} texts {cosines}")
    if vectors is None or not math.isnan(parity.mean_kld):
        figures += [
            f"perplexity {parity.candidate.perplexity:.4f} (source {parity.baseline.perplexity:.4f})",
            f"KL divergence {parity.mean_kld:.2g} mean",
            f"{parity.kld_p99:.2g} p99",
            f"top-1 agreement {100 * parity.top1_agreement:.2f} %",
        ]
    if (share := parity.adapter_share) is not None:
        figures.append(f"{100 * share.share:.1f} % of the adapters' effect")
    verdict = "verified" if parity.passed else "NOT VERIFIED"
    return f"{verdict} in {parity.candidate.runtime} on {parity.tokens} tokens: {', '.join(figures)}"
