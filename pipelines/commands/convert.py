"""`quantpress convert`: one pass from a model to a file that is proved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantpress.convert.gguf.file_types import FILE_TYPES
from quantpress.pipelines.cli import Session
from quantpress.pipelines.commands.options import (
    limit_options,
    machine_options,
    resolve_device,
    text_options,
    writing_options,
)
from quantpress.pipelines.hashing import BackgroundHashes, likely_weights
from quantpress.quant.errors import UsageError

if TYPE_CHECKING:  # what loads numpy is imported while the weights are being hashed already
    from quantpress.pipelines.judging import JudgeOptions
    from quantpress.pipelines.runner import Pressed
    from quantpress.pipelines.stage import BuildingStage, Plan

EXAMPLES = """
\b
Examples:
  quantpress convert ./model model-Q8_0.gguf --outtype q8_0
  quantpress convert org/name '{name}-{ftype}.gguf' --outtype bf16
  quantpress convert ./model model.gguf --outtype q4_0 --tensor-type ffn_down=q8_0
  quantpress convert model.gguf ./model-f16 --to safetensors --dtype f16
  quantpress convert ./model model.gguf --outtype q4_0 --dry-run
"""
TYPES = ", ".join(name.lower() for name in FILE_TYPES)


def _pairs(values: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    pairs = []
    for value in values:
        pattern, separator, kind = value.rpartition("=")
        if not separator or not pattern or not kind:
            raise UsageError(f"--tensor-type {value!r}: wanted REGEX=TYPE, as in ffn_down=q8_0")
        pairs.append((pattern, kind))
    return tuple(pairs)


def make_stage(out: Path, to: str | None, flags: dict[str, Any]) -> BuildingStage:
    """Chooses the stage from --to or from the output's name.

    Raises:
        UsageError: neither says what to write, or flags of the other format are given.
    """
    from quantpress.pipelines.gguf_stage import Gguf
    from quantpress.pipelines.safetensors_stage import Safetensors

    target = to or ("gguf" if out.suffix.lower() == ".gguf" else "safetensors" if flags["dtype"] else None)
    if target is None:
        raise UsageError(f"{out}: cannot tell what to write; name it *.gguf or give --to gguf or --to safetensors")
    if target == "safetensors":
        given = [name for name, value in flags.items() if value and name not in ("dtype", "outtype")]
        if given or flags["outtype"] != "auto":
            name = (given or ["outtype"])[0].replace("_", "-")
            raise UsageError(f"--{name} is for GGUF outputs; safetensors takes --dtype")
        return Safetensors(output=out, dtype=flags["dtype"])
    if flags["dtype"]:
        raise UsageError("--dtype is for safetensors outputs; GGUF takes --outtype")
    options = {name: value for name, value in flags.items() if name not in ("dtype", "tensor_type")}
    return Gguf(output=out, tensor_types=_pairs(flags["tensor_type"]), **options)


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def _show_plan(plan: Plan, as_json: bool) -> None:
    if as_json:
        tensors = [
            {"name": t.name, "shape": t.shape, "type": t.type, "bytes": t.nbytes, "note": t.note} for t in plan.tensors
        ]
        record = {"output": str(plan.output), "bytes": plan.output_bytes, "peak_memory": plan.peak_memory}
        record["disk_needed"] = plan.output_bytes
        click.echo(json.dumps(record | {"notes": plan.notes, "tensors": tensors}, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("tensor", "shape", "type", "bytes", "note")
    for tensor in plan.tensors:
        shape = " x ".join(str(size) for size in tensor.shape)
        table.add_row(tensor.name, shape, tensor.type, f"{tensor.nbytes:,}", tensor.note)
    console = Console()
    console.print(table)
    for note in plan.notes:
        console.print(f"note: {note}")
    console.print(
        f"{plan.output}: {_size(plan.output_bytes)} to write, about {_size(plan.peak_memory)} of memory; "
        "nothing was written"
    )


def show_result(pressed: Pressed, as_json: bool) -> None:
    """Prints what was written and how it was judged."""
    artifact, parity = pressed.artifact, pressed.parity
    nbytes = sum(output.nbytes for output in artifact.outputs)
    if as_json:
        record: dict[str, Any] = {"output": str(artifact.path), "ftype": artifact.ftype, "bytes": nbytes}
        record["sidecar"] = str(pressed.sidecar)
        record["parity"] = parity.to_json() if parity is not None else None
        click.echo(json.dumps(record | {"notes": artifact.notes}, indent=2))
        return
    click.echo(f"{artifact.path}: {artifact.ftype}, {_size(nbytes)}")
    if parity is None:
        click.echo("not verified (--no-verify)")
    elif parity.tokens:
        verdict = "verified" if parity.passed else "NOT VERIFIED"
        click.echo(
            f"{verdict} in {parity.candidate.runtime} on {parity.tokens} tokens: "
            f"perplexity {parity.candidate.perplexity:.4f} (source {parity.baseline.perplexity:.4f}), "
            f"KL divergence {parity.mean_kld:.2g} mean, {parity.kld_p99:.2g} p99, "
            f"top-1 agreement {100 * parity.top1_agreement:.2f} %"
        )


@click.command(name="convert", epilog=EXAMPLES)
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--to", type=click.Choice(["gguf", "safetensors"]), help="Format; default: from OUT's name.")
@click.option("--outtype", default="auto", show_default=True, help=f"GGUF type: {TYPES}, or auto (16 bit).")
@click.option("--tensor-type", multiple=True, metavar="REGEX=TYPE", help="Type of the tensors whose name matches.")
@click.option("--output-tensor-type", metavar="TYPE", help="Type of the head.")
@click.option("--token-embedding-type", metavar="TYPE", help="Type of the token embedding.")
@click.option("--leave-output-tensor", is_flag=True, help="Keep the head in the type it is stored in.")
@click.option("--pure", is_flag=True, help="The same type for every matrix.")
@click.option("--override-kv", multiple=True, metavar="KEY=TYPE:VALUE", help="Replace a metadata value.")
@click.option("--metadata", type=click.Path(path_type=Path), help="JSON file of general.* metadata.")
@click.option("--vocab-only", is_flag=True, help="Write the vocabulary and no tensor.")
@click.option("--model-name", help="Name of the model in the file.")
@click.option("--dtype", help="safetensors type: f32, f16, bf16; default: as stored.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Run the file and compare it with MODEL.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@text_options
@limit_options
@writing_options
@machine_options
@click.pass_obj
def command(session: Session, /, model: str, out: Path, to: str | None, **flags: Any) -> None:
    """Press MODEL into OUT in one pass, run OUT, and compare it with MODEL.

    MODEL is a Hugging Face folder, a Hub id (org/name or org/name@revision) or a GGUF file. OUT is a .gguf file or a
    folder for safetensors, and may hold {ftype} and {name}.
    """
    with BackgroundHashes() as hashes:
        if not flags["dry_run"]:
            hashes.add(likely_weights(model))
        _convert(session, model, out, to, flags, hashes)


def _convert(
    session: Session, model: str, out: Path, to: str | None, flags: dict[str, Any], hashes: BackgroundHashes
) -> None:
    from quantpress.convert.open import open_checkpoint
    from quantpress.pipelines.machine import available_threads
    from quantpress.pipelines.runner import press
    from quantpress.pipelines.stage import RunContext

    judge = _judge_options(flags)
    context_flags = {name: flags.pop(name) for name in ("threads", "force", "allow_nonfinite", "max_memory")}
    as_json, dry_run, wanted = flags.pop("as_json"), flags.pop("dry_run"), flags.pop("verify")
    stage = make_stage(out, to, flags)
    if dry_run:
        _show_plan(stage.plan(open_checkpoint(model)), as_json)
        return
    with session.progress() as progress:
        context_flags["threads"] = context_flags["threads"] or available_threads()
        context = RunContext(progress=progress, device=judge.device, **context_flags)
        judged = wanted and not flags.get("vocab_only")
        pressed = press(model, stage, context, judge=judge if judged else None, hashes=hashes)
    if not session.quiet or as_json:
        show_result(pressed, as_json)
    pressed.require_parity()


def _judge_options(flags: dict[str, Any]) -> JudgeOptions:
    from quantpress.pipelines.judging import JudgeOptions

    names = ("text", "chunks", "max_kld", "max_ppl_change", "min_top1")
    taken = {name: flags.pop(name) for name in names}
    device = flags.pop("device")
    wants_torch = flags["verify"] and not flags["dry_run"]
    return JudgeOptions(
        **taken,
        context=flags.pop("context"),
        device=resolve_device(device) if wants_torch or device == "cuda" else "cpu",
        threads=flags["threads"],
        max_memory=flags["max_memory"],
    )
