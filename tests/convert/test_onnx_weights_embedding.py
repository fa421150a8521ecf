"""Rows that are looked up: exact, and from the very bytes that the head multiplies with where the two are tied."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpress.convert.checkpoint import Array
from quantpress.quant.errors import LayoutError
from quantpress.quant.qtensor import QuantizedTensor
from tests.quantized_tensors import random_tensor

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx
import onnx_ir as ir

from quantpress.convert.onnx.embedding import look_up_blocks, look_up_floats
from quantpress.convert.onnx.graph import DATA_FILE, GraphBuilder
from quantpress.convert.onnx.linear_float import FloatLinear
from quantpress.convert.onnx.linear_nbits import MatMulNBits
from tests.onnx_linears import Graph, weight_of

NUMPY: dict[str, Any] = {"FLOAT": np.float32, "FLOAT16": np.float16}


def meaning(tensor: QuantizedTensor) -> Array:
    """(N, K) float64: scale * (code - zero)."""
    group = np.arange(tensor.columns) // tensor.group_size
    steps: Array = tensor.codes.astype(np.float64) - tensor.zeros()[:, group]
    return steps * tensor.scale.astype(np.float64)[:, group]


def places(graph: Graph) -> dict[str, tuple[int, int]]:
    """Gives offset and length of every initializer of the data file."""
    found = {}
    for each in onnx.load(graph.path, load_external_data=False).graph.initializer:
        entries = {entry.key: entry.value for entry in each.external_data}
        if entries:
            assert entries["location"] == DATA_FILE
            found[each.name] = int(entries["offset"]), int(entries["length"])
    return found


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_rows_are_exact_and_the_product_reads_the_same_bytes(data: st.DataObject) -> None:
    """Rows are scale * (code - zero), rounded once to the activations' type; columns need not fill the last block."""
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 300))
    seed, symmetric = data.draw(st.integers(0, 1 << 30)), data.draw(st.booleans())
    bits, group = data.draw(st.sampled_from([2, 3, 4, 8])), data.draw(st.sampled_from([16, 32, 64, 128, 256, -1]))
    compute = data.draw(st.sampled_from(["FLOAT", "FLOAT16"]))
    tensor = random_tensor(seed, rows, columns, bits=bits, group=group, symmetric=symmetric)
    weight, kind = weight_of(tensor, step=4, slot="token_embd.weight", layer=-1), MatMulNBits(4, 32, True)

    def add(builder: GraphBuilder, ids: ir.Value) -> list[ir.Value]:
        values = look_up_blocks(builder, kind.store(builder, weight), weight, ids)
        return [values, kind(builder, weight, values)]

    ids = np.random.default_rng(seed).integers(0, rows, (2, 5))
    with tempfile.TemporaryDirectory() as place:
        graph = Graph(Path(place), add, columns=None, compute=compute, standard=False)
        found, product = graph.run(ids)
        stored = places(graph)
    exact = meaning(tensor)
    np.testing.assert_array_equal(found, exact[ids].astype(NUMPY[compute]))
    assert stored.pop("some.-1.token_embd.qweight_rows") == stored["some.-1.token_embd.qweight"]
    assert len(stored) == (2 if symmetric else 3)
    assert len({offset for offset, _ in stored.values()}) == len(stored)
    # a sum of K products in any order and a rounded weight: (K + 2) u sum |a w|, as in test_onnx_weights_nbits.py, and
    # near 0 half the least float16; weights and inputs here are multiples of 2^-20 or so, which float32 never loses
    wide, unit = found.astype(np.float64), 2.0 ** (-24 if compute == "FLOAT" else -11)
    bound = (columns + 2) * (unit * (np.abs(wide) @ np.abs(exact).T) + (0 if compute == "FLOAT" else 2.0**-25))
    with np.errstate(over="ignore"):
        beyond = np.abs(wide @ exact.T) > np.finfo(NUMPY[compute]).max / 2
    assert ((np.abs(product - wide @ exact.T) <= bound) | beyond).all()


@pytest.mark.parametrize("compute", ["FLOAT", "FLOAT16"])
@pytest.mark.parametrize("dtype", ["FLOAT", "FLOAT16", "BFLOAT16"])
@pytest.mark.parametrize("standard", [True, False])
def test_floats_are_looked_up_and_multiplied_with_from_one_initializer(
    dtype: str, compute: str, standard: bool, tmp_path: Path
) -> None:
    # sums of 24 products of such numbers are below 2048: every type has them exactly
    rows = np.random.default_rng(0).integers(-8, 9, (11, 24)).astype(np.float32)
    weight, kind = weight_of(rows, slot="token_embd.weight", layer=-1), FloatLinear(dtype)

    def add(builder: GraphBuilder, ids: ir.Value) -> list[ir.Value]:
        values = look_up_floats(builder, kind, weight, ids)
        return [values, kind(builder, weight, values)]

    graph = Graph(tmp_path, add, columns=None, compute=compute, standard=standard)
    ids = np.array([[0, 10, 3], [4, 4, 9]])
    found, product = graph.run(ids)
    assert found.dtype == product.dtype == NUMPY[compute]
    np.testing.assert_array_equal(found, rows[ids])
    np.testing.assert_array_equal(product, rows[ids] @ rows.T)
    assert graph.labels == [{"FLOAT": "F32", "FLOAT16": "F16", "BFLOAT16": "BF16"}[dtype]]
    assert ("FusedMatMul" in graph.operators) is not standard
    # casts of the rows, of the weight and of the values to the product's type, and of the product: float16 numbers are
    # multiplied as such where the activations are float16, all others in float32
    narrow, wide = (0, 3, 4), (2, 0, 2)
    place = ("FLOAT16", "FLOAT", "BFLOAT16").index(dtype)
    assert graph.operators.count("Cast") == (wide if compute == "FLOAT" else narrow)[place]


@pytest.mark.parametrize("dtype", ["FLOAT", "BFLOAT16"])
def test_weights_beyond_float16_are_multiplied_with_in_float32(dtype: str, tmp_path: Path) -> None:
    rows = np.full((3, 16), 2.0**17, np.float32)
    weight, kind = weight_of(rows), FloatLinear(dtype)
    graph = Graph(
        tmp_path, lambda builder, values: [kind(builder, weight, values)], columns=16, compute="FLOAT16", standard=False
    )
    (found,) = graph.run(np.full((1, 1, 16), 2.0**-10, np.float16))
    np.testing.assert_array_equal(found, np.full((1, 1, 3), 2048.0, np.float16))


def test_rows_whose_columns_are_out_of_order_are_refused(tmp_path: Path) -> None:
    tensor = random_tensor(0, 4, 64, bits=4, group=32, symmetric=True)
    tensor = replace(tensor, g_idx=np.arange(64, dtype=np.int32) % 2)
    weight, kind = weight_of(tensor), MatMulNBits(4, 32, True)
    with pytest.raises(LayoutError, match=r"some.safetensors: 'some.0.attn_q.weight': .*--token-embedding-type"):
        Graph(
            tmp_path,
            lambda builder, ids: [look_up_blocks(builder, kind.store(builder, weight), weight, ids)],
            columns=None,
            standard=False,
        )
