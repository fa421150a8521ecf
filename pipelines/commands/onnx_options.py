"""The flags of `convert --to onnx`; one that is not given is None, so that the stage's own default holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from quantpress.convert.onnx.options import COMPUTE_TYPES, INT8_STYLES, PRECISIONS
from quantpress.pipelines.commands.method_options import METHOD_FLAGS

__all__ = ["ONNX_FLAGS", "onnx_options"]

Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--precision",
        type=click.Choice(PRECISIONS, case_sensitive=False),
        help="ONNX type of the weights.  [default: fp32; of a quantized MODEL: its codes as they are]",
    ),
    click.option("--block-size", type=int, help="ONNX int4, int8: columns that share a scale.  [default: 32]"),
    click.option(
        "--symmetric/--asymmetric",
        default=None,
        help="ONNX int4, int8: without or with zeros.  [default: with zeros for awq and hqq]",
    ),
    click.option("--accuracy-level", type=int, help="ONNX int4, int8: 4 rounds inputs to int8, faster.  [default: 0]"),
    click.option(
        "--int8",
        type=click.Choice(INT8_STYLES, case_sensitive=False),
        help="ONNX int8: which inputs are rounded too.  [default: weight-only]",
    ),
    click.option(
        "--compute-type",
        type=click.Choice(COMPUTE_TYPES, case_sensitive=False),
        help="ONNX type of activations, fp16 for CUDA.  [default: fp32; fp16 for --precision fp16]",
    ),
    click.option("--opset", type=int, help="ONNX opset.  [default: 23]"),
    click.option("--standard-ops", is_flag=True, help="ONNX: only operators of the standard."),
)

ONNX_FLAGS = (
    "precision", "block_size", "symmetric", "accuracy_level", "int8", "compute_type", "opset", "standard_ops",
    *METHOD_FLAGS,
)  # fmt: skip


def onnx_options(command: Command) -> Command:
    """Adds them to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
