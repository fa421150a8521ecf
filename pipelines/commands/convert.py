"""`quantpress convert`: one pass from a model to a file that is proved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantpress.pipelines.cli import Session
from quantpress.pipelines.commands.adapters import adapter_option, parse_adapter, qlora_options, take_qlora
from quantpress.pipelines.commands.gguf_options import GGUF_FLAGS, gguf_options, gguf_values
from quantpress.pipelines.commands.method_options import method_options
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
  quantpress convert ./model model-Q4_K_M.gguf --outtype q4_k_m --imatrix imatrix.gguf
  quantpress convert ./model model-Q4_K_M.gguf --outtype q4_k_m --method gptq --calibration text.txt
  quantpress convert model.gguf ./model-f16 --to safetensors --dtype f16
  quantpress convert ./model ./model-onnx --to onnx --precision int4
  quantpress convert ./model tuned-Q8_0.gguf --outtype q8_0 --adapter ./adapter
  quantpress convert ./model mixed.gguf --adapter ./tone=0.7 --adapter ./facts=0.3
  quantpress convert ./model model.gguf --outtype q4_0 --dry-run
"""
FLAGS = {
    "gguf": GGUF_FLAGS,
    "onnx": (*ONNX_FLAGS, "output_tensor_type", "token_embedding_type"),
    "safetensors": ("dtype",),
}
STAGE_FLAGS = tuple(dict.fromkeys(name for names in FLAGS.values() for name in names))
TITLES = {"gguf": "GGUF", "onnx": "ONNX", "safetensors": "safetensors"}
MAIN_FLAG = {"gguf": "--outtype", "onnx": "--precision", "safetensors": "--dtype"}


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

    return Gguf(output=out, **gguf_values(flags))


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
@gguf_options
@method_options
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
