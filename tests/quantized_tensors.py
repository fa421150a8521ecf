"""Random quantized matrices, and ways to read formats that are not ours: by documentation, or with others' code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from quantpress.convert.checkpoint import Array
from quantpress.quant.grid import SCALE_TYPES
from quantpress.quant.qtensor import QuantizedTensor, group_count


def random_tensor(
    seed: int, rows: int, columns: int, *, bits: int, group: int, symmetric: bool, scale_type: str = "F16"
) -> QuantizedTensor:
    """Any codes, any zeros, and scales of both signs; -1 for one group per row."""
    random = np.random.default_rng(seed)
    group = columns if group == -1 else min(group, columns)
    groups = group_count(columns, group)
    scale = random.uniform(1e-3, 4, (rows, groups)) * random.choice([-1, 1], (rows, groups))
    zero = None if symmetric else random.integers(0, 1 << bits, (rows, groups)).astype(np.uint8)
    codes = random.integers(0, 1 << bits, (rows, columns)).astype(np.uint8)
    return QuantizedTensor(codes, scale.astype(SCALE_TYPES[scale_type]), zero, bits, group)


def assert_same(one: QuantizedTensor, other: QuantizedTensor) -> None:
    """Checks that two matrices have the same parts, bit for bit."""
    np.testing.assert_array_equal(one.codes, other.codes)
    assert one.scale.dtype == other.scale.dtype
    assert one.scale.tobytes() == other.scale.tobytes()
    assert (one.zero is None) == (other.zero is None)
    if one.zero is not None and other.zero is not None:
        np.testing.assert_array_equal(one.zero, other.zero)
    assert (one.bits, one.group_size) == (other.bits, other.group_size)
    assert (one.g_idx is None) == (other.g_idx is None)
    if one.g_idx is not None and other.g_idx is not None:
        np.testing.assert_array_equal(one.g_idx, other.g_idx)


def fields_of(words: Array, bits: int) -> Array:
    """Gives the numbers of `bits` bits in rows of 32-bit words, read as one stream from the lowest bit on."""
    stream = np.unpackbits(np.ascontiguousarray(words, "<i4").view(np.uint8), axis=-1, bitorder="little")
    stream = stream[..., : stream.shape[-1] // bits * bits].reshape(*words.shape[:-1], -1, bits)
    fields: Array = (stream * (1 << np.arange(bits))).sum(-1)
    return fields


def read_gptq(parts: Mapping[str, Array], bits: int, version: int) -> Array:
    """Gives (N, K) float32 as GPTQ's documentation says; version 1 keeps zeros less one."""
    codes = fields_of(parts["qweight"].T, bits).T  # (K, N)
    zeros = fields_of(parts["qzeros"], bits) + (version == 1)  # (G, N)
    group, scales = parts["g_idx"], parts["scales"].astype(np.float32)
    weight: Array = (scales[group] * (codes - zeros[group]).astype(np.float32)).T
    return weight


def read_awq(parts: Mapping[str, Array], group_size: int) -> Array:
    """Gives (N, K) float32 as AutoAWQ unpacks: the eight nibbles of a word are columns 0, 2, 4, 6, 1, 3, 5, 7."""

    def unpack(words: Array) -> Any:
        nibbles = np.stack([(words.astype(np.int64) >> (4 * place)) & 15 for place in range(8)], -1)
        out = np.empty_like(nibbles)
        for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            out[..., column] = nibbles[..., place]
        return out.reshape(words.shape[0], -1)

    group = np.arange(parts["qweight"].shape[0]) // group_size
    steps = unpack(parts["qweight"]) - unpack(parts["qzeros"])[group]
    weight: Array = (steps.astype(np.float32) * parts["scales"].astype(np.float32)[group]).T
    return weight


def run_matmul_nbits(inputs: tuple[Array, Array, Array | None, Mapping[str, int]]) -> Array:
    """Gives (N, K) float32: what ONNX Runtime multiplies the unit matrix with; scales are widened to float32."""
    import onnxruntime  # type: ignore[import-untyped]
    from onnx import TensorProto, helper

    packed, scales, zeros, attributes = inputs
    constants: dict[str, Array] = {"B": packed, "scales": scales.astype(np.float32)}
    if zeros is not None:
        constants["zeros"] = zeros
    kinds = {np.dtype(np.uint8): TensorProto.UINT8, np.dtype(np.float32): TensorProto.FLOAT}
    node = helper.make_node(
        "MatMulNBits", ["A", *constants], ["Y"], domain="com.microsoft", **dict[str, Any](attributes)
    )
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("A", TensorProto.FLOAT, [None, attributes["K"]])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [None, attributes["N"]])],
        [helper.make_tensor(n, kinds[v.dtype], v.shape, v.tobytes(), raw=True) for n, v in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: Any = session.run(None, {"A": np.eye(attributes["K"], dtype=np.float32)})[0]
    return np.ascontiguousarray(found.T)
