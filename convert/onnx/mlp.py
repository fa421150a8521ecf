"""The MLP of a layer, or of one expert: up, gate, activation, down."""

from __future__ import annotations

import onnx_ir as ir

from quantpress.convert.onnx.frame import Frame
from quantpress.convert.onnx.graph import MICROSOFT, GraphBuilder
from quantpress.convert.onnx.linear import with_last

__all__ = ["ALPHAS", "activate", "mlp"]

# activations x * sigmoid(alpha x) -> alpha
ALPHAS = {"silu": 1.0, "gelu_quick": 1.702}


def mlp(
    frame: Frame, layer: int, values: ir.Value, *, gate: str, size: int, kind: str = "", expert: str = ""
) -> ir.Value:
    """Adds an MLP.

    Args:
        frame: the model.
        layer: number of the layer.
        values: (..., hidden).
        gate: as `Traits.gate`.
        size: its inner values.
        kind: "_exps" or "_shexp" of a mixture, "" of a plain MLP.
        expert: "." and a number with "_exps".

    Returns:
        (..., hidden).
    """
    builder, weights = frame.builder, frame.weights
    name, shape = f"/layers.{layer}/mlp{kind}{expert}", with_last(values, size)

    def linear(part: str, given: ir.Value) -> ir.Value:
        return weights.linear(given, f"ffn_{part}{kind}{expert}.weight", layer)

    up = linear("up", values)
    if not gate:
        return linear("down", activate(builder, up, frame.hyper.activation, name))
    if gate == "separate":
        gated = linear("gate", values)
    else:
        outputs = [(builder.compute, shape)] * 2
        gated, up = builder.add_many("Split", [up], outputs, name=f"{name}/Split", axis=-1, num_outputs=2)
    limit = frame.hyper.experts.limit if kind == "_exps" and frame.hyper.experts is not None else None
    if limit is not None:
        gated, up = _clamped(builder, gated, up, limit, name)
    active = activate(builder, gated, frame.hyper.activation, name)
    return linear("down", builder.add("Mul", [active, up], name=f"{name}/Mul", shape=shape))


def _clamped(builder: GraphBuilder, gate: ir.Value, up: ir.Value, limit: float, name: str) -> tuple[ir.Value, ir.Value]:
    """Cuts the gate off above the limit, what goes up on both sides, and adds one to it; see `Experts.limit`."""
    shape = builder.shape_of(gate)
    low, high, one = (builder.constant(each) for each in (-limit, limit, 1.0))
    gate = builder.add("Min", [gate, high], name=f"{name}/Min", shape=shape)
    up = builder.add("Clip", [up, low, high], name=f"{name}/Clip", shape=shape)
    return gate, builder.add("Add", [up, one], name=f"{name}/Add", shape=shape)


def activate(builder: GraphBuilder, values: ir.Value, kind: str, name: str) -> ir.Value:
    """Applies an activation by its name in `Hyperparameters.activation`; `name` begins those of the nodes."""
    shape = None if values.shape is None else with_last(values, int(values.shape[-1]))  # type: ignore[arg-type]
    if kind in ("relu", "relu2"):
        positive = builder.add("Relu", [values], name=f"{name}/Relu", shape=shape)
        if kind == "relu":
            return positive
        return builder.add("Mul", [positive, positive], name=f"{name}/Square", shape=shape)
    if kind in ("gelu", "gelu_tanh"):
        approximate = "tanh" if kind == "gelu_tanh" else "none"
        return builder.add("Gelu", [values], name=f"{name}/Gelu", shape=shape, approximate=approximate)
    alpha = ALPHAS[kind]
    if not builder.standard:
        return builder.add("QuickGelu", [values], domain=MICROSOFT, name=f"{name}/QuickGelu", shape=shape, alpha=alpha)
    inner = values
    if alpha != 1.0:
        inner = builder.add("Mul", [values, builder.constant(alpha)], name=f"{name}/Alpha", shape=shape)
    share = builder.add("Sigmoid", [inner], name=f"{name}/Sigmoid", shape=shape)
    return builder.add("Mul", [values, share], name=f"{name}/Mul", shape=shape)
