"""`quantpress convert`: one pass from a model to a file that is proved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantpress.convert.gguf.file_types import FILE_TYPES
from quantpress.pipelines.cli import Session
from quantpress.pipelines.commands.adapters import adapter_option, parse_adapter, qlora_options, take_qlora
from quantpress.pipelines.commands.options import limit_options, machine_options, text_options, writing_options
from quantpress.pipelines.commands.writing import write
from quantpress.quant.errors import UsageError

if TYPE_CHECKING:
    from quantpress.pipelines.stage import BuildingStage

EXAMPLES = """
\b
Examples:
  quantpress convert ./model model-Q8_0.gguf --outtype q8_0
  quantpress convert org/name '{name}-{ftype}.gguf' --outtype bf16
  quantpress convert ./model model.gguf --outtype q4_0 --tensor-type ffn_down=q8_0
  quantpress convert model.gguf ./model-f16 --to safetensors --dtype f16
  quantpress convert ./model tuned-Q8_0.gguf --outtype q8_0 --adapter ./adapter
  quantpress convert ./model mixed.gguf --adapter ./tone=0.7 --adapter ./facts=0.3
  quantpress convert ./model model.gguf --outtype q4_0 --dry-run
"""
TYPES = ", ".join(name.lower() for name in FILE_TYPES)
STAGE_FLAGS = (
    "outtype", "tensor_type", "output_tensor_type", "token_embedding_type", "leave_output_tensor", "pure",
    "override_kv", "metadata", "vocab_only", "model_name", "dtype",
)  # fmt: skip


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
@adapter_option
@qlora_options
@text_options
@limit_options
@writing_options
@machine_options
@click.pass_obj
def command(
    session: Session, /, model: str, out: Path, to: str | None, adapters: tuple[str, ...], **flags: Any
) -> None:
    """Press MODEL into OUT in one pass, run OUT, and compare it with MODEL.

    MODEL is a Hugging Face folder, a Hub id (org/name or org/name@revision) or a GGUF file. OUT is a .gguf file or a
    folder for safetensors, and may hold {ftype} and {name}. With --adapter, OUT is compared with MODEL and the adapter
    run beside each other, unmerged.
    """
    weighted = tuple(parse_adapter(text) for text in adapters)
    qlora = take_qlora(flags, weighted)
    chosen = {name: flags.pop(name) for name in STAGE_FLAGS}
    write(session, model, lambda: make_stage(out, to, chosen), weighted, qlora, flags)
