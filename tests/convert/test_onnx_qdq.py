"""Weights in DequantizeLinear against the operator's definition in float64, for every form that is stored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from quantpress.convert.onnx.graph import GraphBuilder
from quantpress.convert.onnx.linear_qdq import DequantizeLinear
from quantpress.quant.errors import InputError, LayoutError
from quantpress.quant.grid import Grid, round_to_nearest
from quantpress.quant.qtensor import QuantizedTensor
from tests.onnx_linears import Graph, weight_of
from tests.quantized_tensors import random_tensor

Array = NDArray[Any]

_FLOAT16 = 2.0**-11


def _values(columns: int, kind: Any = np.float32) -> Array:
    return np.random.default_rng(1).normal(size=(2, 3, columns)).astype(kind)


def _weight(rows: int, columns: int) -> Array:
    random = np.random.default_rng(columns)
    return (random.normal(size=(rows, columns)) * random.uniform(0.1, 3, (rows, 1)) + 0.2).astype(np.float32)


def _matrix(tensor: QuantizedTensor) -> Array:
    """scale * (code - zero) in float64, column by column."""
    group = np.arange(tensor.columns) // tensor.group_size if tensor.g_idx is None else tensor.g_idx
    scale, zero = tensor.scale.astype(np.float64), tensor.zeros().astype(np.float64)
    return np.asarray(scale[:, group] * (tensor.codes - zero[:, group]))


def _assert_product(graph: Graph, values: Array, matrix: Array) -> None:
    """K products and sums in float32, each off by 2^-24 of what is summed at most, and the dequantized weight by 2^-24;
    in float16 inputs are exact, the dequantized weight is off by 2^-11, and so is the result (ORT sums in float32)."""
    wanted, columns = values.astype(np.float64) @ matrix.T, matrix.shape[1]
    sizes = np.abs(values.astype(np.float64)) @ np.abs(matrix).T
    limit = (columns + 2) * 2.0**-24 * sizes
    if values.dtype == np.float16:
        limit = limit + _FLOAT16 * (sizes + np.abs(wanted)) + 2.0**-24  # and subnormal results
    found = (graph.run(values)[0], graph.run(values, optimize=False)[0])
    for result in found:
        assert result.dtype == values.dtype
        assert (np.abs(result.astype(np.float64) - wanted) <= limit).all()


@pytest.mark.parametrize("compute", ["FLOAT", "FLOAT16"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("rows", "columns", "block"),
    [(33, 64, 32), (33, 96, 32), (9, 80, 32), (9, 67, 32), (5, 20, 32), (33, 33, 16), (7, 300, 256), (1, 1, 16)],
)
def test_rounded_weights_are_multiplied_as_they_are_rounded(
    tmp_path: Path, compute: str, bits: int, symmetric: bool, rows: int, columns: int, block: int
) -> None:
    weight, kind = _weight(rows, columns), np.float16 if compute == "FLOAT16" else np.float32
    linear = DequantizeLinear(bits, block, symmetric)
    graph = Graph(
        tmp_path, lambda builder, values: [linear(builder, weight_of(weight, step=5), values)], columns=columns,
        compute=compute,
    )  # fmt: skip
    tensor = round_to_nearest(weight, Grid(bits, block, symmetric, "F16" if compute == "FLOAT16" else "F32"))
    zero = 0 if symmetric else graph.stored(".qzeros").astype(int).repeat(block, 1)[:, :columns]
    middle = 1 << (bits - 1) if symmetric else 0
    np.testing.assert_array_equal(graph.stored(".qweight").astype(int), tensor.codes.astype(int) - middle)
    assert symmetric or (zero == tensor.zeros().astype(int).repeat(block, 1)[:, :columns]).all()
    assert graph.stored(".scales").dtype == kind
    _assert_product(graph, _values(columns, kind), _matrix(tensor))
    assert graph.labels == [f"INT{bits} g{min(block, columns)}{'' if symmetric else ' asym'}"]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_onnx_projects_evaluator_agrees(tmp_path: Path, bits: int, symmetric: bool) -> None:
    weight, values = _weight(9, 67), _values(67)
    linear = DequantizeLinear(bits, 32, symmetric)
    graph = Graph(tmp_path, lambda builder, given: [linear(builder, weight_of(weight), given)], columns=67)
    matrix = _matrix(round_to_nearest(weight, Grid(bits, 32, symmetric, "F32")))
    sizes = np.abs(values.astype(np.float64)) @ np.abs(matrix).T
    wanted = values.astype(np.float64) @ matrix.T
    assert (np.abs(graph.reference(values)[0] - wanted) <= 69 * 2.0**-24 * sizes).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("columns", "group"), [(64, 32), (67, 32), (60, 20), (51, 17), (77, -1), (256, 128)])
@pytest.mark.parametrize("scale_type", ["F16", "BF16", "F32"])
def test_codes_of_a_source_are_kept(
    tmp_path: Path, bits: int, symmetric: bool, columns: int, group: int, scale_type: str
) -> None:
    tensor = random_tensor(5, 11, columns, bits=bits, group=group, symmetric=symmetric, scale_type=scale_type)
    linear = DequantizeLinear(4, 32, True)
    graph = Graph(tmp_path, lambda builder, values: [linear(builder, weight_of(tensor), values)], columns=columns)
    middle = 1 << (bits - 1) if symmetric else 0
    np.testing.assert_array_equal(graph.stored(".qweight").astype(int) + middle, tensor.codes)
    np.testing.assert_array_equal(graph.stored(".scales"), tensor.scale.astype(np.float32))
    if not symmetric:
        np.testing.assert_array_equal(graph.stored(".qzeros").astype(int), tensor.zeros())
    _assert_product(graph, _values(columns), _matrix(tensor))


def _ordered(columns: int, group: int, seed: int = 0) -> QuantizedTensor:
    tensor = random_tensor(6, 9, columns, bits=4, group=group, symmetric=False)
    order = np.random.default_rng(seed).permutation(columns)
    return replace(tensor, g_idx=(np.arange(columns) // group).astype(np.int32)[order])


@pytest.mark.parametrize("columns", [64, 72])
def test_columns_that_have_an_order_of_their_own_are_sorted_on_both_sides(tmp_path: Path, columns: int) -> None:
    tensor = _ordered(columns, 16)
    linear = DequantizeLinear(4, 32, True)
    graph = Graph(tmp_path, lambda builder, values: [linear(builder, weight_of(tensor), values)], columns=columns)
    order = np.argsort(tensor.g_idx, kind="stable")
    np.testing.assert_array_equal(graph.stored(".order"), order)
    np.testing.assert_array_equal(graph.stored(".qweight").astype(int), tensor.codes[:, order])
    _assert_product(graph, _values(columns), _matrix(tensor))


def test_groups_of_different_sizes_are_refused(tmp_path: Path) -> None:
    tensor = _ordered(64, 16)
    assert tensor.g_idx is not None
    tensor.g_idx[tensor.g_idx == 1] = 2
    linear = DequantizeLinear(4, 32, True)
    with pytest.raises(LayoutError, match=r"some.safetensors: 'some.0.attn_q.weight': .* 0 to 32 columns"):
        Graph(tmp_path, lambda builder, values: [linear(builder, weight_of(tensor), values)], columns=64)


def test_scales_that_the_activations_type_does_not_hold_are_refused(tmp_path: Path) -> None:
    tensor = random_tensor(6, 9, 64, bits=4, group=16, symmetric=True, scale_type="BF16")
    tensor.scale[3, 1] = 1e6
    linear = DequantizeLinear(4, 32, True)
    with pytest.raises(LayoutError, match=r"'some.0.attn_q.weight': the scale 999424 is no float16"):
        Graph(
            tmp_path, lambda builder, values: [linear(builder, weight_of(tensor), values)], columns=64,
            compute="FLOAT16",
        )  # fmt: skip


def test_a_weight_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    weight = _weight(9, 64)
    weight[4, 4] = np.inf
    linear = DequantizeLinear(4, 32, True)
    with pytest.raises(InputError, match=r"some.safetensors: tensor 'some.0.attn_q.weight': .* NaN or infinite"):
        Graph(tmp_path, lambda builder, values: [linear(builder, weight_of(weight), values)], columns=64)


@pytest.mark.parametrize("compute", ["FLOAT", "FLOAT16"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("columns", "block"), [(64, 32), (67, 32), (20, 32)])
def test_rows_are_looked_up_and_the_head_reads_the_same_bytes(
    tmp_path: Path, compute: str, symmetric: bool, columns: int, block: int
) -> None:
    weight = _weight(19, columns)
    kind = np.float16 if compute == "FLOAT16" else np.float32
    stored = DequantizeLinear(8, block, symmetric)

    def add(builder: GraphBuilder, ids: Any) -> list[Any]:
        taken = weight_of(weight, slot="token_embd.weight", layer=-1)
        rows = stored.look_up(builder, taken, ids, stored.store(builder, taken))
        assert stored.store(builder, taken) is stored.store(builder, taken)
        return [rows, stored(builder, taken, rows)]

    graph = Graph(tmp_path, add, columns=None, compute=compute)
    assert len(graph.labels) == 1
    ids = np.array([[0, 18, 3], [3, 3, 7]])
    tensor = round_to_nearest(weight, Grid(8, block, symmetric, "F16" if compute == "FLOAT16" else "F32"))
    wanted = _matrix(tensor)[ids]
    for found in (graph.run(ids), graph.run(ids, optimize=False), graph.reference(ids)):
        rows, products = found
        assert rows.dtype == products.dtype == kind
        # one rounding of scale * (code - zero)
        assert (np.abs(rows - wanted) <= (_FLOAT16 if kind == np.float16 else 2.0**-24) * np.abs(wanted)).all()
        limit = _FLOAT16 * 2 if kind == np.float16 else (columns + 2) * 2.0**-24
        sizes = np.abs(wanted) @ np.abs(_matrix(tensor)).T
        assert (np.abs(products - rows.astype(np.float64) @ _matrix(tensor).T) <= 1.01 * limit * sizes).all()


def test_codes_of_4_bits_cannot_be_looked_up() -> None:
    builder = GraphBuilder(compute="FLOAT", standard=True, opset=23)
    stored, weight = DequantizeLinear(4, 32, True), weight_of(_weight(8, 32), slot="token_embd.weight", layer=-1)
    with pytest.raises(LayoutError, match="token-embedding-type int8"):
        stored.look_up(builder, weight, builder.input("ids", "INT64", [1, 1]), stored.store(builder, weight))


@pytest.mark.parametrize("opset", [21, 22, 24, 25, 26])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_opset_gives_the_same(tmp_path: Path, opset: int, symmetric: bool) -> None:
    weight = _weight(9, 80)
    four, eight = DequantizeLinear(4, 32, symmetric), DequantizeLinear(8, 32, symmetric)

    def add(builder: GraphBuilder, values: Any) -> list[Any]:
        return [four(builder, weight_of(weight), values), eight(builder, weight_of(weight, layer=1), values)]

    values = _values(80)
    found = Graph(tmp_path, add, columns=80, opset=opset).run(values)
    for bits, result in zip((4, 8), found, strict=True):
        matrix = _matrix(round_to_nearest(weight, Grid(bits, 32, symmetric, "F32")))
        sizes = np.abs(values.astype(np.float64)) @ np.abs(matrix).T
        assert (np.abs(result - values.astype(np.float64) @ matrix.T) <= 82 * 2.0**-24 * sizes).all()


def test_onnxruntime_makes_no_rounding_of_inputs_of_it(tmp_path: Path) -> None:
    # the other way round, (K, N), it makes a MatMulNBits of accuracy level 4, which rounds inputs to 8 bits
    linear = DequantizeLinear(4, 32, True)
    graph = Graph(tmp_path, lambda builder, values: [linear(builder, weight_of(_weight(9, 64)), values)], columns=64)
    assert graph.optimized() == ["DequantizeLinear", "FusedMatMul"]


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("step", [1, 4, 5, 100])
def test_the_bytes_depend_neither_on_threads_nor_on_how_rows_are_read(tmp_path: Path, threads: int, step: int) -> None:
    weight = _weight(37, 53)  # rows of odd length: their ends share bytes
    linear = DequantizeLinear(4, 16, False)
    graph = Graph(
        tmp_path, lambda builder, values: [linear(builder, weight_of(weight, step=step), values)], columns=53,
        threads=threads,
    )  # fmt: skip
    tensor = round_to_nearest(weight, Grid(4, 16, False, "F32"))
    np.testing.assert_array_equal(graph.stored(".qweight").astype(int), tensor.codes)
    np.testing.assert_array_equal(graph.stored(".qzeros").astype(int), tensor.zeros())
