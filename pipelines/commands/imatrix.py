"""`quantpress imatrix`: what errors in each column of a model's weights cost, in the form that llama-quantize reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantpress.pipelines.cli import Session
from quantpress.pipelines.commands.adapters import (
    Weighted,
    adapter_option,
    adapter_weights,
    merge_stages,
    parse_adapter,
)
from quantpress.pipelines.commands.options import ByteSize, machine_options, resolve_device

if TYPE_CHECKING:
    from quantpress.pipelines.imatrix_file import ImatrixFile
    from quantpress.pipelines.runner import Pressed

EXAMPLES = """
\b
Examples:
  quantpress imatrix ./model imatrix.gguf --text calib.txt
  quantpress imatrix org/name '{name}.imatrix.gguf' --text calib.txt --chunks 100
  quantpress imatrix ./model imatrix.gguf --adapter ./adapter --text calib.txt
  quantpress convert ./model model-Q4_K_M.gguf --outtype q4_k_m --imatrix imatrix.gguf
"""
STAGE_FLAGS = ("text", "context", "chunks", "calibration_dtype")


@click.command(name="imatrix", epilog=EXAMPLES)
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--text", type=click.Path(path_type=Path), help="UTF-8 text; default: a built-in one.")
@click.option("--chunks", type=click.IntRange(min=1), help="At most so many chunks.  [default: the whole text]")
@click.option("--context", type=click.IntRange(min=8), help="Tokens per chunk.  [default: 512]")
@click.option(
    "--calibration-dtype",
    type=click.Choice(["f32", "bf16"]),
    help="Products of the model.  [default: bf16 where the processor has units for it]",
)
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--dry-run", is_flag=True, help="Show names, sizes and memory; touch no weight.")
@click.option(
    "--max-memory", type=ByteSize(), help="Memory for activations, as in 8G.  [default: half of what is free]"
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@adapter_option
@machine_options
@click.pass_obj
def command(session: Session, /, model: str, out: Path, adapters: tuple[str, ...], **flags: Any) -> None:
    """Run MODEL on a text and write to OUT how much each input of its weights is used.

    MODEL is a Hugging Face folder, a Hub id or a GGUF file; OUT may hold {name}. The numbers are llama-imatrix's: sums
    of squares over chunks of the text. OUT serves `convert --imatrix` and llama.cpp's own llama-quantize.
    """
    from quantpress.pipelines.imatrix_file import ImatrixFile

    weighted, as_json = tuple(parse_adapter(text) for text in adapters), flags.pop("as_json")
    stage = ImatrixFile(output=out, **{name: flags.pop(name) for name in STAGE_FLAGS})
    if flags.pop("dry_run"):
        _plan(model, stage, weighted, as_json=as_json)
        return
    pressed = _measure(session, model, stage, weighted, flags)
    if not session.quiet or as_json:
        _show(pressed, as_json=as_json)


def _plan(model: str, stage: ImatrixFile, adapters: Sequence[Weighted], *, as_json: bool) -> None:
    from quantpress.convert.open import open_checkpoint
    from quantpress.pipelines.commands.showing import show_plan
    from quantpress.pipelines.merge_stage import run_lazy
    from quantpress.pipelines.stage import RunContext

    source = run_lazy(open_checkpoint(model), merge_stages(adapters), RunContext())
    show_plan(stage.plan(source), () if source.adapted is None else source.adapted.notes, as_json=as_json)


def _measure(
    session: Session, model: str, stage: ImatrixFile, adapters: Sequence[Weighted], flags: Mapping[str, Any]
) -> Pressed:
    from quantpress.pipelines.hashing import BackgroundHashes, likely_weights
    from quantpress.pipelines.machine import available_threads
    from quantpress.pipelines.runner import press
    from quantpress.pipelines.stage import RunContext

    with BackgroundHashes() as hashes, session.progress() as progress:
        hashes.add([*likely_weights(model), *adapter_weights(adapters)])
        context = RunContext(
            progress=progress,
            threads=flags["threads"] or available_threads(),
            device=resolve_device(flags["device"]),
            max_memory=flags["max_memory"],
            force=flags["force"],
        )
        return press(model, stage, context, lazy=merge_stages(adapters), hashes=hashes)


def _show(pressed: Pressed, *, as_json: bool) -> None:
    from quantpress.pipelines.commands.showing import size_text

    artifact, read = pressed.artifact, pressed.artifact.calibration
    nbytes = sum(output.nbytes for output in artifact.outputs)
    if as_json:
        record = {"output": str(artifact.path), "bytes": nbytes, "sidecar": str(pressed.sidecar)}
        record |= {"weights": len(artifact.tensors), "chunks": read["samples"], "context": read["sequence_length"]}
        click.echo(json.dumps(record | {"notes": pressed.notes}, indent=2))
        return
    click.echo(
        f"{artifact.path}: {len(artifact.tensors)} weights on {read['samples']} chunks of {read['sequence_length']} "
        f"tokens, {size_text(nbytes)}"
    )
