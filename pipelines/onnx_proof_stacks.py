"""Experts out of the stacks that MoE and QMoE take: rows of gate and up by turns, expert after expert."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from quantpress.convert.preflight import Preflight
from quantpress.pipelines.onnx_proof_read import HeldWeight
from quantpress.pipelines.onnx_proof_rows import Array, HeldRows

__all__ = ["stacked_weights"]


def stacked_weights(held: Mapping[str, HeldWeight], checked: Preflight) -> dict[tuple[str, int], HeldWeight]:
    """Gives the weights and biases of experts that lie in stacks, by slot and layer.

    Of com.microsoft.MoE with `swiglu_fusion` 1, row 2i of an expert is gate's row i and row 2i + 1 is up's
    (onnxruntime, docs/ContribOperators.md).
    """
    found: dict[tuple[str, int], HeldWeight] = {}
    for row, layer, tensor in checked.bindings:
        if "_exps." not in row.slot or layer < 0:
            continue
        part, number, kind = row.slot.split(".")
        stack = f"layers.{layer}.experts." + ("down_proj" if part.startswith("ffn_down") else "gate_up_proj")
        whole = held.get(f"{stack}.bias") if kind == "bias" else held.get(f"{stack}.weight") or held.get(stack)
        if whole is None:
            continue
        rows = whole.shape[1]
        count = tensor.shape[0] if row.layout.value == "plain" or kind == "bias" else tensor.shape[-1]
        first = {"ffn_up_exps": 1}.get(part, 0)
        step = 1 if part.startswith("ffn_down") or count == rows else 2
        shape = (count,) if kind == "bias" else (count, whole.shape[2])
        read = partial(_expert, whole, int(number), kind == "bias", rows, count, 0 if step == 1 else first, step)
        found[row.slot, layer] = HeldWeight(whole.name, shape, whole.bits, whole.dtype, read, None, whole.users)
    return found


def _expert(
    whole: HeldWeight, number: int, bias: bool, rows: int, count: int, first: int, step: int, start: int, stop: int
) -> HeldRows:
    """Reads the rows of one expert; where gate and up are one weight of the source, gate's come before up's."""
    if bias:
        every = whole.read(number, number + 1).numbers.reshape(rows, 1, 1)
        parts: list[Array | None] = [every]
    else:
        found = whole.read(number * rows, (number + 1) * rows)
        parts = [found.numbers, found.scale, found.least, found.most]
    if step == 2:
        index = [first + 2 * each for each in range(start, stop)]
    elif "down" in whole.name:
        index = list(range(start, stop))
    else:
        index = [2 * each if each < count // 2 else 2 * (each - count // 2) + 1 for each in range(start, stop)]
    numbers, *others = (each if each is None else each[index] for each in parts)
    assert numbers is not None, "every weight has numbers"
    return HeldRows(numbers, *others)
