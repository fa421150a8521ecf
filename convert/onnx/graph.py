"""Puts an ONNX graph together node by node: types and shapes are known as it grows, weights stay where they are.

Every stored tensor gets its place in the data file at once, for its size is known; its bytes are made when the file is
written. So a graph of a large model is a few megabytes, and nothing of it is ever rewritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from quantpress.convert.checkpoint import Array
from quantpress.convert.onnx.stored import StoredGroup, StoredTensor

__all__ = ["DATA_FILE", "MICROSOFT", "Dims", "GraphBuilder", "Placed"]

DATA_FILE = "model.onnx.data"
MICROSOFT = "com.microsoft"
Dims = Sequence["int | str"]
"""Sizes of the dimensions; a name where it is known only when the model runs."""

_PAGE = 64 << 10  # what Windows maps files by; Linux is content with 4096
_MAPPED = 1 << 20  # tensors from this size on begin at a page, so that a runtime maps them instead of copying
_ALIGNED = 64  # bytes, for smaller ones
_IR_VERSIONS = {21: 10, 22: 10, 23: 11, 24: 12, 25: 13, 26: 13}  # opset -> IR version (onnx: docs/Versioning.md)


class Placed:
    """A stored tensor and where it begins in the data file."""

    __slots__ = ("offset", "tensor")

    def __init__(self, tensor: StoredTensor, offset: int) -> None:
        """Takes both."""
        self.tensor, self.offset = tensor, offset


class GraphBuilder:
    """A graph that grows.

    Attributes:
        compute: type of activations, "FLOAT" or "FLOAT16".
        standard: only operators of the standard are wanted.
        opset: version of the standard operators.
        groups: what has to be written to the data file, in order, and where each tensor begins.
        data_bytes: size of the data file.
    """

    def __init__(self, *, compute: str, standard: bool, opset: int) -> None:
        """Begins an empty graph."""
        self.compute, self.standard, self.opset = compute, standard, opset
        self.groups: list[tuple[StoredGroup, tuple[Placed, ...]]] = []
        self.data_bytes = 0
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        self._inner: list[ir.Node] = []  # those of graphs within nodes
        self._initializers: dict[str, ir.Value] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._names: dict[str, int] = {}
        self._domains: set[str] = set()

    @property
    def numpy_type(self) -> np.dtype[Any]:
        """Numpy's type of the activations."""
        return np.dtype(np.float16 if self.compute == "FLOAT16" else np.float32)

    def input(self, name: str, dtype: str, shape: Dims) -> ir.Value:
        """Adds an input of the model."""
        value = _value(name, dtype, shape)
        self._inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: str, shape: Dims) -> None:
        """Makes a value an output of the model under a name."""
        value.name, value.dtype, value.shape = name, ir.DataType[dtype], ir.Shape(shape)
        self._outputs.append(value)

    def add(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        *,
        domain: str = "",
        name: str = "",
        dtype: str | None = None,
        shape: Dims | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """Adds a node with one output.

        Args:
            op: operator.
            inputs: None for one that is left out.
            domain: "" for the standard, `MICROSOFT` for onnxruntime's own.
            name: of the node, "/layers.0/attn/q_proj/MatMul"; a number is added where it is taken.
            dtype: of the output, where known; the activations' type by default.
            shape: of the output, where known.
            attributes: of the node.
        """
        return self.add_many(op, inputs, [(dtype or self.compute, shape)], domain=domain, name=name, **attributes)[0]

    def add_many(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        outputs: Sequence[tuple[str, Dims | None] | None],
        *,
        domain: str = "",
        name: str = "",
        **attributes: Any,
    ) -> tuple[ir.Value, ...]:
        """Adds a node with several outputs, `(dtype, shape)` each; None for one that is left out ("")."""
        unique = self._unique(name or f"/{op}")
        values = [
            ir.Value(name="") if each is None else _value(f"{unique}/output_{number}", *each)
            for number, each in enumerate(outputs)
        ]
        given = list(inputs)
        while given and given[-1] is None:
            given.pop()
        self._nodes.append(ir.node(op, given, attributes, domain=domain, outputs=values, name=unique))
        self._domains.add(domain)
        return tuple(values)

    def constant(self, values: Array | Sequence[int] | int | float, name: str = "") -> ir.Value:
        """Gives a small tensor that is kept in the graph itself; equal ones are kept once.

        Integers become int64 and floats the activations' type, unless `values` is an array.
        """
        if not isinstance(values, np.ndarray):
            array = np.asarray(values)
            values = array.astype(np.int64 if array.dtype.kind in "iub" else self.numpy_type)
        key = (values.dtype.name, values.shape, values.tobytes())
        if key not in self._constants:
            unique = self._unique(name or f"/constants/{values.dtype.name}")
            self._constants[key] = self._initializer(unique, ir.tensor(values, name=unique))
        return self._constants[key]

    def store(self, group: StoredGroup) -> tuple[ir.Value, ...]:
        """Gives the tensors of a group as values, and every tensor its place in the data file."""
        placed = tuple(Placed(tensor, self._place(tensor.nbytes)) for tensor in group.tensors)
        self.groups.append((group, placed))
        return tuple(self.stored_as(each, each.tensor) for each in placed)

    def placed(self, value: ir.Value) -> Placed:
        """Finds where the data of a stored value lie."""
        return next(each for _, places in self.groups for each in places if each.tensor.name == value.name)

    def stored_as(self, placed: Placed, tensor: StoredTensor) -> ir.Value:
        """Gives data that have their place under another name, shape or type of the same number of bytes."""
        external = ir.ExternalTensor(
            DATA_FILE, placed.offset, tensor.nbytes, ir.DataType[tensor.dtype], shape=ir.Shape(tensor.shape),
            name=tensor.name,
        )  # fmt: skip
        return self._initializer(tensor.name, external)

    def cast(self, value: ir.Value, dtype: str, *, shape: Dims | None = None, name: str = "") -> ir.Value:
        """Gives a value in another type; the value itself where it has it already."""
        if value.dtype == ir.DataType[dtype]:
            return value
        shape = shape if shape is not None or value.shape is None else _dims(value.shape)
        return self.add("Cast", [value], dtype=dtype, shape=shape, name=name, to=int(ir.DataType[dtype]))

    def shape_of(self, value: ir.Value) -> list[int | str] | None:
        """Gives the shape of a value; None where it is not known."""
        return None if value.shape is None else _dims(value.shape)

    def model(self, *, name: str, producer_version: str) -> ir.Model:
        """Gives the finished model."""
        imports = {"": self.opset} | dict.fromkeys(sorted(self._domains - {""}), 1)
        nodes = (*self._nodes, *self._inner)
        used = {value for node in nodes for value in node.inputs} | set(self._outputs)
        initializers = tuple(value for value in self._initializers.values() if value in used)
        graph = ir.Graph(
            self._inputs, self._outputs, nodes=self._nodes, initializers=initializers,
            opset_imports=imports, name=name,
        )  # fmt: skip
        return ir.Model(
            graph, ir_version=_IR_VERSIONS[self.opset], producer_name="quantpress", producer_version=producer_version
        )

    def _initializer(self, name: str, tensor: Any) -> ir.Value:
        if name in self._initializers:
            raise ValueError(f"two initializers are called {name}")
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._initializers[name] = value
        return value

    def _place(self, nbytes: int) -> int:
        step = _PAGE if nbytes >= _MAPPED else _ALIGNED
        offset = -(-self.data_bytes // step) * step
        self.data_bytes = offset + nbytes
        return offset

    def _unique(self, name: str) -> str:
        count = self._names.get(name, 0)
        self._names[name] = count + 1
        return name if count == 0 else f"{name}_{count}"


def _value(name: str, dtype: str, shape: Dims | None) -> ir.Value:
    known = None if shape is None else ir.Shape(shape)
    return ir.Value(name=name, shape=known, type=ir.TensorType(ir.DataType[dtype]))


def _dims(shape: ir.Shape) -> list[int | str]:
    return [size if isinstance(size, int) else str(size.value) for size in shape]
