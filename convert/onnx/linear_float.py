"""Linear layers whose weights are floats."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from quantpress.convert.onnx.float_rows import float_group
from quantpress.convert.onnx.graph import MICROSOFT, GraphBuilder
from quantpress.convert.onnx.linear import LinearWeight, with_last

__all__ = ["FloatLinear"]


@dataclass(frozen=True, slots=True)
class FloatLinear:
    """Stores a weight (N, K) as the checkpoint has it and multiplies with its transpose.

    It multiplies in float16 where weight and activations are float16, else in float32: onnxruntime has no product of
    bfloat16 numbers on processors, and casts of constants are done when it loads.

    Attributes:
        dtype: "FLOAT", "FLOAT16" or "BFLOAT16", the type of the file.
        note: for `StoredGroup`.
    """

    dtype: str
    note: str = ""
    _stored: dict[str, ir.Value] = field(default_factory=dict, repr=False)

    def __call__(self, builder: GraphBuilder, weight: LinearWeight, values: ir.Value) -> ir.Value:
        """Multiplies; see `LinearKind`."""
        node, dims = weight.node, with_last(values, weight.shape[0])
        product = "FLOAT16" if self.dtype == builder.compute == "FLOAT16" else "FLOAT"
        matrix = builder.cast(self.store(builder, weight), product, name=f"{node}/Weight")
        values = builder.cast(values, product, name=f"{node}/Widen")
        if builder.standard:
            turned = builder.add(
                "Transpose", [matrix], name=f"{node}/Transpose", dtype=product, shape=weight.shape[::-1], perm=[1, 0]
            )
            result = builder.add("MatMul", [values, turned], name=f"{node}/MatMul", dtype=product, shape=dims)
        else:
            result = builder.add(
                "FusedMatMul", [values, matrix], domain=MICROSOFT, name=f"{node}/MatMul", dtype=product, shape=dims,
                transB=1,
            )  # fmt: skip
        return builder.cast(result, builder.compute, name=f"{node}/Narrow")

    def store(self, builder: GraphBuilder, weight: LinearWeight) -> ir.Value:
        """Gives the weight as a value, stored when it is asked for first; a kind serves one graph."""
        if weight.name not in self._stored:
            (self._stored[weight.name],) = builder.store(float_group(weight, self.dtype, self.note))
        return self._stored[weight.name]
