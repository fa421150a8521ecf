"""A mixture of experts in the graph: each token goes to a few of the layer's MLPs, and no other computes it.

A layer with many experts is one node, com.microsoft.MoE or QMoE (onnxruntime's docs/ContribOperators.md), where that
computes the same; the weights of a token's experts are told to it. Otherwise the pairs of token and expert are sorted
by expert, so that one Split cuts them into what each expert computes; an expert that no token goes to computes nothing.
What they give is gathered back in the order of the tokens.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from quantpress.convert.arch.spec import Experts
from quantpress.convert.onnx.frame import Frame
from quantpress.convert.onnx.fused_experts import fused_experts
from quantpress.convert.onnx.mlp import ALPHAS, mlp
from quantpress.convert.onnx.routing import TOKENS, Adds, route

__all__ = ["experts"]

_PAIRS = "token_expert_count"
_MANY = 16  # experts of a layer; a node for each linear of so many makes loading and single tokens slow


def _fuses(frame: Frame, layer: int, settings: Experts) -> bool:
    """Whether one node shall compute all experts: it knows gated ones with a sigmoid, and shares less among threads."""
    known = frame.traits(layer).gate != "" and frame.hyper.activation in ALPHAS
    return not frame.builder.standard and known and settings.count >= _MANY


def experts(frame: Frame, layer: int, values: ir.Value) -> ir.Value:
    """Adds a layer's experts.

    Args:
        frame: the model.
        layer: number of the layer.
        values: (B, S, hidden).

    Returns:
        (B, S, hidden).
    """
    settings = frame.hyper.experts
    assert settings is not None, "the layer has experts"
    add, hidden = Adds(frame, f"/layers.{layer}/experts"), frame.hyper.hidden
    compute = frame.builder.compute
    flat = add("Reshape", [values, add.constant((-1, hidden))], (TOKENS, hidden), compute)
    scores = frame.weights.linear(flat, "ffn_gate_inp.weight", layer)
    scores = frame.builder.cast(scores, "FLOAT", name=f"{add.name}/Cast")
    routes = route(add, scores, settings, frame.weights.vector("exp_probs_b.bias", layer))
    stacks = frame.weights.expert_stacks(layer) if _fuses(frame, layer, settings) else None
    if stacks is None:
        given = _computed(add, layer, flat, routes.chosen, settings)
        shares = frame.builder.cast(routes.weights, compute, name=f"{add.name}/Cast")
        shares = add("Unsqueeze", [shares, add.constant([1])], (TOKENS, 1, settings.used), compute)
        total = add("MatMul", [shares, given], (TOKENS, 1, hidden), compute)
        total = add("Reshape", [total, add.constant((-1, hidden))], (TOKENS, hidden), compute)
    else:
        total = fused_experts(add, flat, routes, stacks)
    if settings.shared:
        total = add("Add", [total, _shared(add, layer, flat, settings)], (TOKENS, hidden), compute)
    back = add("Shape", [values], (3,), "INT64")
    return add("Reshape", [total, back], frame.shape, compute)


def _computed(add: Adds, layer: int, flat: ir.Value, chosen: ir.Value, settings: Experts) -> ir.Value:
    """Gives what every token's experts make of it, (N, used, hidden)."""
    frame, count, used, hidden = add.frame, settings.count, settings.used, add.frame.hyper.hidden
    compute, builder = frame.builder.compute, frame.builder
    pairs = add("Reshape", [chosen, add.constant([-1])], (_PAIRS,), "INT64")
    # sorted as numbers of a float: processors and graphics processors both have that
    wide = builder.cast(pairs, "FLOAT", name=f"{add.name}/Cast")
    _, order = builder.add_many(
        "TopK", [wide, add("Shape", [pairs], (1,), "INT64")], [("FLOAT", (_PAIRS,)), ("INT64", (_PAIRS,))],
        name=f"{add.name}/Sort", axis=0, largest=0, sorted=1,
    )  # fmt: skip
    token = add("Div", [order, add.constant(used)], (_PAIRS,), "INT64")
    inputs = add("Gather", [flat, token], (_PAIRS, hidden), compute, axis=0)
    ends = add.constant(np.asarray([0, 1], np.int64))
    hits = add("OneHot", [pairs, add.constant(count), ends], (_PAIRS, count), "INT64", axis=-1)
    sizes = add("ReduceSum", [hits, add.constant([0])], (count,), "INT64", keepdims=0)
    known = [(compute, (f"expert_{layer}_{number}", hidden)) for number in range(count)]
    parts = builder.add_many("Split", [inputs, sizes], known, name=f"{add.name}/Split", axis=0)
    gate, size = frame.traits(layer).gate, settings.intermediate
    given = [
        mlp(frame, layer, part, gate=gate, size=size, kind="_exps", expert=f".{number}")
        for number, part in enumerate(parts)
    ]
    joined = add("Concat", given, (_PAIRS, hidden), compute, axis=0)
    # where a pair went: the inverse of a permutation sorts it
    _, places = builder.add_many(
        "TopK", [builder.cast(order, "FLOAT", name=f"{add.name}/Cast"), add("Shape", [pairs], (1,), "INT64")],
        [("FLOAT", (_PAIRS,)), ("INT64", (_PAIRS,))], name=f"{add.name}/Sort", axis=0, largest=0, sorted=1,
    )  # fmt: skip
    places = add("Reshape", [places, add.constant((-1, used))], (TOKENS, used), "INT64")
    return add("Gather", [joined, places], (TOKENS, used, hidden), compute, axis=0)


def _shared(add: Adds, layer: int, flat: ir.Value, settings: Experts) -> ir.Value:
    """Gives what the MLP that every token goes to makes of it, (N, hidden)."""
    frame, shape = add.frame, (TOKENS, add.frame.hyper.hidden)
    given = mlp(frame, layer, flat, gate=frame.traits(layer).gate, size=settings.shared, kind="_shexp")
    if not settings.shared_gate:
        return given
    share = frame.weights.linear(flat, "ffn_gate_inp_shexp.weight", layer)
    share = add("Sigmoid", [share], (TOKENS, 1), frame.builder.compute)
    return add("Mul", [given, share], shape, frame.builder.compute)
