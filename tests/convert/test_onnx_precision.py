"""The types of an ONNX model's weights are told from the operators that use them, whoever wrote them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from quantpress.convert.onnx.precision import OnnxPrecision, precision_of
from quantpress.convert.onnx.read import open_onnx

MICROSOFT = "com.microsoft"
FLOAT, HALF = np.dtype(np.float32), np.dtype(np.float16)


def precision(
    path: Path, nodes: Sequence[NodeProto], stored: dict[str, np.ndarray[Any, Any]], compute: int = TensorProto.FLOAT
) -> OnnxPrecision:
    tensors = [numpy_helper.from_array(values, name) for name, values in stored.items()]
    values = [helper.make_tensor_value_info(name, compute, None) for name in ("x", "logits")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], tensors)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(MICROSOFT, 1)]
    (path / "m.onnx").write_bytes(helper.make_model(graph, opset_imports=opsets).SerializeToString())
    return precision_of(open_onnx(path / "m.onnx"))


def nbits(bits: int, block: int, columns: int, rows: int, level: int | None = 0) -> NodeProto:
    sizes = {"K": columns, "N": rows, "bits": bits, "block_size": block}
    if level is not None:
        sizes["accuracy_level"] = level
    return helper.make_node("MatMulNBits", ["x", "b", "scales", "zeros"], ["logits"], domain=MICROSOFT, **sizes)


@pytest.mark.parametrize(
    ("bits", "level", "ftype", "activations"),
    [
        (4, 0, "INT4", ""),
        (4, 4, "INT4", "accuracy level 4"),
        (8, None, "INT8", ""),
        (8, 1, "INT8", ""),
        (8, 4, "W8A8", "accuracy level 4"),
        (2, 0, "INT2", ""),
    ],
)
def test_blocks_of_codes(tmp_path: Path, bits: int, level: int | None, ftype: str, activations: str) -> None:
    """40 columns in blocks of 32: values that fill the last block, scales and zeros are no weights."""
    stored = {
        "b": np.zeros((6, 2, 4 * bits), np.uint8),
        "scales": np.zeros((6, 2), np.float32),
        "zeros": np.zeros((6, 2), np.uint8),
        "norm": np.ones(7, np.float32),
        "one": np.ones(1, np.float32),
        "axes": np.arange(4),
    }
    found = precision(tmp_path, [nbits(bits, 32, 40, 6, level)], stored)
    label = f"INT{bits} g32"
    assert found.parameters == {"F32": 7, label: 240}
    assert (found.main, found.ftype, found.activations, found.compute) == (label, ftype, activations, "FLOAT")


def test_an_embedding_that_shares_the_bytes_of_the_head_is_counted_once(tmp_path: Path) -> None:
    """As onnxruntime-genai writes tied weights: one tensor, or two tensors at one place, in two operators."""
    gather = helper.make_node(
        "GatherBlockQuantized", ["e", "x", "scales"], ["rows"], domain=MICROSOFT, bits=4, block_size=32
    )
    stored = {"b": np.zeros((6, 2, 16), np.uint8), "scales": np.zeros((6, 2), np.float32)}
    stored["zeros"] = np.zeros((6, 1), np.uint8)
    folder = tmp_path
    tensors = [numpy_helper.from_array(values, name) for name, values in stored.items()]
    twin = TensorProto(name="e", data_type=TensorProto.UINT8, dims=[6, 32], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "d"), ("offset", "0"), ("length", "192")):
        twin.external_data.add(key=key, value=value)
    tensors[0].ClearField("raw_data")
    tensors[0].data_location = TensorProto.EXTERNAL
    tensors[0].external_data.extend(twin.external_data)
    (folder / "d").write_bytes(bytes(192))
    graph = helper.make_graph([gather, nbits(4, 32, 64, 6)], "g", [], [], [*tensors, twin])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(MICROSOFT, 1)]
    (folder / "m.onnx").write_bytes(helper.make_model(graph, opset_imports=opsets).SerializeToString())
    assert precision_of(open_onnx(folder / "m.onnx")).parameters == {"INT4 g32": 6 * 64}


def test_an_embedding_of_its_own_in_bytes_of_two_codes(tmp_path: Path) -> None:
    gather = helper.make_node("GatherBlockQuantized", ["e", "x", "s"], ["logits"], domain=MICROSOFT, block_size=16)
    stored = {"e": np.zeros((6, 32), np.uint8), "s": np.zeros((6, 4), np.float32)}
    assert precision(tmp_path, [gather], stored).parameters == {"INT4 g16": 6 * 64}


def test_rounded_inputs_are_told(tmp_path: Path) -> None:
    stored = {"w": np.zeros((8, 6), np.uint8), "scale": np.ones(6, np.float32), "zero": np.zeros(6, np.uint8)}
    dynamic = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", "w", "z", "zero"], ["i"]),
        helper.make_node("Cast", ["i"], ["logits"], to=1),
    ]
    found = precision(tmp_path, dynamic, stored)
    assert (found.parameters["INT8"], found.ftype, found.activations) == (48, "W8A8", "dynamic")
    static = [
        helper.make_node("QuantizeLinear", ["x", "one"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "one"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["weight"], axis=1),
        helper.make_node("MatMul", ["d", "weight"], ["logits"]),
    ]
    found = precision(tmp_path, static, stored | {"one": np.float32([1])})
    assert found.parameters == {"INT8": 48}
    assert (found.ftype, found.activations) == ("W8A8", "static")


def test_weights_alone_in_dequantize_linear_round_no_input(tmp_path: Path) -> None:
    stored = {"w": np.zeros((6, 64), ml_dtypes.uint4), "scale": np.ones((6, 2), np.float32)}
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale"], ["weight"], axis=1, block_size=32),
        helper.make_node("MatMul", ["x", "weight"], ["logits"]),
    ]
    found = precision(tmp_path, nodes, stored)
    assert found.parameters == {"INT4 g32": 384}
    assert (found.ftype, found.activations) == ("INT4", "")


@pytest.mark.parametrize(
    ("kind", "compute", "ftype"),
    [
        (np.float32, TensorProto.FLOAT, "F32"),
        (np.float16, TensorProto.FLOAT16, "F16"),
        (np.float32, TensorProto.FLOAT16, "F16"),
        (ml_dtypes.bfloat16, TensorProto.FLOAT, "BF16"),
        (np.float64, TensorProto.DOUBLE, "F32"),
    ],
)
def test_floats(tmp_path: Path, kind: Any, compute: int, ftype: str) -> None:
    """Tables of angles, which may be larger than a tiny model's weights, are no weights."""
    rotary = ["x", "p", "cos", "sin"]
    nodes = [
        helper.make_node("RotaryEmbedding", rotary, ["y"], domain=MICROSOFT),
        helper.make_node("MatMul", ["y", "w"], ["logits"]),
    ]
    stored = {name: np.zeros((999, 4), np.float32) for name in ("cos", "sin")} | {"w": np.zeros((8, 6), kind)}
    found = precision(tmp_path, nodes, stored, compute)
    assert sum(found.parameters.values()) == 48
    assert found.ftype == ftype


