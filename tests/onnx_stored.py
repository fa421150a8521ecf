"""Reads the weights out of an exported model by what the operators that take them say of them; no code of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

Array = NDArray[Any]


@dataclass(frozen=True)
class Weight:
    """A stored weight.

    Attributes:
        values: (N, K) or (N,) float32.
        step: (N, K) distance of neighbouring values of the grid; None for floats.
        input_grid: scale and zero by which the input of its operator is rounded to uint8; None where it is not.
    """

    values: Array
    step: Array | None = None
    input_grid: tuple[float, int] | None = None


def stored_weights(folder: Path) -> dict[str, Weight]:
    """Gives every weight under the name that the checkpoint has it under."""
    model = onnx.load(folder / "model.onnx")
    arrays = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    found: dict[str, Weight] = {}
    for name, array in arrays.items():
        base = name.removesuffix(".qweight")
        if base == name:
            if name.endswith((".weight", ".bias")):
                found[name] = Weight(array.astype(np.float32))
            continue
        user = next(node for node in model.graph.node if name in node.input and node.op_type in _READERS)
        values, step = _READERS[user.op_type](user, array, arrays)
        found[f"{base}.weight"] = Weight(values, np.abs(step), _input_grid(model, user, arrays))
    return found


def _attributes(node: onnx.NodeProto) -> Mapping[str, Any]:
    return {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}


def _fields(packed: Array, bits: int, count: int) -> Array:
    """Codes of a last dimension of bytes, low bits first."""
    every = [(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return np.stack(every, axis=-1).reshape(*packed.shape[:-1], -1)[..., :count]


def _blocks(node: onnx.NodeProto, codes: Array, arrays: Mapping[str, Array]) -> tuple[Array, Array]:
    """com.microsoft.MatMulNBits: onnxruntime, docs/ContribOperators.md."""
    said = _attributes(node)
    bits, size, columns, rows = said["bits"], said["block_size"], said["K"], said["N"]
    blocks = -(-columns // size)
    scales = arrays[node.input[2]].astype(np.float32).reshape(rows, blocks, 1)
    zeros = np.full((rows, blocks), 1 << (bits - 1))
    if len(node.input) > 3 and node.input[3]:
        zeros = _fields(arrays[node.input[3]].reshape(rows, -1), bits, blocks)
    numbers = _fields(codes.reshape(rows, blocks, -1), bits, size).astype(np.int64)
    values = (numbers - zeros[..., None].astype(np.int64)).astype(np.float32) * scales
    step = np.broadcast_to(scales, values.shape)
    return values.reshape(rows, -1)[:, :columns], step.reshape(rows, -1)[:, :columns]


def _linear(node: onnx.NodeProto, codes: Array, arrays: Mapping[str, Array]) -> tuple[Array, Array]:
    """DequantizeLinear of (N, K), in blocks along K or with a scale for each row."""
    said = _attributes(node)
    scales = arrays[node.input[1]].astype(np.float32)
    zeros = arrays[node.input[2]].astype(np.int64) if len(node.input) > 2 else np.zeros(scales.shape, np.int64)
    if scales.ndim == 2:
        assert said["axis"] == 1
        scales, zeros = (np.repeat(each, said["block_size"], axis=1)[:, : codes.shape[1]] for each in (scales, zeros))
        return (codes.astype(np.int64) - zeros).astype(np.float32) * scales, scales
    shape = (-1, 1) if said.get("axis", 1) % 2 == 0 else (1, -1)
    scales, zeros = scales.reshape(shape), zeros.reshape(shape)
    values = (codes.astype(np.int64) - zeros).astype(np.float32) * scales
    step = np.broadcast_to(scales, values.shape)
    return (values, step) if shape == (-1, 1) else (values.T, step.T)


def _integers(node: onnx.NodeProto, codes: Array, arrays: Mapping[str, Array]) -> tuple[Array, Array]:
    """MatMulInteger of (K, N) with one zero, and the scales of the columns, which are multiplied with afterwards."""
    scales = arrays[node.input[1].removesuffix("qweight") + "scales"].astype(np.float32)
    values = (codes.astype(np.int64) - int(arrays[node.input[3]])).astype(np.float32) * scales
    return values.T, np.broadcast_to(scales, values.shape).T


_READERS = {"MatMulNBits": _blocks, "DequantizeLinear": _linear, "MatMulInteger": _integers}


def _input_grid(model: onnx.ModelProto, node: onnx.NodeProto, arrays: Mapping[str, Array]) -> tuple[float, int] | None:
    """Follows a dequantized weight to its MatMul, and from there to where the other operand was rounded."""
    made = {name: each for each in model.graph.node for name in each.output}
    outputs = set(node.output)
    for each in model.graph.node:
        if each.op_type == "Transpose" and each.input[0] in outputs:
            outputs |= set(each.output)
        if each.op_type == "MatMul" and each.input[1] in outputs:
            before = made.get(each.input[0])
            if before is not None and before.op_type == "DequantizeLinear":
                rounding = made[before.input[0]]
                return float(arrays[rounding.input[1]]), int(arrays[rounding.input[2]])
    return None
