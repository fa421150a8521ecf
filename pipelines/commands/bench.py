"""`quantpress bench`: measures what runs here; `quantpress bench kernels` the GPU kernels."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from quantpress.pipelines.cli import Session
from quantpress.pipelines.commands.showing import plain_console
from quantpress.pipelines.kernel_bench import SHAPES, BenchOptions, bench, plan
from quantpress.pipelines.machine import available_threads
from quantpress.quant.errors import UsageError

if TYPE_CHECKING:
    from quantpress.kernels.launch import Launch
    from quantpress.pipelines.kernel_bench import BenchResult, Planned

_MOST_JOBS = 16
_EXAMPLES_OF_KERNELS = """
\b
Examples:
  quantpress bench kernels
  quantpress bench kernels --tune --model llama-3-8b --bits 4 --bits 8
  quantpress bench kernels --shape 4096,14336 --rows-in 1 --rows-in 16 --json
  quantpress bench kernels --kind nf4 --group-size 64
  quantpress bench kernels --tune --dry-run
"""
_EXAMPLES = """
\b
Examples:
  quantpress bench kernels
  quantpress bench kernels --tune
"""


def _shapes(ctx: click.Context, option: click.Parameter, texts: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """Reads "4096,14336" and its like."""
    del ctx, option
    found = []
    for text in texts:
        columns, _, rows = text.partition(",")
        if not all(size.isascii() and size.isdigit() and len(size) < 10 for size in (columns, rows)):
            raise click.BadParameter(f"{text!r:.40} is no shape: write inputs and outputs as 4096,14336")
        found.append((int(columns), int(rows)))
    return tuple(found)


@click.group(name="bench", epilog=_EXAMPLES)
def command() -> None:
    """Measure what runs on this machine."""


@command.command(name="kernels", epilog=_EXAMPLES_OF_KERNELS)
@click.option(
    "--kind",
    type=click.Choice(["packed", "w8a8", "nf4"]),
    default="packed",
    show_default=True,
    help="Codes with scales of groups, int8 codes of weights and inputs, or bitsandbytes' four-bit codes.",
)
@click.option("--tune", is_flag=True, help="Search for the best launch parameters and keep them for this GPU.")
@click.option(
    "--bits", type=click.Choice(["2", "3", "4", "8"]), multiple=True, help="Of a code; 4 if not given (8: w8a8)."
)
@click.option("--model", type=click.Choice(sorted(SHAPES)), multiple=True, help="Shapes of this model's layers.")
@click.option(
    "--shape", "shapes", metavar="K,N", multiple=True, callback=_shapes, help="Inputs and outputs of a layer."
)
@click.option("--rows-in", type=int, multiple=True, help="Input rows, such as tokens; powers of two if not given.")
@click.option("--group-size", type=int, default=128, show_default=True, help="Columns that share a scale; 0 for all.")
@click.option("--dtype", type=click.Choice(["float16", "bfloat16", "float32"]), default="bfloat16", show_default=True)
@click.option("--asymmetric", is_flag=True, help="Codes with zeros.")
@click.option("--jobs", type=click.IntRange(1, 64), help="Processes that compile candidates; processors, 16 at most.")
@click.option("--dry-run", is_flag=True, help="Only say what would be measured; needs no GPU.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def kernels(
    session: Session, /, kind: str, tune: bool, bits: tuple[str, ...], model: tuple[str, ...],
    shapes: tuple[tuple[int, int], ...], rows_in: tuple[int, ...], group_size: int, dtype: str, asymmetric: bool,
    jobs: int | None, dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Measure products with quantized matrices on this GPU, beside cuBLAS with dense ones.

    Launches are timed in CUDA graphs, each on a copy of the weight that is not in the cache; medians are printed. With
    --tune the launch parameters of every product are searched for first, and kept in
    ~/.cache/quantpress/kernels/<gpu>.json, where the kernels look for them from then on.
    """
    given = BenchOptions()
    if model or shapes:
        shapes = tuple(dict.fromkeys((*(shape for name in model for shape in SHAPES[name]), *shapes)))
    options = BenchOptions(
        tuple(int(each) for each in bits) or ((8,) if kind == "w8a8" else given.bits), shapes or given.shapes,
        rows_in or given.rows_in, group_size, dtype, not asymmetric, kind,
    )  # fmt: skip
    if tune and kind != "packed":
        raise UsageError(f"--tune: launch parameters of {kind} are chosen by arithmetic, they are not searched for")
    if dry_run:
        _show_plan(*plan(options), tune=tune, as_json=as_json)
        return
    if jobs is not None and not tune:
        raise UsageError("--jobs compiles candidates: it belongs to --tune")
    with session.progress() as progress:
        processes = min(available_threads(), _MOST_JOBS) if jobs is None else jobs
        result = bench(options, tune=tune, jobs=processes, progress=progress)
    _show(result, as_json=as_json)


def _show_plan(device: Any, planned: list[Planned], *, tune: bool, as_json: bool) -> None:
    if as_json:
        record = {"gpu": device.name, "products": [each.to_json() for each in planned]}
        click.echo(json.dumps(record, indent=2))
        return
    from rich.table import Table

    table = Table("inputs x outputs", "bits", "group", "rows in", "launched now", "candidates")
    for each in planned:
        table.add_row(*_product(each.problem), launch_text(each.launch), str(each.candidates))
    plain_console().print(table)
    what = f"{sum(each.candidates for each in planned)} candidates, of which a search tries some" if tune else "timed"
    click.echo(f"{len(planned)} products on {device.name}: {what}; nothing was measured")


def _show(result: BenchResult, *, as_json: bool) -> None:
    rows = [row.to_json(result.copy_bandwidth) for row in result.rows]
    if as_json:
        record: dict[str, Any] = {"gpu": result.gpu, "copy_gb_per_s": round(result.copy_bandwidth / 1e9, 1)}
        written = None if result.written is None else str(result.written)
        click.echo(json.dumps(record | {"written": written, "products": rows}, indent=2))
        return
    from rich.table import Table

    table = Table(
        "inputs x outputs", "bits", "group", "rows in", "launch", "µs", "GB/s", "of copy", "of cuBLAS's speed"
    )
    for row, found in zip(rows, result.rows, strict=True):
        times = f"{row['times_cublas']:.2f} x" if "times_cublas" in row else ""
        table.add_row(
            *_product(found.problem), launch_text(found.launch), f"{row['microseconds']:.1f}", f"{row['gb_per_s']:.0f}",
            f"{100 * row['share_of_copy']:.0f} %", times,
        )  # fmt: skip
    plain_console().print(table)
    click.echo(f"{result.gpu}: a copy moves {result.copy_bandwidth / 1e9:.0f} GB/s")
    if result.written is not None:
        click.echo(f"{result.written}: {len(rows)} products")


def _product(problem: Any) -> tuple[str, str, str, str]:
    shape = f"{problem.columns} x {problem.rows}"
    return shape, str(problem.bits), str(problem.group_size), str(problem.rows_in)


def launch_text(launch: Launch) -> str:
    """Gives a launch in one line."""
    if launch.kernel == "dense":
        return "dequantize, cuBLAS"
    tile = (
        [launch.block_n, launch.block_k]
        if launch.kernel == "gemv"
        else [launch.block_m, launch.block_n, launch.block_k]
    )
    sizes = " x ".join(map(str, tile))
    return f"{launch.kernel} {sizes}, split {launch.split_k}, {launch.warps} warps, {launch.stages} stages"
