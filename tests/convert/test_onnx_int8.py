"""Integer products in onnxruntime against the operators' definitions, computed with exact integers and float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.onnx_linears import Graph, weight_of
from tests.quantized_tensors import random_tensor
from quantpress.convert.onnx.linear_int8 import DynamicInt8, StaticInt8, static_grid
from quantpress.quant.errors import InputError, LayoutError

Array = NDArray[Any]

# The integer product is exact. Then it is rounded to float32 (2^-24 of it), the two scales are multiplied (2^-24), and
# the result is (2^-24); the same again for where the order of these differs. Of the greatest result: it bounds all.
_FLOAT32 = 6 * 2.0**-24
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


def _assert_close(found: Array, wanted: Array, limit: float) -> None:
    assert np.abs(found.astype(np.float64) - wanted).max() <= limit * np.abs(wanted).max()


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
    np.testing.assert_array_equal(graph.stored("_codes"), codes.T)
    np.testing.assert_array_equal(graph.stored("_scale"), scale)
    wanted = _product(values, values.min(), values.max(), codes, scale)
    limit = _FLOAT16 if compute == "FLOAT16" else _FLOAT32
    for found in (graph.run(values), graph.run(values, optimize=False), graph.reference(values)):
        assert found[0].dtype == kind
        _assert_close(found[0], wanted, limit)
    assert graph.labels == ["INT8"]