def test_a_model_without_weights_has_a_type_too(tmp_path: Path) -> None:
    found = precision(tmp_path, [helper.make_node("Identity", ["x"], ["logits"])], {})
    assert (found.main, found.ftype, found.parameters) == ("F32", "F32", {})


def test_nodes_that_lack_inputs_or_attributes_are_passed_over(tmp_path: Path) -> None:
    """What onnxruntime will refuse must not be an accident here."""
    nodes = [
        helper.make_node(op, inputs, [op + str(number)], domain=domain)
        for number, inputs in enumerate(([], ["x"], ["w"], ["x", "w"]))
        for op, domain in (
            ("MatMulNBits", MICROSOFT), ("GatherBlockQuantized", MICROSOFT), ("DequantizeLinear", ""),
            ("MatMulInteger", ""), ("GroupQueryAttention", MICROSOFT), ("RotaryEmbedding", ""),
        )
    ]  # fmt: skip
    odd = nbits(4, 32, 8, 8)
    next(one for one in odd.attribute if one.name == "bits").CopyFrom(helper.make_attribute("bits", "four"))
    found = precision(tmp_path, [*nodes, odd], {"w": np.zeros((4, 4), np.uint8), "b": np.zeros((4, 4), np.uint8)})
    assert found.ftype.startswith("INT")
