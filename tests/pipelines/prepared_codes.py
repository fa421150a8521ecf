"""Makes outputs as pipelines do: codes found once, and several files written from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import quantpress as qp
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.open import open_checkpoint
from quantpress.pipelines.codes_stage import CalibratedStage
from quantpress.pipelines.runner import Pressed, press
from quantpress.pipelines.stage import BuildingStage, Prepared, RunContext
from quantpress.pipelines.upstream import Upstream

WINDOWS: dict[str, Any] = {"samples": 4, "sequence_length": 32}
CONTEXT = RunContext(threads=2)
LOOSE = qp.JudgeOptions(chunks=1, context=32, max_kld=9, max_ppl_change=9, min_top1=0)  # random models lose much


def prepared(
    source: Checkpoint, stage: CalibratedStage, folder: Path, context: RunContext = CONTEXT
) -> tuple[Prepared, Upstream]:
    """Has codes found in a folder, and opens them there as another process would: from the folder and the model."""
    resolved = stage.resolved(source)
    resolved.prepare(source, folder, context)
    return reopened(source, stage, folder)


def reopened(source: Checkpoint, stage: CalibratedStage, folder: Path) -> tuple[Prepared, Upstream]:
    """Opens codes that were found before."""
    resolved = stage.resolved(source)
    found = resolved.opened(source, folder)
    return found, Upstream.of(source).with_prepared(found, resolved)


def pressed(
    model: Checkpoint | Path, stage: BuildingStage, upstream: Upstream | None = None, **options: Any
) -> Pressed:
    """Writes an output of codes, or of a plain model."""
    source = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    return press(source, stage, CONTEXT, upstream=upstream, **options)


def files(folder: Path) -> dict[str, bytes]:
    """Everything but the sidecar, whose timings differ."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "quantpress.json"}


def kept(folder: Path) -> dict[str, Any]:
    """Everything in a folder of codes by its path; of the journal what is not time."""
    found: dict[str, Any] = {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    journal = found.pop("codes/journal.jsonl")
    lines = [json.loads(line) for line in journal.splitlines()]
    for line in lines:
        line.get("record", {}).pop("seconds", None)
    return {**found, "journal": lines}


def sidecar(output: Path) -> dict[str, Any]:
    """The sidecar, without what two runs may differ in."""
    path = output / "quantpress.json" if output.is_dir() else output.with_name(output.name + ".quantpress.json")
    found: dict[str, Any] = json.loads(path.read_text())
    del found["timings"]
    return found
