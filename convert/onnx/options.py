"""What can be chosen about an ONNX model."""

from __future__ import annotations

from dataclasses import dataclass

from quantpress.quant.errors import UsageError

__all__ = ["BLOCK_SIZES", "COMPUTE_TYPES", "INT8_STYLES", "PRECISIONS", "TENSOR_TYPES", "OnnxOptions"]

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
INT8_STYLES = ("weight-only", "dynamic", "static")
BLOCK_SIZES = (16, 32, 64, 128, 256)  # what onnxruntime's MatMulNBits takes (contrib_ops/cpu/quantization)
TENSOR_TYPES = ("fp32", "fp16", "bf16", "int8", "int4")
COMPUTE_TYPES = ("fp32", "fp16")
_OPSETS = (21, 26)
_STANDARD_OPSET = 23  # the first with Attention, RotaryEmbedding and RMSNormalization
_ACCURACY_LEVELS = range(5)


@dataclass(frozen=True, slots=True)
class OnnxOptions:
    """How a graph and its weights are to be written.

    Attributes:
        precision: "fp32", "fp16", "bf16" (stored so, computed in float32), "int8" or "int4"; of a quantized source
            "int8" and "int4" both mean its own codes, and the others the numbers they stand for.
        compute_type: "fp32" or "fp16", the type of activations; "fp16" goes with every precision but "fp32", "bf16".
        int8: "weight-only" (MatMulNBits), "dynamic" (activations rounded by their range of the moment) or "static"
            (by ranges found beforehand).
        block_size: columns that share a scale, of int4 and weight-only int8.
        symmetric: no zero points are stored.
        accuracy_level: of MatMulNBits: 0 (as exact as the activations), 1 fp32, 2 fp16, 3 bf16, 4 int8 activations.
        standard_ops: nothing but operators of the ONNX standard.
        opset: version of the standard operators.
        output_tensor_type: type of the head, None for the default.
        token_embedding_type: type of the token embedding, None for the default.
    """

    precision: str = "fp32"
    compute_type: str = "fp32"
    int8: str = "weight-only"
    block_size: int = 32
    symmetric: bool = True
    accuracy_level: int = 0
    standard_ops: bool = False
    opset: int = _STANDARD_OPSET
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None

    def __post_init__(self) -> None:
        """Checks every option by itself and those that exclude each other.

        Raises:
            UsageError: a value that is not known or does not go with another.
        """
        _one_of("--precision", self.precision, PRECISIONS)
        _one_of("--compute-type", self.compute_type, COMPUTE_TYPES)
        _one_of("--int8", self.int8, INT8_STYLES)
        _one_of("--block-size", self.block_size, BLOCK_SIZES)
        _one_of("--accuracy-level", self.accuracy_level, _ACCURACY_LEVELS)
        for flag, value in (
            ("--output-tensor-type", self.output_tensor_type),
            ("--token-embedding-type", self.token_embedding_type),
        ):
            if value is not None:
                _one_of(flag, value, TENSOR_TYPES)
        low, high = (_STANDARD_OPSET if self.standard_ops else _OPSETS[0]), _OPSETS[1]
        if not low <= self.opset <= high:
            raise UsageError(f"--opset {self.opset}: wanted {low} to {high}")
        if self.precision == "fp16" and self.compute_type != "fp16":
            raise UsageError("--precision fp16 computes in fp16; --compute-type fp32 goes with bf16, int8 and int4")
        if self.precision in ("fp32", "bf16") and self.compute_type != "fp32":
            raise UsageError(f"--precision {self.precision} computes in fp32, not in {self.compute_type}")
        if self.precision != "int8" and self.int8 != "weight-only":
            raise UsageError(f"--int8 {self.int8} is for --precision int8")

    @property
    def compute(self) -> str:
        """ONNX's name of the activations' type: "FLOAT" or "FLOAT16"."""
        return "FLOAT16" if self.compute_type == "fp16" else "FLOAT"


def _one_of(flag: str, value: object, known: object) -> None:
    if value not in known:  # type: ignore[operator]
        raise UsageError(f"{flag} {value}: must be one of {', '.join(map(str, known))}")  # type: ignore[call-overload]
