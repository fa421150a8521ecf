"""All experts of a layer in one node: com.microsoft.MoE with floats, QMoE with codes of 4 bits.

Sources: onnxruntime's docs/ContribOperators.md and contrib_ops/cpu/moe/moe_cpu.cc. Both choose the greatest values that
they are given for a token. MoE weighs by their softmax, so it is given logarithms; QMoE takes weights as they are.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from quantpress.convert.onnx.expert_stacks import ExpertStacks
from quantpress.convert.onnx.graph import MICROSOFT
from quantpress.convert.onnx.mlp import ALPHAS
from quantpress.convert.onnx.routing import TOKENS, Adds, Routes

__all__ = ["fused_experts"]


def fused_experts(add: Adds, values: ir.Value, routes: Routes, stacks: ExpertStacks) -> ir.Value:
    """Adds the node.

    Args:
        add: takes the nodes.
        values: (N, hidden).
        routes: which experts with which weights.
        stacks: the experts.

    Returns:
        (N, hidden).
    """
    hyper, builder = add.frame.hyper, add.frame.builder
    settings = hyper.experts
    assert settings is not None, "the layer has experts"
    shape, compute = (TOKENS, hyper.hidden), builder.compute
    attributes: dict[str, Any] = {
        "k": settings.used,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": ALPHAS[hyper.activation],
        "activation_beta": 0.0 if settings.limit is None else 1.0,
    }
    if settings.limit is not None:
        attributes["swiglu_limit"] = settings.limit
    shares = _dense(add, routes, settings.count)
    if stacks.block_size:
        shares = builder.cast(shares, compute, name=f"{add.name}/Cast")
        inputs = [
            values, shares, stacks.up, stacks.up_scales, stacks.up_bias, stacks.down, stacks.down_scales,
            stacks.down_bias, None, None, None, stacks.up_zeros, stacks.down_zeros, None, shares,
        ]  # fmt: skip
        attributes |= {"normalize_routing_weights": 0, "expert_weight_bits": 4, "block_size": stacks.block_size}
        attributes["accuracy_level"] = stacks.accuracy_level
        return builder.add("QMoE", inputs, domain=MICROSOFT, name=f"{add.name}/QMoE", shape=shape, **attributes)
    logarithms = builder.cast(add("Log", [shares], (TOKENS, settings.count)), compute, name=f"{add.name}/Cast")
    inputs = [values, logarithms, stacks.up, stacks.up_bias, stacks.down, stacks.down_bias]
    given = builder.add(
        "MoE", inputs, domain=MICROSOFT, name=f"{add.name}/MoE", shape=shape, normalize_routing_weights=1, **attributes
    )
    return _times_total(add, given, routes)


def _dense(add: Adds, routes: Routes, count: int) -> ir.Value:
    """Gives the weight of every expert, (N, experts) float32, 0 for those that were not chosen."""
    shape = (TOKENS, count)
    size = add("Shape", [routes.scores], (2,), "INT64")
    nothing = add("ConstantOfShape", [size], shape)  # of float32 zeros, its default
    return add("ScatterElements", [nothing, routes.chosen, routes.weights], shape, axis=1)


def _times_total(add: Adds, values: ir.Value, routes: Routes) -> ir.Value:
    """Multiplies what was weighed by shares of one with what the weights add up to."""
    shape, compute = (TOKENS, add.frame.hyper.hidden), add.frame.builder.compute
    if routes.total == 1.0:
        return values
    if routes.total is not None:
        total = add.constant(routes.total)
    else:
        total = add("ReduceSum", [routes.weights, add.constant([1])], (TOKENS, 1), keepdims=1)
        total = add.frame.builder.cast(total, compute, name=f"{add.name}/Cast")
    return add("Mul", [values, total], shape, compute)
