"""Reads the quantized matrices of an ONNX model as the documentation says they lie there.

MatMulNBits: onnxruntime's ContribOperators.md; DequantizeLinear: ONNX's own. Shares nothing with what writes them:
protobuf is read by the `onnx` package, and the data file by offsets with numpy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from quantpress.convert.checkpoint import Array
from quantpress.quant.qtensor import QuantizedTensor

TYPES = {1: np.float32, 2: np.uint8, 3: np.int8, 6: np.int32, 7: np.int64, 10: np.float16}  # TensorProto.DataType
UINT4, INT4 = 21, 22  # two to a byte, the first in the low bits


@dataclass(frozen=True, eq=False)
class Matrix:
    """What a MatMulNBits node multiplies with, or what DequantizeLinear gives.

    Attributes:
        codes: (N, K), the first K of each row.
        scale: (N, blocks).
        zero: (N, blocks).
        bits: of a code.
        signed: the codes are.
        block_size: columns of a block.
        order: (K,), the column of the input that each column is multiplied with.
        has_zeros: whether zeros are stored.
    """

    codes: Array
    scale: Array
    zero: Array
    bits: int
    signed: bool
    block_size: int
    order: Array
    has_zeros: bool

    @property
    def weight(self) -> Array:
        """(N, K) float32, columns in the order of the input: scale * (code - zero), one rounding."""
        block = np.arange(self.codes.shape[1]) // self.block_size
        steps = self.codes.astype(np.float32) - self.zero.astype(np.float32)[:, block]
        weight = np.empty_like(steps)
        weight[:, self.order] = steps * self.scale.astype(np.float32)[:, block]
        return weight


def stored(folder: Path, tensor: onnx.TensorProto) -> Array:
    """Gives an initializer from the data file, or from the graph."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return onnx.numpy_helper.to_array(tensor)
    place = {entry.key: entry.value for entry in tensor.external_data}
    data = np.fromfile(folder / place["location"], np.uint8, int(place["length"]), offset=int(place["offset"]))
    shape = tuple(tensor.dims)
    if tensor.data_type in (UINT4, INT4):
        flat = fields(data[None], 4, math.prod(shape))[0]
        return (flat if tensor.data_type == UINT4 else (flat + 8) % 16 - 8).reshape(shape)
    values: Array = data.view(TYPES[tensor.data_type]).reshape(shape)
    return values


def fields(packed: Array, bits: int, count: int) -> Array:
    """Gives `count` numbers of so many bits from each row of bytes, the lowest bits first."""
    stream = np.unpackbits(packed, axis=-1, bitorder="little").reshape(*packed.shape[:-1], -1, bits)
    found: Array = (stream.astype(np.int64) << np.arange(bits)).sum(-1)[..., :count]
    return found


def initializers(folder: Path) -> dict[str, onnx.TensorProto]:
    """Gives every constant of a model by its name."""
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    return {tensor.name: tensor for tensor in model.graph.initializer}


def matrices(folder: Path) -> dict[str, Matrix]:
    """Gives every matrix of codes by the name of its weight in the checkpoint."""
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    constants = initializers(folder)
    made_by = {output: node for node in model.graph.node for output in node.output}
    used_by = {name: node for node in model.graph.node for name in node.input}
    found = {}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            assert node.domain == "com.microsoft"
            name, read, inputs = node.input[1], _nbits, node.input[0]
        elif node.op_type == "DequantizeLinear" and node.input[0] in constants:
            assert node.domain == ""
            name, read = node.input[0], _dequantized
            inputs = used_by[used_by[node.output[0]].output[0]].input[0]  # Transpose, MatMul
        else:
            continue
        gather = made_by.get(inputs)
        order = None
        if gather is not None and gather.op_type == "Gather" and gather.input[1].endswith(".order"):
            assert [attribute.i for attribute in gather.attribute] == [-1]
            order = stored(folder, constants[gather.input[1]])
        found[name.removesuffix(".qweight") + ".weight"] = read(folder, node, constants, order)
    return found


def _dequantized(
    folder: Path, node: onnx.NodeProto, constants: dict[str, onnx.TensorProto], order: Array | None
) -> Matrix:
    attributes: dict[str, Any] = {each.name: each.i for each in node.attribute}
    assert attributes["axis"] == 1
    codes, scale = (stored(folder, constants[name]) for name in node.input[:2])
    zero = stored(folder, constants[node.input[2]]) if len(node.input) > 2 else np.zeros(scale.shape, int)
    assert zero.shape == scale.shape == (len(codes), -(-codes.shape[1] // attributes["block_size"]))
    kind = constants[node.input[0]].data_type
    bits, signed = (4 if kind in (UINT4, INT4) else 8), kind in (INT4, 3)
    order = np.arange(codes.shape[1]) if order is None else order
    return Matrix(codes, scale, zero, bits, signed, attributes["block_size"], order, len(node.input) > 2)


def _nbits(folder: Path, node: onnx.NodeProto, constants: dict[str, onnx.TensorProto], order: Array | None) -> Matrix:
    attributes: dict[str, Any] = {each.name: each.i for each in node.attribute}
    rows, columns, bits, size = (attributes[name] for name in ("N", "K", "bits", "block_size"))
    blocks = -(-columns // size)
    assert size >= 16
    assert size & (size - 1) == 0
    packed = stored(folder, constants[node.input[1]])
    assert packed.shape == (rows, blocks, size * bits // 8)
    codes = fields(packed.reshape(rows, -1), bits, columns)
    scale = stored(folder, constants[node.input[2]])
    assert scale.shape == (rows, blocks)
    has_zeros = len(node.input) > 3 and bool(node.input[3])
    zero = np.full((rows, blocks), 1 << (bits - 1))
    if has_zeros:
        packed = stored(folder, constants[node.input[3]])
        assert packed.shape == (rows, -(-blocks * bits // 8))
        zero = fields(packed, bits, blocks)
    order = np.arange(columns) if order is None else order
    return Matrix(codes, scale, zero, bits, False, size, order, has_zeros)


def assert_exact(matrix: Matrix, tensor: QuantizedTensor) -> None:
    """Checks every code, every scale and every zero; those of 3 bits are stored in 4, and without zeros moved by 4."""
    rows, columns = tensor.codes.shape
    assert matrix.codes.shape == (rows, columns)
    np.testing.assert_array_equal(np.sort(matrix.order), np.arange(columns))
    groups = np.arange(columns) // tensor.group_size if tensor.g_idx is None else tensor.g_idx
    group, block = groups[matrix.order], np.arange(columns) // matrix.block_size
    moved = 4 if tensor.bits == 3 and tensor.zero is None else 0
    if matrix.signed:
        assert tensor.zero is None
        moved = -(1 << (tensor.bits - 1))
    assert matrix.bits >= tensor.bits
    assert matrix.has_zeros == (tensor.zero is not None)
    np.testing.assert_array_equal(matrix.codes, tensor.codes[:, matrix.order].astype(int) + moved)
    np.testing.assert_array_equal(matrix.zero[:, block], tensor.zeros()[:, group].astype(int) + moved)
    found, wanted = matrix.scale.astype(np.float32)[:, block], tensor.scale.astype(np.float32)[:, group]
    np.testing.assert_array_equal(found.view(np.uint32), wanted.view(np.uint32))
