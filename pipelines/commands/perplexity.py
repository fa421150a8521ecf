"""`quantpress perplexity`: llama.cpp's perplexity of any model, in any runtime that runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from quantpress.pipelines.cli import Session
from quantpress.pipelines.commands.options import machine_options, resolve_device, text_options
from quantpress.pipelines.judging import RUNTIMES, JudgeOptions
from quantpress.pipelines.verification import perplexity

EXAMPLES = """
\b
Examples:
  quantpress perplexity model-Q8_0.gguf --text wiki.test.raw
  quantpress perplexity ./model --text wiki.test.raw --chunks 20 --json
  quantpress perplexity ./model-onnx --text wiki.test.raw --runtime onnxruntime
"""


@click.command(name="perplexity", epilog=EXAMPLES)
@click.argument("model")
@click.option("--runtime", type=click.Choice(RUNTIMES), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@text_options
@machine_options
@click.pass_obj
def command(session: Session, /, model: str, as_json: bool, device: str, text: Path | None, **flags: Any) -> None:
    """Perplexity of MODEL on a text, by llama.cpp's method: chunks, BOS, second half scored."""
    options = JudgeOptions(text=text, device=resolve_device(device), **flags)
    with session.progress() as progress:
        result = perplexity(model, options=options, progress=progress)
    if as_json:
        click.echo(json.dumps(result.to_json(), indent=2))
    else:
        click.echo(
            f"{result.model}: perplexity {result.perplexity:.4f} ± {result.stderr:.4f} in {result.runtime} "
            f"({result.chunks} chunks of {result.context}, {result.tokens} tokens scored, {result.seconds:.1f} s)"
        )
