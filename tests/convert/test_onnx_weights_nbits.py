"""MatMulNBits: what is stored is scale * (code - zero) of the right codes, and onnxruntime multiplies with just that.

Stored tensors are read with the `onnx` package and taken apart here, bit by bit, as onnxruntime's ContribOperators.md
describes them; products are compared with float64.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpress.convert.checkpoint import Array
from quantpress.quant.errors import InputError, LayoutError
from quantpress.quant.qtensor import QuantizedTensor
from tests.quantized_tensors import random_tensor

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx

from quantpress.convert.onnx.linear import LinearWeight
from quantpress.convert.onnx.linear_nbits import MatMulNBits
from tests.onnx_linears import Graph, weight_of

HALF = {"FLOAT": 2.0**-24, "FLOAT16": 2.0**-11}  # half a unit in the last place, relative
LEAST = {"FLOAT": 2.0**-150, "FLOAT16": 2.0**-25}  # half the least number: what rounding near 0 may lose
NUMPY = {"FLOAT": np.float32, "FLOAT16": np.float16}


@dataclass(frozen=True, eq=False)
class Found:
    """A MatMulNBits node's weight, taken apart: codes (N, blocks, size), scales and zeros (N, blocks)."""

    codes: Array
    scales: Array
    zeros: Array
    columns: int
    order: Array | None

    @property
    def weight(self) -> Array:
        """(N, K) float64, exactly, columns as the input has them."""
        steps = self.codes.astype(np.float64) - self.zeros[..., None]
        rows = (steps * self.scales.astype(np.float64)[..., None]).reshape(len(self.codes), -1)[:, : self.columns]
        if self.order is None:
            return rows
        placed = np.full_like(rows, np.nan)
        placed[:, self.order] = rows
        return placed


def fields(packed: Array, bits: int) -> Array:
    """Gives the numbers of `bits` bits in the last dimension, low bits first."""
    stream = np.unpackbits(packed, axis=-1, bitorder="little").reshape(*packed.shape[:-1], -1, bits)
    numbers: Array = (stream.astype(np.int64) << np.arange(bits)).sum(-1)
    return numbers


