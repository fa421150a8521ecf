"""Weights of tiny checkpoints put into a graph by `ModelWeights`, and what the graph gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
from safetensors.numpy import load_file

from quantpress.convert.checkpoint import Array, Checkpoint
from quantpress.convert.onnx.graph import GraphBuilder
from quantpress.convert.onnx.options import OnnxOptions
from quantpress.convert.onnx.weights import ModelWeights
from quantpress.convert.open import open_checkpoint
from quantpress.convert.preflight import Preflight, preflight
from tests.onnx_linears import Graph
from tests.tiny import tiny_case, tiny_checkpoint

Adds = Callable[[ModelWeights, ir.Value], list[ir.Value]]
Opened = tuple[Checkpoint, Preflight, dict[str, Array]]


class Cases:
    """Makes each tiny checkpoint once, in folders under one; gives it with its bound table and all its tensors."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, name: str, dtype: str = "float32") -> Opened:
        folder, case = self._folder / f"{name}-{dtype}", tiny_case(name)
        if not folder.exists():
            tiny_checkpoint(folder, case.family, dtype=dtype, **case.options)
        checkpoint = open_checkpoint(folder)
        return checkpoint, preflight(checkpoint), load_file(folder / "model.safetensors")


def run(
    folder: Path, source: Checkpoint, checked: Preflight, options: OnnxOptions, values: Array, add: Adds,
    *, allow_nonfinite: bool = False,
) -> tuple[list[Array], Graph]:  # fmt: skip
    """Runs what `add` puts into a graph, on values (B, S, K) or on ids (B, S)."""

    def nodes(builder: GraphBuilder, given: ir.Value) -> list[ir.Value]:
        return add(ModelWeights(builder, source, checked, options, allow_nonfinite=allow_nonfinite), given)

    columns = None if values.dtype.kind == "i" else values.shape[-1]
    graph = Graph(
        folder, nodes, columns=columns, compute=options.compute, opset=options.opset, standard=options.standard_ops,
        threads=2,
    )  # fmt: skip
    return graph.run(values), graph


def linear(slot: str, layer: int) -> Adds:
    return lambda weights, given: [weights.linear(given, slot, layer)]


def by_part(values: Array, heads: int) -> Array:
    """From (..., heads * 3 * head_dim) to all q, all k, all v: what GPTNeoXAttention does with its fused product."""
    parts = values.reshape(*values.shape[:-1], heads, 3, -1)
    return np.moveaxis(parts, -2, -3).reshape(values.shape)
