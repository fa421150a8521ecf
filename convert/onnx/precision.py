"""In which types an ONNX model has its weights, told from the operators that use them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from quantpress.convert.onnx.read import OnnxModel, OnnxNode, OnnxTensor

__all__ = ["OnnxPrecision", "precision_of"]

_FLOATS = {"FLOAT": "F32", "FLOAT16": "F16", "BFLOAT16": "BF16", "DOUBLE": "F64"}
_INTEGERS = {"INT8": 8, "UINT8": 8, "INT4": 4, "UINT4": 4, "INT2": 2, "UINT2": 2}
_MICROSOFT = "com.microsoft"
# operator -> inputs that are tables of angles, not weights
_TABLES = {
    (_MICROSOFT, "GroupQueryAttention"): (7, 8),
    (_MICROSOFT, "RotaryEmbedding"): (2, 3),
    ("", "RotaryEmbedding"): (1, 2),
}
_STACKS = ((2, (3, 11)), (5, (6, 12)))  # codes of QMoE's two stacks, and their scales and zeros
_ROUNDED_INPUTS = {"MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QLinearMatMul", "QGemm"}
_INT8_ACTIVATIONS = 4  # accuracy_level of MatMulNBits (onnxruntime, docs/ContribOperators.md)


@dataclass(frozen=True)
class OnnxPrecision:
    """Types of weights.

    Attributes:
        weights: label -> weights of that type: "F32", "INT8", "INT4 g32" with the columns that share a scale.
        parameters: label -> their values.
        activations: how inputs of matrices are rounded: "" not at all, else "dynamic", "static" or "accuracy level 4".
        compute: type of the activations between operators, ONNX's name.
    """

    weights: dict[str, int]
    parameters: dict[str, int]
    activations: str
    compute: str

    @property
    def main(self) -> str:
        """The label of most values; "F32" where there are none."""
        return max(self.parameters, key=lambda label: self.parameters[label], default="F32")

    @property
    def ftype(self) -> str:
        """Name of the type whose default limits hold (pipelines/parity_limits.py)."""
        kind = self.main.split(" ", maxsplit=1)[0]
        if kind == "INT8" and self.activations:
            return "W8A8"
        if kind in ("F32", "F64"):
            return "F16" if self.compute == "FLOAT16" else "F32"
        return kind


def precision_of(model: OnnxModel) -> OnnxPrecision:
    """Sorts the weights of a model by type; scales, zero points and tables of angles are none."""
    weights: Counter[str] = Counter()
    parameters: Counter[str] = Counter()
    used: set[str] = set()
    stored: set[tuple[str, int, int]] = set()  # weights that are used twice, by head and embedding, are counted once
    for node in model.graph.nodes:
        used.update(node.inputs[place] for place in _tables(node))
        for label, size, tensor, others in _quantized(node, model):
            used.update((tensor.name, *others))
            if (place := _place(tensor)) not in stored:
                stored.add(place)
                weights[label] += 1
                parameters[label] += size
    for tensor in model.tensors.values():
        kind = _FLOATS.get(tensor.dtype) or (f"INT{_INTEGERS[tensor.dtype]}" if _is_codes(tensor) else "")
        if kind and tensor.size > 1 and tensor.name not in used and (place := _place(tensor)) not in stored:
            stored.add(place)
            weights[kind] += 1
            parameters[kind] += tensor.size
    outputs = {value.name: value.dtype for value in model.outputs}
    compute = outputs.get("logits") or next(iter(outputs.values()), "")
    return OnnxPrecision(dict(sorted(weights.items())), dict(sorted(parameters.items())), _rounding(model), compute)


def _tables(node: OnnxNode) -> list[int]:
    return [place for place in _TABLES.get((node.domain, node.op), ()) if place < len(node.inputs)]


def _place(tensor: OnnxTensor) -> tuple[str, int, int]:
    """Tells stored bytes apart; what is stored as numbers of protobuf's has no place, so its own name serves."""
    return (tensor.file, tensor.offset, tensor.nbytes) if tensor.offset >= 0 else (f"\0{tensor.name}", -1, 0)


def _is_codes(tensor: OnnxTensor) -> bool:
    return tensor.dtype in _INTEGERS and len(tensor.shape) > 1


def _quantized(node: OnnxNode, model: OnnxModel) -> Iterator[tuple[str, int, OnnxTensor, tuple[str, ...]]]:
    """Gives label, values, tensor of codes, and names of the scales and zeros, of a weight that a node uses."""
    key = node.domain, node.op
    if key == (_MICROSOFT, "MatMulNBits") and len(node.inputs) > 1:
        if (codes := model.tensors.get(node.inputs[1])) is not None:
            bits, block = _number(node, "bits", 4), _number(node, "block_size", 32)
            size = _number(node, "N", 0) * _number(node, "K", 0)
            yield f"INT{bits} g{block}", size, codes, node.inputs[2:5]
    elif key == (_MICROSOFT, "GatherBlockQuantized") and node.inputs:
        if (codes := model.tensors.get(node.inputs[0])) is not None:
            bits, block = _number(node, "bits", 4), _number(node, "block_size", 128)
            per_value = 8 // max(bits, 1) if codes.dtype == "UINT8" else 1
            yield f"INT{bits} g{block}", codes.size * per_value, codes, node.inputs[2:4]
    elif key == (_MICROSOFT, "QMoE"):
        yield from _stacked(node, model)
    elif node.op == "DequantizeLinear" and node.inputs:
        if (codes := model.tensors.get(node.inputs[0])) is not None and codes.dtype in _INTEGERS:
            block = _number(node, "block_size", 0)
            label = f"INT{_INTEGERS[codes.dtype]}" + (f" g{block}" if block else "")
            if _is_codes(codes):
                yield label, codes.size, codes, node.inputs[1:3]
    elif node.op in _ROUNDED_INPUTS:
        for name in node.inputs:
            if (codes := model.tensors.get(name)) is not None and _is_codes(codes):
                yield f"INT{_INTEGERS[codes.dtype]}", codes.size, codes, ()


def _stacked(node: OnnxNode, model: OnnxModel) -> Iterator[tuple[str, int, OnnxTensor, tuple[str, ...]]]:
    """The same as `_quantized`, of the experts of a layer."""
    bits, block = _number(node, "expert_weight_bits", 4), _number(node, "block_size", 0)
    for place, others in _STACKS:
        codes = model.tensors.get(node.inputs[place]) if place < len(node.inputs) else None
        if codes is not None:
            names = tuple(node.inputs[each] for each in others if each < len(node.inputs))
            yield f"INT{bits}" + (f" g{block}" if block else ""), codes.size * 8 // max(bits, 1), codes, names


def _number(node: OnnxNode, name: str, default: int) -> int:
    value = node.attributes.get(name, default)
    return value if isinstance(value, int) else default


def _rounding(model: OnnxModel) -> str:
    ops = {op for _, op in model.ops}
    if ops & {"DynamicQuantizeLinear", "DynamicQuantizeMatMul"}:
        return "dynamic"
    if "QuantizeLinear" in ops or ops & {"QLinearMatMul", "QGemm"}:
        return "static"
    levels = (_number(node, "accuracy_level", 0) for node in model.graph.nodes if node.op in ("MatMulNBits", "QMoE"))
    return "accuracy level 4" if _INT8_ACTIVATIONS in levels else ""