def read(graph: Graph) -> Found:
    model = onnx.load(graph.path)
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    node = next(each for each in model.graph.node if each.op_type == "MatMulNBits")
    has = {each.name: each.i for each in node.attribute}
    packed, scales = (constants[name] for name in node.input[1:3])
    blocks = -(-has["K"] // has["block_size"])
    assert packed.shape == (has["N"], blocks, has["block_size"] * has["bits"] // 8)
    assert scales.shape == (has["N"], blocks)
    zeros = np.full(scales.shape, 1 << (has["bits"] - 1))
    if len(node.input) > 3:
        stored = constants[node.input[3]]
        assert stored.shape == (has["N"], -(-blocks * has["bits"] // 8))
        zeros = fields(stored, has["bits"])[:, :blocks]
    gathers = [each for each in model.graph.node if each.op_type == "Gather"]
    order = constants[gathers[0].input[1]] if gathers else None
    return Found(fields(packed, has["bits"]), scales, zeros, has["K"], order)


def graph_of(folder: Path, kind: MatMulNBits, weight: LinearWeight, compute: str = "FLOAT", threads: int = 1) -> Graph:
    return Graph(
        folder, lambda builder, values: [kind(builder, weight, values)], columns=weight.shape[1], compute=compute,
        standard=False, threads=threads,
    )  # fmt: skip


def assert_product(graph: Graph, weight: Array, compute: str, seed: int = 0) -> None:
    """Compares onnxruntime's product with float64.

    A sum of K products differs from the exact one by at most (K + 1) u sum |a w| in any order, one u more for the
    rounding of scale * (code - zero), u being half a unit in the last place (Higham, Accuracy and Stability, 3.1). On
    processors float16 is computed in float32 or in float16, depending on the machine, so its u is that of float16.
    Near 0 each of these roundings, of weights too, may lose half the least number instead.
    """
    values = np.random.default_rng(seed).standard_normal((2, 3, weight.shape[1])).astype(NUMPY[compute])
    (found,) = graph.run(values)
    exact = values.astype(np.float64) @ weight.T
    inputs = np.abs(values.astype(np.float64))
    size, near_zero = inputs @ np.abs(weight).T, LEAST[compute] * (1 + inputs.sum(-1, keepdims=True))
    assert (np.abs(found - exact) <= (weight.shape[1] + 2) * (HALF[compute] * size + near_zero)).all()


def columns_and_block(data: st.DataObject) -> tuple[int, int]:
    return data.draw(st.integers(1, 300)), data.draw(st.sampled_from([16, 32, 64, 128, 256]))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_rounded_weight_has_the_nearest_codes_and_is_multiplied_with(data: st.DataObject) -> None:
    columns, block = columns_and_block(data)
    bits, symmetric = data.draw(st.sampled_from([4, 8])), data.draw(st.booleans())
    compute = data.draw(st.sampled_from(["FLOAT", "FLOAT16"]))
    seed = data.draw(st.integers(0, 1 << 30))
    rows = np.random.default_rng(seed).standard_normal((data.draw(st.integers(1, 9)), columns)).astype(np.float32)
    with tempfile.TemporaryDirectory() as place:
        graph = graph_of(Path(place), MatMulNBits(bits, block, symmetric), weight_of(rows, step=4), compute)
        found = read(graph)
        assert_product(graph, found.weight, compute, seed)
    assert found.scales.dtype == NUMPY[compute]
    assert found.order is None
    size = found.codes.shape[-1]
    assert size == min(block, max(16, 1 << (columns - 1).bit_length()))
    padded = np.zeros((len(rows), found.codes.shape[1] * size))
    padded[:, :columns] = rows
    blocks = padded.reshape(found.codes.shape)
    assert_scales(found, blocks, bits, symmetric, compute)
    # no other code is nearer, by more than what the rounding of the quotient may hide: 2^bits steps of half an ulp
    scale = found.scales.astype(np.float64)[..., None]
    errors = np.abs(blocks[..., None] - scale[..., None] * (np.arange(1 << bits) - found.zeros[..., None, None]))
    chosen = np.take_along_axis(errors, found.codes[..., None], -1)[..., 0]
    inside = np.arange(found.codes.shape[1] * size).reshape(found.codes.shape[1:]) < columns
    assert ((chosen <= errors.min(-1) + np.abs(scale) * 2.0 ** (bits - 23)) | ~inside).all()


def assert_scales(found: Found, blocks: Array, bits: int, symmetric: bool, compute: str) -> None:
    """Checks scales by their formulas, rounded once: signed absmax / -2^(bits - 1), or range / (2^bits - 1)."""
    if symmetric:
        farthest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)[..., 0]
        wanted = farthest / -(2.0 ** (bits - 1))
    else:
        low, high = blocks.min(-1).clip(max=0), blocks.max(-1).clip(min=0)
        wanted = (high - low) / (2.0**bits - 1)
        assert (found.zeros == np.rint(-low / found.scales.astype(np.float64)).clip(0, 2**bits - 1)).all()
    np.testing.assert_array_equal(found.scales, wanted.astype(NUMPY[compute]))


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_codes_scales_and_zeros_of_a_quantized_weight_arrive_as_they_are(data: st.DataObject) -> None:
    tensor, compute = any_tensor(data), data.draw(st.sampled_from(["FLOAT", "FLOAT16"]))
    kind = MatMulNBits(data.draw(st.sampled_from([4, 8])), data.draw(st.sampled_from([16, 32, 256])), True)
    with tempfile.TemporaryDirectory() as place:
        graph = graph_of(Path(place), kind, weight_of(tensor, step=3), compute)
        found = read(graph)
        exact = meaning(tensor)
        np.testing.assert_array_equal(found.weight, exact)
        assert_product(graph, exact, compute)
    asymmetric = "" if tensor.symmetric else " asym"
    group = found.codes.shape[-1] if tensor.group_size >= tensor.columns else tensor.group_size
    assert graph.labels == [f"INT{tensor.bits} g{group}{asymmetric}"]


def any_tensor(data: st.DataObject) -> QuantizedTensor:
    """A matrix of random codes, its columns out of order in one of three."""
    group = data.draw(st.sampled_from([16, 32, 48, 64, 96, 128, 256, -1]))
    columns = data.draw(st.integers(1, 300))
    seed = data.draw(st.integers(0, 1 << 30))
    tensor = random_tensor(
        seed, data.draw(st.integers(1, 8)), columns, bits=data.draw(st.sampled_from([2, 3, 4, 8])), group=group,
        symmetric=data.draw(st.booleans()),
    )  # fmt: skip
    if tensor.groups > 1 and data.draw(st.integers(0, 2)) == 0:
        groups = np.arange(columns, dtype=np.int32) // np.int32(tensor.group_size)
        tensor = replace(tensor, g_idx=np.random.default_rng(seed).permutation(groups))
    return tensor


def meaning(tensor: QuantizedTensor) -> Array:
    """(N, K) float64: the definition of an affine quantized matrix."""
    group = np.arange(tensor.columns) // tensor.group_size if tensor.g_idx is None else tensor.g_idx
    zero = np.full(tensor.scale.shape, 1 << (tensor.bits - 1)) if tensor.zero is None else tensor.zero.astype(np.int64)
    steps: Array = tensor.codes.astype(np.float64) - zero[:, group]
    return steps * tensor.scale.astype(np.float64)[:, group]


@pytest.mark.parametrize(("group", "block", "wanted"), [(256, 32, 128), (256, 256, 256), (-1, 32, 128), (-1, 256, 256)])
def test_longer_blocks_than_128_columns_only_where_they_are_asked_for(
    group: int, block: int, wanted: int, tmp_path: Path
) -> None:
    tensor = random_tensor(0, 4, 512, bits=4, group=group, symmetric=False)
    graph = graph_of(tmp_path, MatMulNBits(4, block, True), weight_of(tensor))
    assert read(graph).codes.shape == (4, 512 // wanted, wanted)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_and_scales_are_those_of_onnxruntimes_own_quantizer(bits: int, symmetric: bool, tmp_path: Path) -> None:
    """Its MatMulNBitsQuantizer (method "default") rounds in the same way but for ties and the last bit of a scale."""
    quantizer = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer")
    rows = np.random.default_rng(5).standard_normal((48, 256)).astype(np.float32)
    config = quantizer.DefaultWeightOnlyQuantConfig(block_size=64, is_symmetric=symmetric, bits=bits)
    packed, scales, zeros = quantizer.DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(rows.T))
    ours = read(graph_of(tmp_path, MatMulNBits(bits, 64, symmetric), weight_of(rows)))
    np.testing.assert_allclose(ours.scales, scales.reshape(48, 4), rtol=2.0**-22)
    codes = fields(packed.reshape(48, 4, -1), bits)
    assert np.abs(ours.codes - codes).max() <= 1
    assert (ours.codes != codes).mean() < (0.001 if bits == 4 else 0.01)
    if not symmetric:
        np.testing.assert_array_equal(ours.zeros, fields(zeros.reshape(48, -1), bits)[:, :4])


def test_the_bytes_depend_neither_on_threads_nor_on_the_rows_that_are_read_together(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((65, 100)).astype(np.float32)
    tensor = replace(
        random_tensor(3, 65, 96, bits=3, group=32, symmetric=False), g_idx=np.arange(96, dtype=np.int32) % 3
    )
    contents = []
    for number, (step, threads) in enumerate([(65, 1), (7, 1), (7, 4), (1, 3)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        kind = MatMulNBits(4, 32, False)
        graph_of(folder, kind, weight_of(rows, step=step), threads=threads)
        one = (folder / "model.onnx.data").read_bytes()
        graph_of(folder, kind, weight_of(tensor, step=step, layer=1), threads=threads)
        contents.append((one, (folder / "model.onnx.data").read_bytes()))
    assert all(each == contents[0] for each in contents)


def test_a_kind_stores_a_weight_once(tmp_path: Path) -> None:
    weight, kind = weight_of(np.ones((4, 32), np.float32)), MatMulNBits(4, 32, True)
    graph = Graph(
        tmp_path,
        lambda builder, values: [kind(builder, weight, values), kind(builder, weight, values)],
        columns=32,
        standard=False,
    )
    assert graph.labels == ["INT4 g32"]


def test_the_accuracy_level_is_the_nodes(tmp_path: Path) -> None:
    graph = graph_of(tmp_path, MatMulNBits(4, 32, True, accuracy_level=4), weight_of(np.ones((4, 32), np.float32)))
    (node,) = onnx.load(graph.path).graph.node
    assert {each.name: each.i for each in node.attribute}["accuracy_level"] == 4
    assert node.name == "/layers.0/attn_q/MatMulNBits"


def write(folder: Path, values: Any, compute: str = "FLOAT", kind: MatMulNBits | None = None) -> None:
    graph_of(folder, kind or MatMulNBits(4, 32, True), weight_of(values), compute)


WHERE = "some.safetensors: 'some.0.attn_q.weight': "


def test_groups_that_do_not_divide_into_blocks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match=f"{WHERE}.*groups of 24"):
        write(tmp_path, random_tensor(0, 4, 96, bits=4, group=24, symmetric=True))


def test_groups_of_different_sizes_are_refused(tmp_path: Path) -> None:
    tensor = random_tensor(0, 4, 64, bits=4, group=32, symmetric=True)
    g_idx = np.zeros(64, np.int32)
    g_idx[40:] = 1
    with pytest.raises(LayoutError, match=f"{WHERE}.*g_idx"):
        write(tmp_path, replace(tensor, g_idx=g_idx))


def test_scales_that_float16_does_not_have_are_refused_only_there(tmp_path: Path) -> None:
    tensor = random_tensor(0, 4, 64, bits=4, group=32, symmetric=True, scale_type="BF16")
    tensor.scale[2, 1] = ml_dtypes.bfloat16(2.0**17)
    write(tmp_path, tensor)
    with pytest.raises(LayoutError, match=f"{WHERE}.*131072.*--compute-type fp32"):
        write(tmp_path, tensor, "FLOAT16")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_no_code_stands_for_what_is_not_finite(bad: float, tmp_path: Path) -> None:
    rows = np.ones((4, 64), np.float32)
    rows[3, 63] = bad
    with pytest.raises(InputError, match=r"some.safetensors: tensor 'some.0.attn_q.weight': 1 of these 256 values"):
        write(tmp_path, rows)


@pytest.mark.parametrize(("value", "compute", "text"), [(1e6, "FLOAT16", "F16"), (3.4e38, "FLOAT", "float32")])
def test_scales_and_values_beyond_their_type_are_refused(value: float, compute: str, text: str, tmp_path: Path) -> None:
    rows = np.full((4, 64), -value, np.float32)
    rows[0, 0] = value
    with pytest.raises(InputError, match=f"some.safetensors: tensor 'some.0.attn_q.weight': .*too large for {text}"):
        write(tmp_path, rows, compute, MatMulNBits(4, 32, False))
