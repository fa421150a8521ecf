"""Linears of a layer that read the same input, put side by side so that one product computes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from quantpress.convert.layer import Layer, Linear
from quantpress.convert.packed_weights import Int8Linear, PackedLinear

__all__ = ["fused", "side_by_side"]

_QKV = ("attn_q", "attn_k", "attn_v")
_GATE_UP = ("ffn_gate", "ffn_up")  # the order in which `Layer` splits them


def fused(layer: Layer) -> Layer:
    """Gives the same layer with q, k and v as one linear, and gate and up as one, where their weights allow it.

    Linears in codes can stand side by side if their codes have the same form. Which sums an output is made of does not
    change; in which order they are added may, where the kernels are launched otherwise for a greater matrix.

    Args:
        layer: a layer without adapters, whose weights are copied.
    """
    if layer.adapt is not None or layer.observe is not None:
        return layer
    traits, weights, linears = layer.traits, dict(layer.weights), dict(layer.linears)
    if not traits.fused_qkv and _joined(weights, linears, _QKV, "attn_qkv"):
        traits = replace(traits, fused_qkv=True)
    if traits.gate == "separate" and _joined(weights, linears, _GATE_UP, "ffn_up"):
        traits = replace(traits, gate="fused")
    return replace(layer, traits=traits, weights=weights, linears=linears)


def side_by_side(linears: Sequence[Linear | None]) -> PackedLinear | Int8Linear | None:
    """Gives one linear with the outputs of all, None if their codes have not the same form."""
    int8 = [linear for linear in linears if isinstance(linear, Int8Linear)]
    if len(int8) == len(linears):
        alike = len({(linear.codes.shape[1], linear.scale.dtype) for linear in int8}) == 1
        return _int8_together(int8) if alike else None
    packed = [linear for linear in linears if isinstance(linear, PackedLinear)]
    weights = [linear.weight for linear in packed]
    forms = {(one.columns, one.bits, one.group_size, one.scale.dtype, one.zero is None) for one in weights}
    alike = len(forms) == len({linear.deterministic for linear in packed}) == 1
    if len(packed) != len(linears) or not alike or any(one.order is not None for one in weights):
        return None
    zeros = [one.zero for one in weights if one.zero is not None]
    whole = replace(
        weights[0], words=torch.cat([one.words for one in weights], dim=1),
        scale=torch.cat([one.scale for one in weights], dim=1), zero=torch.cat(zeros, dim=1) if zeros else None,
    )  # fmt: skip
    return PackedLinear(whole, packed[0].deterministic)


def _int8_together(linears: Sequence[Int8Linear]) -> Int8Linear:
    return Int8Linear(torch.cat([one.codes for one in linears]), torch.cat([one.scale for one in linears]))


def _joined(weights: dict[str, torch.Tensor], linears: dict[str, Linear], names: Sequence[str], target: str) -> bool:
    """Replaces the linears `names` by one called `target`, if that can be done."""
    biases = [weights.get(f"{name}.bias") for name in names]
    present = [bias for bias in biases if bias is not None]
    if present and len(present) != len(biases):
        return False
    slots = [f"{name}.weight" for name in names]
    joined = side_by_side([linears.get(slot) for slot in slots])
    dense = _same_type(weights, slots)
    if joined is None and not dense:
        return False
    whole = torch.cat([weights[slot] for slot in slots]) if dense else None
    for name in names:
        linears.pop(f"{name}.weight", None)
        weights.pop(f"{name}.weight", None)
        weights.pop(f"{name}.bias", None)
    if joined is not None:
        linears[f"{target}.weight"] = joined
    if whole is not None:
        weights[f"{target}.weight"] = whole
    if present:
        weights[f"{target}.bias"] = torch.cat(present)
    return True


def _same_type(weights: Mapping[str, torch.Tensor], slots: Sequence[str]) -> bool:
    found = [weights[slot] for slot in slots if slot in weights]
    return len(found) == len(slots) and len({weight.dtype for weight in found}) == 1
