"""`quantpress convert`: one pass from a model to a file that is proved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantpress.convert.gguf.file_types import FILE_TYPES
from quantpress.pipelines.cli import Session
from quantpress.pipelines.commands.adapters import adapter_option, parse_adapter, qlora_options, take_qlora
from quantpress.pipelines.commands.onnx_options import ONNX_FLAGS, onnx_options
from quantpress.pipelines.commands.options import press_options
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
  quantpress convert ./model ./model-onnx --to onnx --precision int4
  quantpress convert ./model tuned-Q8_0.gguf --outtype q8_0 --adapter ./adapter
  quantpress convert ./model mixed.gguf --adapter ./tone=0.7 --adapter ./facts=0.3
  quantpress convert ./model model.gguf --outtype q4_0 --dry-run
"""
TYPES = ", ".join(name.lower() for name in FILE_TYPES)
GGUF_FLAGS = (
    "outtype", "tensor_type", "output_tensor_type", "token_embedding_type", "leave_output_tensor", "pure",
    "override_kv", "metadata", "vocab_only", "model_name",
)  # fmt: skip
FLAGS = {
    "gguf": GGUF_FLAGS,
    "onnx": (*ONNX_FLAGS, "output_tensor_type", "token_embedding_type"),
    "safetensors": ("dtype",),
}
STAGE_FLAGS = tuple(dict.fromkeys(name for names in FLAGS.values() for name in names))
TITLES = {"gguf": "GGUF", "onnx": "ONNX", "safetensors": "safetensors"}
MAIN_FLAG = {"gguf": "--outtype", "onnx": "--precision", "safetensors": "--dtype"}


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
        UsageError: neither says what to write, or flags of another format are given.
    """
    target = to or _target_of(out, flags)
    _refuse_others(target, flags)
    options = {name: flags[name] for name in FLAGS[target]}
    if target == "safetensors":
        from quantpress.pipelines.safetensors_stage import Safetensors

        return Safetensors(output=out, **options)
    if target == "onnx":
        from quantpress.pipelines.onnx_stage import Onnx

        for name in ("output_tensor_type", "token_embedding_type"):
            options[name] = options[name] and options[name].lower()
        return Onnx(output=out, **{name: value for name, value in options.items() if value is not None})
    from quantpress.pipelines.gguf_stage import Gguf

    return Gguf(output=out, tensor_types=_pairs(options.pop("tensor_type")), **options)


def _target_of(out: Path, flags: dict[str, Any]) -> str:
    if out.suffix.lower() == ".gguf":
        return "gguf"
    for target in ("safetensors", "onnx"):
        if flags[MAIN_FLAG[target].strip("-")]:
            return target
    raise UsageError(
        f"{out}: cannot tell what to write; name it *.gguf or give --to gguf, --to onnx or --to safetensors"
    )


def _refuse_others(target: str, flags: dict[str, Any]) -> None:
    """Refuses flags that the format does not have."""
    for name, value in flags.items():
        given = value not in (None, (), False, "auto") or (value is False and name in ("symmetric", "act_order"))
        if given and name not in FLAGS[target]:
            others = " and ".join(TITLES[each] for each in FLAGS if name in FLAGS[each])
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} is for {others} outputs; {TITLES[target]} takes {MAIN_FLAG[target]}")


@click.command(name="convert", epilog=EXAMPLES)
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--to", type=click.Choice(["gguf", "onnx", "safetensors"]), help="Format; default: from OUT's name.")
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
@onnx_options
@adapter_option
@qlora_options
@press_options
@click.pass_obj
def command(
    session: Session, /, model: str, out: Path, to: str | None, adapters: tuple[str, ...], **flags: Any
) -> None:
    """Press MODEL into OUT in one pass, run OUT, and compare it with MODEL.

    MODEL is a Hugging Face folder, a Hub id (org/name or org/name@revision) or a GGUF file. OUT is a .gguf file or a
    folder for ONNX or safetensors, and may hold {ftype} and {name}. With --adapter, OUT is compared with MODEL and
    the adapter run beside each other, unmerged.
    """
    weighted = tuple(parse_adapter(text) for text in adapters)
    qlora = take_qlora(flags, weighted)
    chosen = {name: flags.pop(name) for name in STAGE_FLAGS}
    write(session, model, lambda: make_stage(out, to, chosen), weighted, qlora, flags)
