"""Which weight is stored in which way: by the options, by its role, and by what the source has it in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

from quantpress.convert.onnx.float_rows import own_type
from quantpress.convert.onnx.linear import LinearKind, LinearWeight
from quantpress.convert.onnx.linear_float import FloatLinear
from quantpress.convert.onnx.linear_nbits import MatMulNBits
from quantpress.convert.onnx.options import OnnxOptions
from quantpress.quant.errors import UsageError

if TYPE_CHECKING:
    from quantpress.convert.onnx.linear_qdq import DequantizeLinear

__all__ = ["Kinds", "Ranges", "RowKind"]

RowKind: TypeAlias = "FloatLinear | MatMulNBits | DequantizeLinear"
"""A way of storing a weight whose rows can be looked up too."""

Ranges = Mapping[tuple[str, int], tuple[float, float]]
"""Slot and layer of a linear weight -> least and greatest value of its input."""

_FLOATS = {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16"}
_BITS = {"int4": 4, "int8": 8}


class Kinds:
    """The ways of storing weights of one graph; each keeps what it has stored."""

    def __init__(self, options: OnnxOptions, *, quantized: bool, ranges: Ranges | None = None) -> None:
        """Takes what was asked for.

        Args:
            options: of the graph.
            quantized: the source has codes; what it has none of stays as it is.
            ranges: of the inputs of linear weights, for static int8; those that it lacks are weight-only.
        """
        self._options, self._quantized, self._ranges = options, quantized, ranges or {}
        self._made: dict[tuple[str, str], RowKind] = {}
        self._integer: LinearKind | None = None

    def layer(self, weight: LinearWeight) -> LinearKind:
        """Gives the way of storing a weight of a layer."""
        if weight.router:
            return self.stored("own" if self._options.precision in _BITS else self._options.precision, weight)
        rounds_inputs = self._options.precision == "int8" and self._options.int8 != "weight-only"
        if rounds_inputs and (weight.codes is not None or not self._quantized):
            if not self._ranges or (weight.slot, weight.layer) in self._ranges:
                return self._int8()
            why = (
                "the range of its inputs is too wide for 8 bits"
                if weight.layer >= 0
                else "its inputs are not looked at"
            )
            return self.stored(self.default(weight), weight, why)
        return self.stored(self.default(weight), weight, self._note(weight))

    def default(self, weight: LinearWeight) -> str:
        """Gives the type of a weight that no option is about: a key of `TENSOR_TYPES`, or "own" for the source's."""
        precision = self._options.precision
        return "own" if precision in _BITS and self._quantized and weight.codes is None else precision

    def head(self, weight: LinearWeight) -> str:
        """Gives the type of the head."""
        return self._options.output_tensor_type or self.default(weight)

    def embedding(self, weight: LinearWeight, head: str | None) -> str:
        """Gives the type of the token embedding.

        Args:
            weight: the embedding.
            head: type of a head that is tied to it, None where it is not tied.

        Raises:
            UsageError: int4 is asked for in operators of the standard.
        """
        asked, standard = self._options.token_embedding_type, self._options.standard_ops
        if asked == "int4" and standard:
            raise UsageError("--token-embedding-type int4: no operator of the standard looks up 4-bit rows; use int8")
        kind = asked or head or self.rows(weight)
        return "own" if kind == "int4" and standard else kind

    def rows(self, weight: LinearWeight) -> str:
        """Gives the type of rows that are looked up and not multiplied with, where no option is about them."""
        kind = self.default(weight)
        return "own" if kind in _BITS and weight.codes is None else kind

    def stored(self, kind: str, weight: LinearWeight, note: str = "") -> RowKind:
        """Gives what stores a weight in a type.

        Args:
            kind: a key of `TENSOR_TYPES`, or "own".
            weight: what is to be stored.
            note: why it is not what was asked for.
        """
        dtype = own_type(weight.dtype, self._options.compute) if kind == "own" else _FLOATS.get(kind, kind)
        if (dtype, note) not in self._made:
            self._made[dtype, note] = self._make(dtype, note)
        return self._made[dtype, note]

    def _note(self, weight: LinearWeight) -> str:
        """Says why a weight of a quantized source is not in the type that was asked for."""
        asked = _BITS.get(self._options.precision)
        if asked is None or not self._quantized:
            return ""
        if weight.codes is None:
            return "the source has not quantized it"
        bits = weight.codes.form.bits
        return "" if bits == asked else f"the source's codes of {bits} bits, as they are"

    def _make(self, dtype: str, note: str) -> RowKind:
        if dtype not in _BITS:
            return FloatLinear(dtype, note)
        options, bits = self._options, _BITS[dtype]
        if options.standard_ops:
            from quantpress.convert.onnx.linear_qdq import DequantizeLinear

            return DequantizeLinear(bits, options.block_size, options.symmetric, note)
        return MatMulNBits(bits, options.block_size, options.symmetric, options.accuracy_level, note)

    def _int8(self) -> LinearKind:
        if self._integer is None:
            from quantpress.convert.onnx.linear_int8 import DynamicInt8, StaticInt8

            self._integer = DynamicInt8() if self._options.int8 == "dynamic" else StaticInt8(self._ranges)
        return self._integer
