"""Integer products in onnxruntime against the operators' definitions, computed with exact integers and float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from quantpress.convert.onnx.graph import GraphBuilder
from quantpress.convert.onnx.linear_int8 import DynamicInt8, StaticInt8, static_grid
from quantpress.quant.errors import InputError, LayoutError
from tests.onnx_linears import Graph, weight_of
from tests.quantized_tensors import random_tensor

Array = NDArray[Any]

# The integer product is exact. Then it is rounded to float32 (2^-24 of it), the two scales are multiplied (2^-24), the
# result is (2^-24), and so is what a token's size makes of it; the same again for where the order of these differs.
_FLOAT32 = 8 * 2.0**-24
_FLOAT16 = 2.0**-11 + _FLOAT32  # and one rounding to float16


def _weight(rows: int, columns: int, seed: int = 0) -> Array:
    random = np.random.default_rng(seed)
    return (random.normal(size=(rows, columns)) * random.uniform(0.1, 3, (rows, 1))).astype(np.float32)


def _values(columns: int, seed: int = 1, kind: Any = np.float32, batch: int = 2) -> Array:
    return (np.random.default_rng(seed).normal(size=(batch, 3, columns)) + 0.3).astype(kind)


def _codes_of(weight: Array) -> tuple[Array, Array]:
    """Symmetric full-range codes by definition: scale = signed greatest / -128, nearest code, zero 128."""
    weight = weight.astype(np.float64)
    greatest = np.take_along_axis(weight, np.abs(weight).argmax(1)[:, None], 1)
    scale = (greatest / -128).astype(np.float32)
    codes = np.clip(np.floor(weight / scale.astype(np.float64) + 0.5) + 128, 0, 255)
    return codes.astype(np.int64), scale[:, 0]


def _by_definition(values: Array, low: float, high: float) -> tuple[Array, float, int]:
    """DynamicQuantizeLinear, version 11, of a given range: codes, scale, zero."""
    low, high = np.float32(min(low, 0)), np.float32(max(high, 0))
    scale = np.float32(high - low) / np.float32(255)
    zero = int(np.clip(np.rint(-low / scale), 0, 255))
    codes = np.clip(np.rint(values.astype(np.float32) / scale) + zero, 0, 255).astype(np.int64)
    return codes, float(scale), zero


def _product(values: Array, low: float, high: float, codes: Array, scale: Array, zero: Array | int = 128) -> Array:
    rounded, step, middle = _by_definition(values, low, high)
    shifted = codes - (zero if isinstance(zero, int) else zero.astype(np.int64))
    whole = (rounded - middle) @ shifted.T
    return np.asarray(whole * (step * scale.astype(np.float64).reshape(-1)))


def _dynamic(values: Array, codes: Array, scale: Array, zero: Array | int = 128) -> Array:
    """Tokens divided by their greatest absolute value, DynamicQuantizeLinear of all, and the exact product."""
    wide = values.astype(np.float32)
    size = np.maximum(np.abs(wide).max(-1, keepdims=True), np.float32(2.0**-100))
    even = wide / size
    return _product(even, even.min(), even.max(), codes, scale, zero) * size.astype(np.float64)


def _assert_close(found: Array, wanted: Array, limit: float, slack: Array | float = 0.0) -> None:
    least = 2.0**-24 if found.dtype == np.float16 else 0.0  # between numbers near 0
    assert found.shape == wanted.shape
    assert (np.abs(found.astype(np.float64) - wanted) <= limit * np.abs(wanted) + least + slack).all()


@pytest.mark.parametrize("compute", ["FLOAT", "FLOAT16"])
@pytest.mark.parametrize(("rows", "columns"), [(33, 67), (1, 1), (8, 300), (64, 64)])
def test_dynamic_is_the_exact_integer_product(tmp_path: Path, compute: str, rows: int, columns: int) -> None:
    weight, kind = _weight(rows, columns), np.float16 if compute == "FLOAT16" else np.float32
    graph = Graph(
        tmp_path, lambda builder, values: [DynamicInt8()(builder, weight_of(weight), values)], columns=columns,
        compute=compute,
    )  # fmt: skip
    values = _values(columns, kind=kind)
    codes, scale = _codes_of(weight)
    np.testing.assert_array_equal(graph.stored(".qweight"), codes.T)
    np.testing.assert_array_equal(graph.stored(".scales"), scale)
    wanted = _dynamic(values, codes, scale)
    limit = _FLOAT16 if compute == "FLOAT16" else _FLOAT32
    for found in (graph.run(values), graph.run(values, optimize=False), graph.reference(values)):
        assert found[0].dtype == kind
        _assert_close(found[0], wanted, limit)
    assert graph.labels == ["INT8"]


def test_a_token_of_great_values_does_not_spoil_the_others(tmp_path: Path) -> None:
    weight = _weight(8, 32)
    graph = Graph(tmp_path, lambda builder, values: [DynamicInt8()(builder, weight_of(weight), values)], columns=32)
    quiet, loud = _values(32, batch=1), 1e4 * _values(32, seed=2, batch=1)
    both = np.concatenate([quiet, loud])
    wanted = both.astype(np.float64) @ weight.T
    _assert_close(graph.run(both)[0], _dynamic(both, *_codes_of(weight)), _FLOAT32)
    for values, exact in ((quiet, wanted[:1]), (both, wanted)):
        # inputs are off by half a step of 2/255 of the token's greatest at most, weights by half of 2/255 of the row's
        found = graph.run(values)[0]
        sizes = np.abs(values).max(-1, keepdims=True) * np.abs(weight).max(1)
        assert (np.abs(found - exact) <= 2 * 32 * sizes * 1.01 / 255).all()
        assert np.abs(found - exact).max() < 0.02 * np.abs(exact).max()


@pytest.mark.parametrize("kind", [DynamicInt8, lambda: StaticInt8({("attn_q.weight", 0): (-3.0, 4.0)})])
def test_inputs_of_zeros_give_zeros(tmp_path: Path, kind: Any) -> None:
    weight = weight_of(_weight(5, 20))
    graph = Graph(tmp_path, lambda builder, values: [kind()(builder, weight, values)], columns=20)
    assert not graph.run(np.zeros((1, 2, 20), np.float32))[0].any()


def test_dynamic_rounds_what_several_linears_read_once(tmp_path: Path) -> None:
    weights = [weight_of(_weight(9, 40, seed), slot=slot) for seed, slot in enumerate(("attn_q", "attn_k"))]

    def add(builder: GraphBuilder, values: Any) -> list[Any]:
        kind = DynamicInt8()
        return [kind(builder, weight, values) for weight in weights]

    graph = Graph(tmp_path, add, columns=40)
    assert graph.operators.count("DynamicQuantizeLinear") == 1
    found = graph.optimized()
    assert [found.count(op) for op in ("DynamicQuantizeLinear", "MatMulIntegerToFloat", "MatMulInteger")] == [1, 2, 0]
    values = _values(40)
    for found, seed in zip(graph.run(values), range(2), strict=True):
        wanted = _dynamic(values, *_codes_of(_weight(9, 40, seed)))
        _assert_close(found, wanted, _FLOAT32)


def test_onnxruntime_makes_one_node_of_a_dynamic_linear(tmp_path: Path) -> None:
    weight = weight_of(_weight(9, 40))
    graph = Graph(tmp_path, lambda builder, values: [DynamicInt8()(builder, weight, values)], columns=40)
    assert sorted(graph.optimized()) == ["Abs", "Div", "DynamicQuantizeMatMul", "Max", "Mul", "ReduceMax"]


@pytest.mark.parametrize("compute", ["FLOAT", "FLOAT16"])
@pytest.mark.parametrize("span", [(-2.5, 1.0), (0.5, 3.0), (-4.0, -1.0)])
def test_static_is_the_exact_integer_product(tmp_path: Path, compute: str, span: tuple[float, float]) -> None:
    weight, kind = _weight(33, 67), np.float16 if compute == "FLOAT16" else np.float32
    static = StaticInt8({("attn_q.weight", 0): span})
    graph = Graph(
        tmp_path, lambda builder, values: [static(builder, weight_of(weight), values)], columns=67, compute=compute
    )
    values = 2 * _values(67, kind=kind)  # some beyond the range: they are cut off
    codes, scale = _codes_of(weight)
    wanted = _product(values, *span, codes, scale)
    # not fused, floats are multiplied and summed: 67 products with two rounded factors
    rounded, step, middle = _by_definition(values, *span)
    loose = (67 + 3) * 2.0**-24 * (np.abs(rounded - middle) @ np.abs(codes - 128).T * np.abs(scale) * step)
    narrow = 2.0**-11 if compute == "FLOAT16" else 0.0
    _assert_close(graph.run(values)[0], wanted, _FLOAT32 + narrow)
    _assert_close(graph.run(values, optimize=False)[0], wanted, narrow, loose)
    _assert_close(graph.reference(values)[0], wanted, narrow, loose)
    assert "MatMulIntegerToFloat" in graph.optimized()
    assert "MatMul" not in graph.optimized()


def test_static_rounds_what_several_linears_read_once(tmp_path: Path) -> None:
    slots = ("attn_q.weight", "attn_k.weight", "attn_v.weight")
    ranges = {("attn_q.weight", 0): (-1.0, 2.0), ("attn_k.weight", 0): (-1.0, 2.0), ("attn_v.weight", 0): (-1.0, 3.0)}

    def add(builder: GraphBuilder, values: Any) -> list[Any]:
        kind = StaticInt8(ranges)
        return [kind(builder, weight_of(_weight(9, 40), slot=slot), values) for slot in slots]

    graph = Graph(tmp_path, add, columns=40)
    assert graph.operators.count("QuantizeLinear") == 2
    assert graph.optimized().count("MatMulIntegerToFloat") == 3


def test_the_grid_of_a_range_reaches_its_ends_and_holds_zero() -> None:
    for low, high in [(-1.0, 1.0), (0.25, 3.0), (-7.0, -2.0), (-0.1, 1e6), (-3e38, 1e38), (-1e-30, 0.0)]:
        scale, zero = static_grid(low, high)
        assert (scale.dtype, zero.dtype, scale.shape, zero.shape) == (np.float32, np.uint8, (), ())
        step, middle = float(scale), int(zero)
        for end in (min(low, 0.0), max(high, 0.0)):  # both ends have a code, up to half a step of rounding the zero
            code = end / step + middle
            assert -0.501 <= code <= 255.501
        assert abs(255 * step - (max(high, 0.0) - min(low, 0.0))) <= 2.0**-22 * 255 * step
    assert [part.item() for part in static_grid(0.0, 0.0)] == [1.0, 0]
    assert [part.item() for part in static_grid(-2.0, 0.0)] == [np.float32(2 / 255), 255]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_type", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("static", [True, False])
def test_codes_of_a_source_are_kept(tmp_path: Path, bits: int, symmetric: bool, scale_type: str, static: bool) -> None:
    tensor = random_tensor(3, 21, 50, bits=bits, group=-1, symmetric=symmetric, scale_type=scale_type)
    kind = StaticInt8({("attn_q.weight", 0): (-3.0, 4.0)}) if static else DynamicInt8()
    graph = Graph(tmp_path, lambda builder, values: [kind(builder, weight_of(tensor), values)], columns=50)
    np.testing.assert_array_equal(graph.stored(".qweight").T, tensor.codes)
    np.testing.assert_array_equal(graph.stored(".scales"), tensor.scale.astype(np.float32)[:, 0])
    values = _values(50)
    codes = tensor.codes.astype(np.int64), tensor.scale, tensor.zeros()
    wanted = _product(values, -3.0, 4.0, *codes) if static else _dynamic(values, *codes)
    _assert_close(graph.run(values)[0], wanted, _FLOAT32)
    if not static:
        _assert_close(graph.run(values, optimize=False)[0], wanted, _FLOAT32)


@pytest.mark.parametrize("opset", [21, 22, 24, 25, 26])
def test_every_opset_gives_the_same(tmp_path: Path, opset: int) -> None:
    weight = weight_of(_weight(9, 40))

    def add(builder: GraphBuilder, values: Any) -> list[Any]:
        static = StaticInt8({("ffn_up.weight", 0): (-2.0, 2.0)})
        other = weight_of(_weight(9, 40, 5), slot="ffn_up.weight")
        return [DynamicInt8()(builder, weight, values), static(builder, other, values)]

    values = _values(40)
    found = Graph(tmp_path, add, columns=40, opset=opset).run(values)
    _assert_close(found[0], _dynamic(values, *_codes_of(_weight(9, 40))), _FLOAT32)
    _assert_close(found[1], _product(values, -2.0, 2.0, *_codes_of(_weight(9, 40, 5))), _FLOAT32)


@pytest.mark.parametrize("step", [1, 4, 100])
@pytest.mark.parametrize("threads", [1, 4])
def test_the_bytes_depend_on_no_number_of_threads(tmp_path: Path, step: int, threads: int) -> None:
    weight = _weight(37, 53)
    graph = Graph(
        tmp_path, lambda builder, values: [DynamicInt8()(builder, weight_of(weight, step=step), values)], columns=53,
        threads=threads,
    )  # fmt: skip
    codes, scale = _codes_of(weight)
    np.testing.assert_array_equal(graph.stored(".qweight"), codes.T)
    np.testing.assert_array_equal(graph.stored(".scales"), scale)


def test_codes_in_groups_are_refused() -> None:
    weight = weight_of(random_tensor(3, 21, 64, bits=8, group=32, symmetric=True))
    builder = GraphBuilder(compute="FLOAT", standard=True, opset=23)
    with pytest.raises(LayoutError, match=r"some.safetensors: 'some.0.attn_q.weight': int8 g32 .* weight-only"):
        DynamicInt8()(builder, weight, builder.input("values", "FLOAT", [1, 1, 64]))


def test_a_linear_whose_sums_outgrow_32_bits_is_refused() -> None:
    for columns, refused in ((65793, False), (65794, True)):  # 255 * 128 * 65793 < 2^31 - 1
        weight = weight_of(np.zeros((1, columns), np.float32))
        builder = GraphBuilder(compute="FLOAT", standard=True, opset=23)
        values = builder.input("values", "FLOAT", [1, 1, columns])
        if refused:
            with pytest.raises(LayoutError, match="65794 columns outgrow 32 bits"):
                DynamicInt8()(builder, weight, values)
        else:
            DynamicInt8()(builder, weight, values)


@pytest.mark.parametrize("greatest", [False, True])
def test_sums_at_the_end_of_32_bits_are_right(tmp_path: Path, greatest: bool) -> None:
    columns = 65793
    weight = np.full((2, columns), 1.0, np.float32)
    graph = Graph(
        tmp_path, lambda builder, values: [DynamicInt8()(builder, weight_of(weight), values)], columns=columns
    )
    values = np.full((1, 1, columns), 2.0 if greatest else -2.0, np.float32)
    found = graph.run(values)[0]
    _assert_close(found, np.full((1, 1, 2), values[0, 0, 0] * columns), _FLOAT32)


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ({}, "no range is known of its inputs"),
        ({("attn_q.weight", 0): (-1.0, float("inf"))}, "go from -1.0 to inf"),
        ({("attn_q.weight", 0): (float("nan"), 1.0)}, "go from nan to 1.0"),
    ],
)
def test_static_needs_a_finite_range_of_every_linear(ranges: Any, words: str) -> None:
    builder = GraphBuilder(compute="FLOAT", standard=True, opset=23)
    with pytest.raises(InputError, match=f"some.safetensors: 'some.0.attn_q.weight': .*{words}"):
        StaticInt8(ranges)(builder, weight_of(_weight(2, 4)), builder.input("values", "FLOAT", [1, 1, 4]))


def test_a_damaged_weight_is_one_error_and_nobody_waits(tmp_path: Path) -> None:
    weight = _weight(37, 53)
    weight[20, 3] = np.nan
    for threads in (1, 4):
        with pytest.raises(InputError, match=r"some.safetensors: tensor 'some.0.attn_q.weight': .*NaN"):
            Graph(
                tmp_path, lambda builder, values: [DynamicInt8()(builder, weight_of(weight), values)], columns=53,
                threads=threads,
            )  # fmt: skip
