"""`quantpress merge`: adapters become part of a model, and every tensor of them is accounted for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantpress.pipelines.cli import Session
from quantpress.pipelines.commands.adapters import pair_weights, qlora_options, take_qlora
from quantpress.pipelines.commands.options import press_options
from quantpress.pipelines.commands.writing import write
from quantpress.quant.errors import UsageError

if TYPE_CHECKING:
    from quantpress.pipelines.stage import BuildingStage

EXAMPLES = """
\b
Examples:
  quantpress merge ./model ./adapter ./merged
  quantpress merge org/name org/adapter './{name}-tuned' --dtype bf16
  quantpress merge ./model ./tone ./facts ./mixed --weight 0.7 --weight 0.3
  quantpress merge ./model ./qlora-adapter ./merged --qlora-base auto
  quantpress merge ./model ./adapter ./merged --dry-run
"""


@click.command(name="merge", epilog=EXAMPLES)
@click.argument("model")
@click.argument("adapters", metavar="ADAPTER...", nargs=-1)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--weight", "weights", type=float, multiple=True, help="Factor on what an adapter adds; one per adapter.")
@click.option("--dtype", help="Type of the values: f32, f16, bf16; default: as stored in MODEL.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Run OUT; compare with MODEL and ADAPTER.")
@click.option("-v", "--verbose", is_flag=True, help="Show every tensor of the adapters.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with the whole ledger.")
@qlora_options
@press_options
@click.pass_obj
def command(
    session: Session, /, model: str, adapters: tuple[str, ...], out: Path, weights: tuple[float, ...], **flags: Any
) -> None:
    """Merge one or more ADAPTERs into MODEL, in order, and write the result to the folder OUT.

    MODEL and ADAPTER are folders or Hub ids; OUT may hold {name} and {ftype}. The merge is computed in float64 and
    rounded once, to the types of MODEL or to --dtype; then OUT is run and compared with MODEL and the adapters run
    beside each other, unmerged. What is printed says what became of every tensor of each adapter: "change" is the norm
    of what was added to a tensor, relative to the tensor's own.
    """
    if not adapters:
        raise UsageError(f"merge takes three names or more, MODEL ADAPTER... OUT; found {model} and {out} only")
    weighted = pair_weights(adapters, weights)
    qlora = take_qlora(flags, weighted)
    dtype = flags.pop("dtype")
    write(session, model, lambda: _stage(out, dtype), weighted, qlora, flags, tables=True)


def _stage(out: Path, dtype: str | None) -> BuildingStage:
    from quantpress.pipelines.safetensors_stage import Safetensors

    return Safetensors(output=out, dtype=dtype)
