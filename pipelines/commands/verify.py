"""`quantpress verify`: runs a file and compares it with the model it was made from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantpress.convert.hub import download, download_adapter, is_hub_id
from quantpress.pipelines.cli import Session
from quantpress.pipelines.commands.adapters import adapter_option, parse_adapter
from quantpress.pipelines.commands.options import (
    ByteSize,
    limit_options,
    machine_options,
    resolve_device,
    text_options,
)
from quantpress.pipelines.commands.showing import plain_console
from quantpress.pipelines.judging import RUNTIMES, JudgeOptions
from quantpress.pipelines.manifest import ManifestReport, verify_manifest
from quantpress.pipelines.parity import Parity
from quantpress.quant.errors import InputError, ParityError, UsageError

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLES = """
\b
Examples:
  quantpress verify model-Q8_0.gguf --against ./model
  quantpress verify ./model-onnx --against ./model
  quantpress verify tuned-Q8_0.gguf --against ./model --adapter ./adapter
  quantpress verify mixed.gguf --against ./model --adapter ./tone=0.7 --adapter ./facts=0.3
  quantpress verify --manifest model-Q8_0.gguf.quantpress.json
  quantpress verify --manifest ./model-onnx --against ./model
  quantpress verify model-Q4_0.gguf --against org/name --text wiki.test.raw --chunks 20 --max-kld 0.1
"""


def show_parity(parity: Parity) -> None:
    """Prints the figures of a comparison as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "value", "limit")
    if (vectors := parity.vectors) is not None:
        table.add_row(f"mean cosine of {vectors.texts} texts", f"{vectors.mean_cosine:.6f}", "")
        table.add_row("least cosine", f"{vectors.min_cosine:.6f}", f"{vectors.min_allowed:g}")
        table.add_row("texts nearest to themselves", f"{100 * vectors.nearest:.1f} %", "")
    if vectors is None or not math.isnan(parity.mean_kld):
        _add_vocabulary(table, parity)
    if (share := parity.adapter_share) is not None:
        table.add_row(
            "adapters' effect in the file", f"{100 * share.share:.1f} %", f"100 ± {100 * share.tolerance:.0f} %"
        )
    if (content := parity.content) is not None:
        counts = content.tensors, content.settings, content.tokens
        compared = ", ".join(str(count) if count else "-" for count in counts)
        table.add_row("weights, settings, tokens compared", compared, "all as the source's")
    console = Console()
    console.print(table)
    verdict = "passed" if parity.passed else "FAILED"
    runtimes = f"source in {parity.baseline.runtime}, file in {parity.candidate.runtime}"
    console.print(f"{verdict} on {parity.tokens} tokens, {runtimes}: {parity.reason}")


def _add_vocabulary(table: Table, parity: Parity) -> None:
    """Adds what the two sides make of the next tokens, of an encoder: of masked ones."""
    limits = parity.limits
    error = f" ± {parity.mean_kld_stderr:.2g}" if parity.tokens > 1 else ""
    table.add_row("perplexity of the source", f"{parity.baseline.perplexity:.4f} ± {parity.baseline.stderr:.4f}", "")
    table.add_row("perplexity of the file", f"{parity.candidate.perplexity:.4f} ± {parity.candidate.stderr:.4f}", "")
    table.add_row("ratio", f"{parity.ppl_ratio:.6f} ± {parity.ppl_ratio_stderr:.2g}", f"1 ± {limits.max_ppl_change:g}")
    table.add_row("mean KL divergence", f"{parity.mean_kld:.3g}{error}", f"{limits.max_kld:g}")
    table.add_row("99 % KL divergence", f"{parity.kld_p99:.3g}", "")
    table.add_row("greatest KL divergence", f"{parity.max_kld:.3g}", "")
    table.add_row("top-1 agreement", f"{100 * parity.top1_agreement:.2f} %", f"{100 * limits.min_top1:g} %")


def show_manifest(report: ManifestReport) -> None:
    """Prints what became of every file of a sidecar as a table."""
    from rich.table import Table
    from rich.text import Text

    table = Table("file", "bytes", "is")
    for what, files in (("output", report.outputs), ("input", report.inputs)):
        for each in files:
            table.add_row(Text(f"{what} {each.name}"), f"{each.nbytes:,}" if each.sha256 else "", each.state)
    console = plain_console()  # names are a stranger's
    console.print(table)
    console.print(f"{'passed' if report.passed else 'FAILED'}: {report.reason}")


@click.command(name="verify", epilog=EXAMPLES)
@click.argument("artifact", type=click.Path(path_type=Path), required=False)
@click.option("--against", help="The model it was made from: folder, Hub id or GGUF file.")
@adapter_option
@click.option(
    "--manifest", type=click.Path(path_type=Path), metavar="FILE",
    help="Hash the files of this sidecar again, and those of --against and --adapter where these are given.",
)  # fmt: skip
@click.option("--runtime", type=click.Choice(RUNTIMES), default="auto", show_default=True, help="What runs ARTIFACT.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@text_options
@limit_options
@machine_options
@click.option("--max-memory", type=ByteSize(), help="Memory for weights, as in 8G; default: half of what is free.")
@click.pass_obj
def command(
    session: Session, /, artifact: Path | None, against: str | None, adapters: tuple[str, ...], manifest: Path | None,
    as_json: bool, device: str, **flags: Any,
) -> None:  # fmt: skip
    """Run ARTIFACT and compare it with the model it was made from; exit code 4 if it fails or cannot be judged.

    ARTIFACT is a GGUF file, an ONNX folder or .onnx file, or a checkpoint folder.

    With --adapter the model is run with the adapters beside it, unmerged, by code that shares nothing with the merge.

    With --manifest the files themselves are looked at: FILE is a sidecar, or an output that has one, and every file
    that it speaks of must have the bytes that were written. Without ARTIFACT nothing is run.
    """
    weighted = tuple(parse_adapter(text) for text in adapters)
    if artifact is None and manifest is None:
        raise UsageError("give an ARTIFACT to run, or --manifest FILE to hash its files again")
    if artifact is not None and against is None:
        raise UsageError(f"{artifact}: give the model it was made from: --against MODEL")
    problem, said, shows = "", dict[str, Any](), list[Callable[[], None]]()
    with session.progress() as progress:
        if manifest is not None:
            report = verify_manifest(manifest, against=_here(against), adapters=_folders(weighted), progress=progress)
            problem, said = "" if report.passed else f"{report.manifest}: {report.reason}", report.to_json()
            shows.append(partial(show_manifest, report))
        if artifact is not None and against is not None and not problem:
            from quantpress.pipelines.verification import verify  # brings torch

            options = JudgeOptions(device=resolve_device(device), **flags)
            parity = verify(artifact, against, adapters=weighted, options=options, progress=progress)
            problem = "" if parity.passed else f"{artifact}: {parity.reason}"
            said = {**parity.to_json(), **({"manifest": said} if said else {})}
            shows.append(partial(show_parity, parity))
    if as_json:
        click.echo(json.dumps(said, indent=2))
    elif not session.quiet:
        for show in shows:
            show()
    if problem:
        raise ParityError(problem)


def _here(model: str | None) -> Path | None:
    """Gives the place of a model, of one on the Hub that of its copy in the cache."""
    if model is None or Path(model).exists():
        return None if model is None else Path(model)
    if not is_hub_id(model):
        raise InputError(f"{model}: no such file or folder, and not the form of a Hub id")
    return download(model)


def _folders(adapters: tuple[tuple[Any, float], ...]) -> list[Path]:
    return [Path(folder) if Path(folder).exists() else download_adapter(str(folder)) for folder, _ in adapters]
