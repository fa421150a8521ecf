"""`quantpress verify`: runs a file and compares it with the model it was made from."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantpress.pipelines.cli import Session
from quantpress.pipelines.commands.adapters import adapter_option, parse_adapter
from quantpress.pipelines.commands.options import (
    ByteSize,
    limit_options,
    machine_options,
    resolve_device,
    text_options,
)
from quantpress.pipelines.judging import RUNTIMES, JudgeOptions
from quantpress.pipelines.parity import Parity
from quantpress.pipelines.verification import verify
from quantpress.quant.errors import ParityError

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLES = """
\b
Examples:
  quantpress verify model-Q8_0.gguf --against ./model
  quantpress verify ./model-onnx --against ./model
  quantpress verify tuned-Q8_0.gguf --against ./model --adapter ./adapter
  quantpress verify mixed.gguf --against ./model --adapter ./tone=0.7 --adapter ./facts=0.3
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


@click.command(name="verify", epilog=EXAMPLES)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--against", required=True, help="The model it was made from: folder, Hub id or GGUF file.")
@adapter_option
@click.option("--runtime", type=click.Choice(RUNTIMES), default="auto", show_default=True, help="What runs ARTIFACT.")
@click.option("--json", "as_json", is_flag=True, help="Print the parity report as JSON.")
@text_options
@limit_options
@machine_options
@click.option("--max-memory", type=ByteSize(), help="Memory for weights, as in 8G; default: half of what is free.")
@click.pass_obj
def command(
    session: Session, /, artifact: Path, against: str, adapters: tuple[str, ...], as_json: bool, device: str,
    **flags: Any,
) -> None:  # fmt: skip
    """Run ARTIFACT and compare it with the model it was made from; exit code 4 if it fails or cannot be judged.

    ARTIFACT is a GGUF file, an ONNX folder or .onnx file, or a checkpoint folder.

    With --adapter the model is run with the adapters beside it, unmerged, by code that shares nothing with the merge.
    """
    weighted = tuple(parse_adapter(text) for text in adapters)
    options = JudgeOptions(device=resolve_device(device), **flags)
    with session.progress() as progress:
        parity = verify(artifact, against, adapters=weighted, options=options, progress=progress)
    if as_json:
        click.echo(json.dumps(parity.to_json(), indent=2))
    elif not session.quiet:
        show_parity(parity)
    if not parity.passed:
        raise ParityError(f"{artifact}: {parity.reason}")
