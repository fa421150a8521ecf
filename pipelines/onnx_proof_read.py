"""Weights of an ONNX model as the operators that take them say they are, read by rows; no code of the exporter.

Sources: onnxruntime's docs/ContribOperators.md (MatMulNBits, GatherBlockQuantized, QMoE) and ONNX's Operators.md
(DequantizeLinear, MatMulInteger), of which only the words were used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from quantpress.convert.onnx.read import OnnxModel, OnnxNode, OnnxTensor
from quantpress.pipelines.onnx_proof_rows import (
    Array,
    HeldRows,
    block_rows,
    float_rows,
    linear_rows,
    nibbles,
    turned_rows,
)

__all__ = ["AGAIN", "HeldWeight", "held_weights", "tensor_values"]

AGAIN = " (again)"
"""End of the name of a weight whose codes lie in the file a second time."""

_FLOATS = {"FLOAT": np.float32, "FLOAT16": np.float16, "BFLOAT16": ml_dtypes.bfloat16, "DOUBLE": np.float64}
_OTHERS = {
    "INT8": np.int8, "UINT8": np.uint8, "INT32": np.int32, "INT64": np.int64, "UINT4": np.uint8, "INT4": np.uint8,
}  # fmt: skip
_SCALE_STEPS = 6  # nodes between MatMulInteger and the product with the scales of its columns


@dataclass(frozen=True, slots=True)
class HeldWeight:
    """A weight of a file.

    Attributes:
        name: of its initializer.
        shape: (N, K), or (N,) and (heads, N) of vectors.
        bits: of a code; 0 of floats.
        dtype: ONNX's name of the floats, or of the scales.
        read: `(start, stop)` -> these rows.
        order: (K,) column of the source that each column is; None where they are in place.
        users: names of the nodes that take it.
    """

    name: str
    shape: tuple[int, ...]
    bits: int
    dtype: str
    read: Callable[[int, int], HeldRows] = field(repr=False)
    order: Array | None = field(default=None, repr=False)
    users: tuple[str, ...] = ()


def tensor_values(tensor: OnnxTensor, folder: Path, model: Path) -> Array | None:
    """Maps the values of a tensor, 4-bit ones two to a byte; None where they are no plain bytes in a file."""
    kind = _FLOATS.get(tensor.dtype) or _OTHERS.get(tensor.dtype)
    if kind is None or tensor.offset < 0:
        return None
    path = folder / tensor.file if tensor.file else model
    if not tensor.nbytes:
        return np.empty(tensor.shape, kind)
    data = np.memmap(path, np.uint8, "r", tensor.offset, (tensor.nbytes,))
    values = np.asarray(data).view(kind)
    return values if tensor.dtype in ("UINT4", "INT4") else values.reshape(tensor.shape)


def held_weights(model: OnnxModel) -> dict[str, HeldWeight]:
    """Gives every weight by what its initializers are called after: "model.norm.weight".

    What lies in a form that is not known here is left out.
    """
    return _Reader(model).weights()


class _Reader:
    def __init__(self, model: OnnxModel) -> None:
        self._model, self._folder = model, model.path.parent
        self._nodes = model.graph.nodes
        self._takers: dict[str, list[OnnxNode]] = {}
        for node in self._nodes:
            for name in filter(None, node.inputs):
                self._takers.setdefault(name, []).append(node)
        self._made = {name: node for node in self._nodes for name in node.outputs if name}

    def weights(self) -> dict[str, HeldWeight]:
        found: dict[str, HeldWeight] = {}
        outputs = {value.name for value in self._model.graph.outputs}
        for node in self._nodes:
            for name, held in self._of_node(node):
                base = _base(name)
                if base in found and found[base].name != name and not self._same_bytes(found[base].name, name):
                    base += AGAIN
                found.setdefault(base, held)
        for name, tensor in self._model.tensors.items():
            if tensor.dtype not in _FLOATS or name in found or not tensor.shape:
                continue
            users = tuple(node.name for node in self._takers.get(name, ())) or (("",) if name in outputs else ())
            read = partial(self._floats, tensor)
            found[name] = HeldWeight(name, tensor.shape, 0, tensor.dtype, read, users=users)
        return found

    def _of_node(self, node: OnnxNode) -> Iterator[tuple[str, HeldWeight]]:
        if node.op == "MatMulNBits":
            yield from self._blocks(node, 1, 2, 3, self._order(node))
        elif node.op == "GatherBlockQuantized":
            yield from self._blocks(node, 0, 2, 3, None)
        elif node.op == "QMoE":
            yield from self._stacks(node)
        elif node.op == "MoE":
            yield from self._float_stacks(node)
        elif node.op == "DequantizeLinear":
            yield from self._linear(node)
        elif node.op == "MatMulInteger":
            yield from self._integers(node)

    def values(self, name: str) -> Array | None:
        tensor = self._model.tensors.get(name)
        return None if tensor is None else tensor_values(tensor, self._folder, self._model.path)

    def _same_bytes(self, one: str, other: str) -> bool:
        """Whether two tensors lie in the same place, as codes do that a head and a look-up share."""
        places = [(each.file, each.offset, each.nbytes) for each in map(self._model.tensors.__getitem__, (one, other))]
        return places[0] == places[1]

    def _users(self, name: str, node: OnnxNode) -> tuple[str, ...]:
        return tuple(each.name for each in self._takers.get(name, ())) or (node.name,)

    def _floats(self, tensor: OnnxTensor, start: int, stop: int) -> HeldRows:
        values = tensor_values(tensor, self._folder, self._model.path)
        if values is None:
            raise ValueError(f"{tensor.name} is stored as numbers of the model file")
        return float_rows(values, start, stop)

    def _order(self, node: OnnxNode) -> Array | None:
        """Follows the input of a product to a Gather that puts its columns in another order."""
        before = self._made.get(node.inputs[0])
        if before is None or before.op != "Gather" or len(before.inputs) < 2:
            return None
        tensor = self._model.tensors.get(before.inputs[1])
        if tensor is None or tensor.dtype not in ("INT32", "INT64") or len(tensor.shape) != 1:
            return None
        return self.values(before.inputs[1])

    def _blocks(self, node: OnnxNode, codes: int, scales: int, zeros: int, order: Array | None) -> Iterator[Any]:
        """Codes low bits first, a row of blocks after the other; without zeros they are half of the range."""
        name, bits, size = node.inputs[codes], number(node, "bits", 4), number(node, "block_size", 32)
        packed, scale = self.values(name), self.values(node.inputs[scales])
        if packed is None or scale is None or packed.dtype != np.uint8 or not packed.ndim:
            return
        rows = number(node, "N", len(packed))
        width, scale = packed.size // max(rows, 1), scale.reshape(rows, -1)
        columns = number(node, "K", min(width * 8 // bits, scale.shape[1] * size))
        offset = self.values(node.inputs[zeros]) if len(node.inputs) > zeros and node.inputs[zeros] else None
        zero = None if offset is None else offset.reshape(rows, -1)
        read = partial(block_rows, packed.reshape(rows, -1), scale, zero, bits, size)
        dtype = self._model.tensors[node.inputs[scales]].dtype
        yield name, HeldWeight(name, (rows, columns), bits, dtype, read, order, self._users(name, node))

    def _stacks(self, node: OnnxNode) -> Iterator[Any]:
        """The experts' two stacks: as for MatMulNBits, expert by expert."""
        bits, size = number(node, "expert_weight_bits", 4), number(node, "block_size", 0)
        for codes, scales, zeros in ((2, 3, 11), (5, 6, 12)):
            packed, scale = self.values(node.inputs[codes]), self.values(node.inputs[scales])
            if packed is None or scale is None or not size:
                continue
            offset = self.values(node.inputs[zeros]) if len(node.inputs) > zeros and node.inputs[zeros] else None
            count, rows = packed.shape[:2]
            parts = [each if each is None else each.reshape(count * rows, -1) for each in (packed, scale, offset)]
            read = partial(block_rows, parts[0], parts[1], parts[2], bits, size)  # type: ignore[arg-type]
            name, shape = node.inputs[codes], (count, rows, packed.shape[2] * 8 // bits)
            dtype = self._model.tensors[node.inputs[scales]].dtype
            yield name, HeldWeight(name, shape, bits, dtype, read, None, self._users(name, node))

    def _float_stacks(self, node: OnnxNode) -> Iterator[Any]:
        """The experts' two stacks of floats, (experts, rows, columns), perhaps behind a Cast."""
        for value in (node.inputs[2], node.inputs[4]):
            before = self._made.get(value)
            name = before.inputs[0] if before is not None and before.op == "Cast" else value
            stack, tensor = self.values(name), self._model.tensors.get(name)
            if stack is not None and tensor is not None and stack.ndim == 3:
                read = partial(float_rows, stack.reshape(-1, stack.shape[2]))
                yield name, HeldWeight(name, tensor.shape, 0, tensor.dtype, read, None, self._users(name, node))

    def _linear(self, node: OnnxNode) -> Iterator[Any]:
        """Codes (N, K) in blocks along K, also where rows of codes are looked up first, or (K, N) by columns."""
        parts = [self._looked_up(name) for name in node.inputs[:3]]
        tensor = self._model.tensors.get(parts[0])
        codes, scale = (self.values(name) for name in parts[:2])
        if tensor is None or codes is None or scale is None or len(tensor.shape) != 2:
            return
        zero = self.values(parts[2]) if len(parts) > 2 and parts[2] else None
        zero_kind = self._model.tensors[parts[2]].dtype if zero is not None else ""
        bits, signed = (4 if tensor.dtype.endswith("4") else 8), tensor.dtype.startswith("INT")
        size, dtype = number(node, "block_size", 0), self._model.tensors[parts[1]].dtype
        users, order = self._users(parts[0], node), None
        if scale.ndim == 2 and size:
            for user in self._users_of_matrix(node):
                order = self._order(user) if order is None else order
            if zero is not None and zero_kind.endswith("4"):
                zero = nibbles(zero, signed).reshape(scale.shape)
            read = partial(linear_rows, codes, tensor.shape, scale, zero, bits, signed, size)
            yield parts[0], HeldWeight(parts[0], tensor.shape, bits, dtype, read, order, users)
        elif scale.ndim == 1 and len(scale) == tensor.shape[1] and number(node, "axis", 1) == 1 and bits == 8:
            read = partial(turned_rows, codes, scale, zero, signed)
            yield parts[0], HeldWeight(parts[0], tensor.shape[::-1], bits, dtype, read, None, users)

    def _looked_up(self, name: str) -> str:
        """Gives the table where a value is rows of one."""
        node = self._made.get(name)
        return node.inputs[0] if node is not None and node.op == "Gather" and node.inputs else name

    def _users_of_matrix(self, node: OnnxNode) -> Iterator[OnnxNode]:
        """Follows a dequantized matrix through a Transpose to the products that take it."""
        for each in self._takers.get(node.outputs[0], ()):
            if each.op == "Transpose":
                yield from (user for user in self._takers.get(each.outputs[0], ()) if user.op == "MatMul")

    def _integers(self, node: OnnxNode) -> Iterator[Any]:
        """Codes (K, N); the sums are multiplied with a scale for each column afterwards."""
        name = node.inputs[1]
        codes, tensor = self.values(name), self._model.tensors.get(name)
        if codes is None or tensor is None or codes.ndim != 2:
            return
        zero = self.values(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] else None
        scale = self._column_scale(node.outputs[0], codes.shape[1])
        if scale is not None:
            read = partial(turned_rows, codes, scale, zero, tensor.dtype == "INT8")
            yield name, HeldWeight(name, codes.shape[::-1], 8, "FLOAT", read, None, self._users(name, node))

    def _column_scale(self, value: str, columns: int) -> Array | None:
        """Follows sums of products to what their columns are multiplied with, alone or with the input's scale."""
        ahead = [value]
        for _ in range(_SCALE_STEPS):
            takers = [each for one in ahead for each in self._takers.get(one, ())]
            for other in (other for each in takers if each.op == "Mul" for other in each.inputs):
                before = self._made.get(other)
                for name in (other, *(before.inputs if before is not None and before.op == "Mul" else ())):
                    tensor = self._model.tensors.get(name)
                    if tensor is not None and tensor.shape == (columns,):
                        return self.values(name)
            ahead = [one for each in takers if each.op in ("Cast", "Mul") for one in each.outputs]
        return None


def number(node: OnnxNode, name: str, default: int) -> int:
    """Gives an attribute that is a whole number."""
    value = node.attributes.get(name, default)
    return value if isinstance(value, int) else default


def _base(name: str) -> str:
    """What the initializers of a weight are called after."""
    for end in (".qweight_rows", ".qweight"):
        if name.endswith(end):
            return f"{name.removesuffix(end)}.weight"
    return name
