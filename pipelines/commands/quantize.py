"""`quantpress quantize`: a checkpoint whose weights are integers, in the formats that transformers and vLLM load."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantpress.pipelines.cli import Session
from quantpress.pipelines.commands.adapters import adapter_option, parse_adapter, qlora_options, take_qlora
from quantpress.pipelines.commands.options import press_options
from quantpress.pipelines.commands.writing import write

if TYPE_CHECKING:
    from quantpress.pipelines.stage import BuildingStage

EXAMPLES = """
\b
Examples:
  quantpress quantize ./model ./model-int4 --calibration calib.txt
  quantpress quantize org/name './{name}-{ftype}' --method awq --calibration calib.txt
  quantpress quantize ./model ./model-int8 --method rtn --bits 8 --group-size -1
  quantpress quantize ./model ./model-w8a8 --method smoothquant
  quantpress quantize ./model ./mixed --override 'down_proj=bits:8' --skip 'layers\\.0\\.'
  quantpress quantize ./model-gptq ./model-awq --format awq
  quantpress quantize ./model ./model-int4 --dry-run
"""
# as pipelines.quantize_recipe has them, which loads numpy: help and wrong flags should not wait for it
METHODS = ("rtn", "hqq", "gptq", "awq", "smoothquant", "llm_int8")
FORMATS = ("gptq", "gptq_v2", "awq", "compressed-tensors", "bitsandbytes")
STAGE_FLAGS = (
    "method", "bits", "group_size", "symmetric", "format", "scale_type", "clip_search", "activation_bits", "skip",
    "override", "calibration", "samples", "sequence_length", "seed", "act_order", "damping", "drift",
    "calibration_dtype",
)  # fmt: skip


def _make_stage(out: Path, options: dict[str, Any]) -> BuildingStage:
    from quantpress.pipelines.quantize_stage import Quantize

    return Quantize(output=out, **options)


@click.command(name="quantize", epilog=EXAMPLES)
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--method",
    type=click.Choice(METHODS, case_sensitive=False),
    help="rtn, hqq and llm_int8 need no text.  [default: gptq; of a quantized MODEL: its codes as they are]",
)
@click.option("--bits", type=click.Choice(["2", "3", "4", "8"]), help="[default: 4; 8 for int8 methods]")
@click.option(
    "--group-size", type=int, help="Columns that share a scale; -1: a whole row.  [default: 128; -1 for int8 methods]"
)
@click.option(
    "--symmetric/--asymmetric", default=None, help="Without or with zeros.  [default: with zeros for awq and hqq]"
)
@click.option(
    "--format",
    type=click.Choice(FORMATS, case_sensitive=False),
    help="[default: gptq, gptq_v2 with zeros; awq, compressed-tensors and bitsandbytes for their methods]",
)
@click.option("--scale-type", type=click.Choice(["F16", "BF16", "F32"], case_sensitive=False), help="Type of scales.")
@click.option("--activation-bits", type=click.Choice(["8"]), help="Round inputs too, per token, while OUT runs.")
@click.option("--clip-search/--no-clip-search", default=None, help="Choose ranges by squared error.")
@click.option("--skip", multiple=True, metavar="REGEX", help="Weights that stay as they are.")
@click.option(
    "--override", multiple=True, metavar="REGEX=KEY:VALUE,...", help="bits, group_size, symmetric of some weights."
)
@click.option("--calibration", type=click.Path(path_type=Path), help="UTF-8 text; default: a built-in one.")
@click.option("--samples", type=click.IntRange(min=1), default=128, show_default=True, help="Windows of that text.")
@click.option("--sequence-length", type=click.IntRange(min=2), help="Tokens of each.  [default: context, at most 2048]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Where the windows begin.")
@click.option("--act-order/--no-act-order", default=True, show_default=True, help="GPTQ: greatest inputs first.")
@click.option("--damping", type=click.FloatRange(min=0), default=0.01, show_default=True, help="GPTQ: of the Hessian.")
@click.option(
    "--drift",
    type=click.FloatRange(0, 1),
    help="GPTQ: share of the inputs' drift to make up for.  [default: 1 for small models below 8 bits, else 0]",
)
@click.option(
    "--calibration-dtype",
    type=click.Choice(["f32", "bf16"]),
    help="Products of the calibration.  [default: bf16 where the processor has units for it]",
)
@click.option("--verify/--no-verify", default=True, show_default=True, help="Run OUT and compare it with MODEL.")
@click.option("-v", "--verbose", is_flag=True, help="Say how each weight went, and show a table of them.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@adapter_option
@qlora_options
@press_options
@click.pass_obj
def command(session: Session, /, model: str, out: Path, adapters: tuple[str, ...], **flags: Any) -> None:
    """Quantize the linear weights of MODEL into the folder OUT, run OUT, and compare it with MODEL.

    MODEL is a Hugging Face folder, a Hub id or a GGUF file; OUT may hold {ftype} and {name}. Embeddings, the head,
    norms and routers stay as they are, and so does what the format cannot hold. A run that is stopped goes on at the
    layer where it was when the same command is given again.
    """
    weighted = tuple(parse_adapter(text) for text in adapters)
    qlora = take_qlora(flags, weighted)
    options = {name: flags.pop(name) for name in STAGE_FLAGS}
    for name in ("bits", "activation_bits"):
        options[name] = None if options[name] is None else int(options[name])
    if flags["verbose"] and not session.quiet:
        logging.getLogger().setLevel(logging.INFO)
    write(session, model, lambda: _make_stage(out, options), weighted, qlora, flags)
