"""Which experts a token goes to, and with which weights: what convert/experts.py computes in torch, node by node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from quantpress.convert.arch.spec import Experts
from quantpress.convert.onnx.frame import Frame
from quantpress.convert.onnx.graph import Dims

__all__ = ["TOKENS", "Adds", "Routes", "route"]

TOKENS = "token_count"


@dataclass(frozen=True, slots=True)
class Adds:
    """Adds nodes of one layer's mixture, in float32 unless another type is said."""

    frame: Frame
    name: str

    def __call__(
        self, op: str, inputs: list[ir.Value], shape: Dims, dtype: str = "FLOAT", **attributes: Any
    ) -> ir.Value:
        """Adds a node with one output; see `GraphBuilder.add`."""
        name = f"{self.name}/{op}"
        return self.frame.builder.add(op, inputs, name=name, dtype=dtype, shape=shape, **attributes)

    def constant(self, values: Any) -> ir.Value:
        """Gives a small tensor; see `GraphBuilder.constant`."""
        return self.frame.builder.constant(values)

    def number(self, value: float) -> ir.Value:
        """Gives a float32 scalar."""
        return self.frame.builder.constant(np.asarray(value, np.float32))


@dataclass(frozen=True, slots=True)
class Routes:
    """Where tokens go.

    Attributes:
        scores: (N, experts) float32, what the router gives.
        chosen: (N, used) int64, numbers of the experts.
        weights: (N, used) float32.
        total: what the weights of a token add up to; None where that differs.
    """

    scores: ir.Value
    chosen: ir.Value
    weights: ir.Value
    total: float | None


def route(add: Adds, scores: ir.Value, settings: Experts, bias: ir.Value | None) -> Routes:
    """Chooses experts.

    Args:
        add: takes the nodes.
        scores: (N, experts) float32, what the router gives.
        settings: how.
        bias: (experts,) added to the scores for choosing, but not to weights (DeepSeek-V3).
    """
    count, used = settings.count, settings.used
    if settings.gating == "softmax_chosen":
        best, chosen = _top(add, scores, used, (TOKENS,))
        weights = add("Softmax", [best], (TOKENS, used), axis=-1)
    else:
        if settings.gating == "sigmoid":
            shares = add("Sigmoid", [scores], (TOKENS, count))
        else:
            shares = add("Softmax", [scores], (TOKENS, count), axis=-1)
        found = shares
        if bias is not None:
            wide = add.frame.builder.cast(bias, "FLOAT", name=f"{add.name}/Cast")
            found = add("Add", [shares, wide], (TOKENS, count))
        _, chosen = _top(add, _eligible(add, found, settings), used, (TOKENS,))
        weights = add("GatherElements", [shares, chosen], (TOKENS, used), axis=1)
        if settings.normalized:
            total = add("ReduceSum", [weights, add.constant([1])], (TOKENS, 1), keepdims=1)
            if settings.gating == "sigmoid":
                total = add("Add", [total, add.number(1e-20)], (TOKENS, 1))
            weights = add("Div", [weights, total], (TOKENS, used))
    if settings.scale != 1.0:
        weights = add("Mul", [weights, add.number(settings.scale)], (TOKENS, used))
    even = settings.normalized or settings.gating == "softmax_chosen"
    return Routes(scores, chosen, weights, settings.scale if even else None)


def _top(add: Adds, values: ir.Value, count: int, known: tuple[int | str, ...]) -> tuple[ir.Value, ...]:
    """Gives the greatest values of the last dimension, the greatest first, and their numbers."""
    outputs = [("FLOAT", (*known, count)), ("INT64", (*known, count))]
    return add.frame.builder.add_many(
        "TopK", [values, add.constant([count])], outputs, name=f"{add.name}/TopK", axis=-1
    )


def _eligible(add: Adds, shares: ir.Value, settings: Experts) -> ir.Value:
    """Keeps the shares of the best groups of experts; others become 0."""
    groups, each = settings.groups, settings.count // settings.groups
    if groups == 1:
        return shares
    grouped = add("Reshape", [shares, add.constant((-1, groups, each))], (TOKENS, groups, each))
    best, _ = _top(add, grouped, settings.group_top, (TOKENS, groups))
    best = add("ReduceSum", [best, add.constant([2])], (TOKENS, groups), keepdims=0)
    _, kept = _top(add, best, settings.groups_used, (TOKENS,))
    ends = add.constant(np.asarray([0, 1], np.float32))
    kept = add("OneHot", [kept, add.constant(groups), ends], (TOKENS, settings.groups_used, groups), axis=-1)
    kept = add("ReduceMax", [kept, add.constant([1])], (TOKENS, groups), keepdims=0)
    kept = add("Unsqueeze", [kept, add.constant([2])], (TOKENS, groups, 1))
    masked = add("Mul", [grouped, kept], (TOKENS, groups, each))
    return add("Reshape", [masked, add.constant((-1, settings.count))], (TOKENS, settings.count))
