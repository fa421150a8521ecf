"""The flags of `convert` that say how codes are found, for GGUF and ONNX; one that is not given is None."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

__all__ = ["METHOD_FLAGS", "method_options"]

Command = TypeVar("Command", bound=Callable[..., Any])
_METHODS = ("rtn", "gptq", "hqq", "awq")  # what a format does not have, its stage refuses

_OPTIONS = (
    click.option(
        "--method",
        type=click.Choice(_METHODS, case_sensitive=False),
        help="How codes are found; hqq and awq for ONNX only.  [default: rtn; of a quantized MODEL: its codes as they"
        " are]",
    ),
    click.option(
        "--calibration",
        type=click.Path(path_type=Path),
        help="UTF-8 text for gptq, awq and --int8 static.  [default: a built-in one]",
    ),
    click.option("--samples", type=click.IntRange(min=1), help="Windows of that text.  [default: 128]"),
    click.option("--sequence-length", type=click.IntRange(min=2), help="Tokens of each.  [default: context, max 2048]"),
    click.option("--seed", type=click.IntRange(min=0), help="Where the windows begin.  [default: 0]"),
    click.option("--act-order/--no-act-order", default=None, help="GPTQ: greatest inputs first.  [default: yes]"),
    click.option("--damping", type=click.FloatRange(min=0), help="GPTQ: of the Hessian.  [default: 0.01]"),
)

METHOD_FLAGS = ("method", "calibration", "samples", "sequence_length", "seed", "act_order", "damping")


def method_options(command: Command) -> Command:
    """Adds them to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
