"""Options that several commands share, so that a flag means the same everywhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from quantpress.quant.errors import OutputError

if TYPE_CHECKING:  # what loads numpy is imported while the weights are being hashed already
    from quantpress.pipelines.judging import JudgeOptions

Command = TypeVar("Command", bound=Callable[..., Any])
SIZE_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class ByteSize(click.ParamType[int]):
    """`500M` or `2G`, decimal units as llama.cpp's `--split-max-size`; gives bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parses the text of a flag."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", str(value).strip().upper())
        if not match or not float(match[1]):
            self.fail(f"{value!r} is not a size: write a number and K, M or G, as in 8G", param, ctx)
        return int(float(match[1]) * SIZE_UNITS[match[2]])


def _apply(command: Command, options: list[Callable[[Command], Command]]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


def writing_options(command: Command) -> Command:
    """Adds the flags of everything that writes (INTERFACE: common to everything that writes)."""
    return _apply(
        command,
        [
            click.option("--force", is_flag=True, help="Replace an existing output."),
            click.option("--dry-run", is_flag=True, help="Show types, sizes and memory; touch no weight."),
            click.option("--allow-nonfinite", is_flag=True, help="Write NaN and Inf instead of refusing them."),
            click.option(
                "--max-memory",
                type=ByteSize(),
                help="Memory for weights while proving, and for activations while quantizing, as in 8G.",
            ),
        ],
    )


def machine_options(command: Command) -> Command:
    """Adds the flags that say what to compute on."""
    return _apply(
        command,
        [
            click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
            click.option("--threads", type=click.IntRange(min=1), help="Worker threads; default: all processors."),
        ],
    )


def text_options(command: Command) -> Command:
    """Adds the flags that say what to read aloud while judging."""
    return _apply(
        command,
        [
            click.option("--text", type=click.Path(path_type=Path), help="UTF-8 text; default: the built-in text."),
            click.option("--context", type=click.IntRange(min=8), help="Tokens per chunk.  [default: 512]"),
            click.option("--chunks", type=click.IntRange(min=1), help="Judge only this many chunks."),
        ],
    )


def limit_options(command: Command) -> Command:
    """Adds the flags that set how far an output may be from its source."""
    positive = click.FloatRange(min=0)
    return _apply(
        command,
        [
            click.option("--max-kld", type=positive, help="Largest mean KL divergence, nats per token."),
            click.option("--max-ppl-change", type=positive, help="Largest relative change of perplexity, either way."),
            click.option("--min-top1", type=click.FloatRange(0, 1), help="Smallest top-1 agreement."),
        ],
    )


def press_options(command: Command) -> Command:
    """Adds the flags of every command that presses a model and proves what it wrote."""
    for options in (machine_options, writing_options, limit_options, text_options):
        command = options(command)
    return command


def resolve_device(device: str) -> str:
    """Turns "auto" into what is there.

    Raises:
        OutputError: "cuda" was asked for and no CUDA device is usable.
    """
    if device == "cpu":
        return device
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if device == "cuda":
        raise OutputError("--device cuda: torch finds no CUDA device; run `quantpress doctor`, or use --device cpu")
    return "cpu"


def take_judge_options(flags: dict[str, Any], *, needs_torch: bool) -> JudgeOptions:
    """Takes the flags that say how to judge out of a writing command's flags; leaves what the run needs too.

    Args:
        flags: of the command; `threads` and `max_memory` stay.
        needs_torch: whether anything will run, so that "auto" must find out what is there.

    Raises:
        OutputError: see `resolve_device`.
    """
    from quantpress.pipelines.judging import JudgeOptions

    names = ("text", "context", "chunks", "max_kld", "max_ppl_change", "min_top1")
    taken = {name: flags.pop(name) for name in names}
    device = flags.pop("device")
    return JudgeOptions(
        **taken,
        device=resolve_device(device) if needs_torch or device == "cuda" else "cpu",
        threads=flags["threads"],
        max_memory=flags["max_memory"],
    )


def take_run_context(flags: dict[str, Any], device: str) -> dict[str, Any]:
    """Takes the flags out that a `RunContext` holds, and gives them as its arguments."""
    from quantpress.pipelines.machine import available_threads

    taken = {name: flags.pop(name) for name in ("threads", "force", "allow_nonfinite", "max_memory")}
    return taken | {"threads": taken["threads"] or available_threads(), "device": device}
