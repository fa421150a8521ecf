"""`quantpress perplexity`: llama.cpp's perplexity of any model, in any runtime that runs it."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import click

from quantpress.convert.open import open_checkpoint
from quantpress.convert.tokenizer import Tokenizer, TokenizerFiles
from quantpress.pipelines.cli import Session
from quantpress.pipelines.commands.options import machine_options, resolve_device, text_options
from quantpress.pipelines.perplexity import Perplexity, perplexity
from quantpress.pipelines.progress import Progress, no_progress
from quantpress.pipelines.verification import (
    DEFAULT_CONTEXT,
    RUNTIMES,
    JudgeOptions,
    open_runtime,
    read_text,
    text_windows,
)

EXAMPLES = r"""
Examples:

\b
  quantpress perplexity model-Q8_0.gguf --text wiki.test.raw
  quantpress perplexity ./model --text wiki.test.raw --chunks 20 --json
"""


def measure(model: str, options: JudgeOptions, progress: Progress = no_progress) -> Perplexity:
    """Scores a text by llama.cpp's method (INTERFACE: perplexity).

    Args:
        model: GGUF file, checkpoint folder or Hub id.
        options: text, context, chunks, runtime and device; limits are not used.
        progress: told how far the work has come.

    Raises:
        InputError: the model or the text cannot be used.
        ParityError: the model gives values that are not finite.
    """
    source = open_checkpoint(model)
    tokenizer = Tokenizer(TokenizerFiles(source.tokenizer_files, name=source.name))
    text = read_text(options.text)
    context = options.context or DEFAULT_CONTEXT
    windows = text_windows(tokenizer, text.text, context=context, chunks=options.chunks)
    place = source.files[0].path if source.format == "gguf" else source
    with open_runtime(place, options, context=context) as runtime:
        result = perplexity(runtime, windows, model=source.name, progress=partial(progress, "perplexity"))
    return dataclasses.replace(result, seconds=round(result.seconds, 3))


@click.command(name="perplexity", epilog=EXAMPLES)
@click.argument("model")
@click.option("--runtime", type=click.Choice(RUNTIMES), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@text_options
@machine_options
@click.pass_obj
def command(session: Session, model: str, as_json: bool, device: str, text: Path | None, **flags: Any) -> None:
    """Perplexity of MODEL on a text, by llama.cpp's method: chunks, BOS, second half scored."""
    options = JudgeOptions(text=text, device=resolve_device(device), **flags)
    with session.progress() as progress:
        result = measure(model, options, progress)
    if as_json:
        click.echo(json.dumps(result.to_json(), indent=2))
    else:
        click.echo(
            f"{result.model}: perplexity {result.perplexity:.4f} ± {result.stderr:.4f} in {result.runtime} "
            f"({result.chunks} chunks of {result.context}, {result.tokens} tokens scored, {result.seconds:.1f} s)"
        )
