"""Which quantized matrices go into which format exactly: every cell of the table, read back by the other side.

The table is that of docs/quantization.md. A cell is exact, where every matrix of the row must come back bit for bit
from the format's own reader, or refused, where packing one must raise LayoutError.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from quantpress.convert.awq.pack import FORMAT as AWQ
from quantpress.convert.checkpoint import Array
from quantpress.convert.compressed_tensors.pack import FORMAT as COMPRESSED_TENSORS
from quantpress.convert.gptq.pack import GPTQ_V1, GPTQ_V2
from quantpress.convert.onnx.matmul_nbits import matmul_nbits
from quantpress.convert.quantized import PackFormat
from quantpress.quant.errors import LayoutError
from quantpress.quant.ggml.from_codes import blocks_of, holds
from quantpress.quant.qtensor import QuantizedTensor
from tests.quantized_tensors import random_tensor, read_awq, read_gptq, run_matmul_nbits

NAME = "model.layers.0.mlp.up_proj.weight"
Read = Callable[[QuantizedTensor], Array]


def parts(target: PackFormat, tensor: QuantizedTensor) -> dict[str, Array]:
    target.check(tensor.form)
    stored = target.pack(NAME, tensor, tensor.form)
    return {name.rpartition(".")[2]: values for name, values in stored.items()}


def through_compressed_tensors(tensor: QuantizedTensor) -> Array:
    """Unpacks with the library, and multiplies here: it computes in the type of the scales, which rounds."""
    torch = pytest.importorskip("torch")
    packing = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers", reason="no oracle")
    stored = parts(COMPRESSED_TENSORS, tensor)
    shape = tuple(int(size) for size in stored["weight_shape"])
    codes = packing.unpack_from_int32(torch.from_numpy(stored["weight_packed"]), tensor.bits, shape)
    zeros: Any = np.zeros(tensor.scale.shape, np.int8)
    if not tensor.symmetric:
        words = torch.from_numpy(stored["weight_zero_point"])
        zeros = packing.unpack_from_int32(words, tensor.bits, tensor.scale.shape, packed_dim=0).numpy()
    group = np.arange(shape[1]) // tensor.group_size
    steps = codes.numpy().astype(np.float32) - zeros.astype(np.float32)[:, group]
    weight: Array = steps * stored["weight_scale"].astype(np.float32)[:, group]
    return weight


def through_ggml(kind: str) -> Read:
    def read(tensor: QuantizedTensor) -> Array:
        gguf = pytest.importorskip("gguf")
        found: Array = gguf.dequantize(blocks_of(tensor, kind), getattr(gguf.GGMLQuantizationType, kind))
        return found

    return read


def through_matmul_nbits(tensor: QuantizedTensor) -> Array:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    return run_matmul_nbits(matmul_nbits(tensor))


TARGETS: dict[str, Read] = {
    "gptq": lambda tensor: read_gptq(parts(GPTQ_V1, tensor), tensor.bits, version=1),
    "gptq_v2": lambda tensor: read_gptq(parts(GPTQ_V2, tensor), tensor.bits, version=2),
    "compressed-tensors": through_compressed_tensors,
    "awq": lambda tensor: read_awq(parts(AWQ, tensor), tensor.group_size),
    "MatMulNBits": through_matmul_nbits,
    **{kind: through_ggml(kind) for kind in ("Q4_0", "Q4_1", "Q5_0", "Q8_0")},
}


@dataclass(frozen=True)
class Row:
    """A row of the table: what the matrices are, and what is exact; every other target refuses them."""

    name: str
    bits: tuple[int, ...]
    groups: tuple[int, ...]
    symmetric: bool
    exact: str

    def tensor(self, data: st.DataObject) -> QuantizedTensor:
        group = data.draw(st.sampled_from(self.groups))
        return random_tensor(
            data.draw(st.integers(0, 1 << 30)),
            32 * data.draw(st.integers(1, 3)),
            max(32, group) * data.draw(st.integers(1, 3)),
            bits=data.draw(st.sampled_from(self.bits)),
            group=group,
            symmetric=self.symmetric,
        )


_CHECKPOINTS = "gptq gptq_v2 compressed-tensors"
TABLE = (
    Row("int4-sym", (4,), (32, 64, 128), True, f"{_CHECKPOINTS} awq MatMulNBits Q4_0 Q4_1 Q5_0 Q8_0"),
    Row("int4-asym", (4,), (32, 64, 128), False, f"{_CHECKPOINTS} awq MatMulNBits Q5_0 Q8_0"),
    Row("int8-sym", (8,), (32, 64, 128), True, f"{_CHECKPOINTS} MatMulNBits Q8_0"),
    Row("int8-asym", (8,), (32, 64, 128), False, f"{_CHECKPOINTS} MatMulNBits"),
    Row("int2-3-asym", (2, 3), (32, 64), False, f"{_CHECKPOINTS} MatMulNBits Q4_0 Q5_0 Q8_0"),
    Row("int2-3-sym", (2, 3), (32, 64), True, f"{_CHECKPOINTS} MatMulNBits Q4_0 Q4_1 Q5_0 Q8_0"),
    Row("group-16", (2, 3, 4, 8), (16,), True, f"{_CHECKPOINTS} MatMulNBits"),
    Row("group-16-asym", (2, 3, 4, 8), (16,), False, f"{_CHECKPOINTS} MatMulNBits"),
    Row("group-96", (8,), (96,), True, f"{_CHECKPOINTS} MatMulNBits Q8_0"),
    Row("row-int4-sym", (4,), (-1,), True, f"{_CHECKPOINTS} awq MatMulNBits Q4_0 Q4_1 Q5_0 Q8_0"),
    Row("row-int4-asym", (4,), (-1,), False, f"{_CHECKPOINTS} awq MatMulNBits Q5_0 Q8_0"),
    Row("row-int8-sym", (8,), (-1,), True, f"{_CHECKPOINTS} MatMulNBits Q8_0"),
)
CELLS = [(row, target) for row in TABLE for target in TARGETS]


@pytest.mark.parametrize(("row", "target"), CELLS, ids=[f"{row.name}-{target}" for row, target in CELLS])
@settings(deadline=None, max_examples=12)
@given(st.data())
def test_a_cell_is_exact_or_refused(row: Row, target: str, data: st.DataObject) -> None:
    tensor = row.tensor(data)
    if target not in row.exact.split():
        with pytest.raises(LayoutError):
            TARGETS[target](tensor)
        return
    if target == "gptq" and not tensor.symmetric:
        zero = np.maximum(tensor.zeros(), 1).astype(np.uint8)
        tensor = replace(tensor, zero=zero)
        below = zero.copy()
        below[data.draw(st.integers(0, tensor.rows - 1)), data.draw(st.integers(0, tensor.groups - 1))] = 0
        with pytest.raises(LayoutError, match="gptq_v2"):  # version 1 stores zeros less one
            parts(GPTQ_V1, replace(tensor, zero=below))
    np.testing.assert_array_equal(TARGETS[target](tensor), tensor.dequantize())
    if target in ("Q4_0", "Q4_1", "Q5_0", "Q8_0"):
        assert holds(target, tensor.form)  # what the plan of a file says without reading a code


@pytest.mark.parametrize("target", TARGETS)
@settings(deadline=None, max_examples=10)
@given(st.data())
def test_columns_in_an_order_of_their_own_go_into_gptq_only(target: str, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 1 << 30))
    tensor = random_tensor(seed, 32, 128, bits=4, group=32, symmetric=True)
    g_idx = np.random.default_rng(seed).permutation(np.arange(128) // 32).astype(np.int32)
    ordered = replace(tensor, g_idx=g_idx)
    if target.startswith("gptq"):
        np.testing.assert_array_equal(TARGETS[target](ordered), ordered.dequantize())
        return
    with pytest.raises(LayoutError):
        TARGETS[target](ordered)
    assert not holds(target, ordered.form)


@pytest.mark.parametrize("target", TARGETS)
@settings(deadline=None, max_examples=10)
@given(st.data())
def test_scales_in_bfloat16_are_kept_where_float16_holds_them(target: str, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 1 << 30))
    tensor = random_tensor(seed, 32, 64, bits=4, group=32, symmetric=True, scale_type="BF16")
    # bfloat16 has 8 digits, so float16 holds its numbers from the least normal one on; Q4_1 stores 8 of them as well
    exponent = data.draw(st.floats(-13.5, 12.5))
    inside = replace(tensor, scale=(np.sign(tensor.scale.astype(np.float32)) * 2**exponent).astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(TARGETS[target](inside), inside.dequantize())
    small = inside.scale.copy()
    small[data.draw(st.integers(0, 31)), 0] = data.draw(st.sampled_from([1.5 * 2**-24, 2**-30, 2**17]))
    outside = replace(inside, scale=small)
    if target in ("compressed-tensors", "MatMulNBits"):
        np.testing.assert_array_equal(TARGETS[target](outside), outside.dequantize())
        return
    with pytest.raises(LayoutError, match="float16"):
        TARGETS[target](outside)


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_a_plan_that_says_a_type_holds_codes_is_right(data: st.DataObject) -> None:
    """`holds` may be shy, for it sees no codes; where it says yes, packing succeeds."""
    tensor = random_tensor(
        data.draw(st.integers(0, 1 << 30)),
        data.draw(st.integers(1, 4)),
        data.draw(st.sampled_from([32, 48, 64, 96, 128])),
        bits=data.draw(st.sampled_from([2, 3, 4, 8])),
        group=data.draw(st.sampled_from([16, 32, 64, -1])),
        symmetric=data.draw(st.booleans()),
    )
    kind = data.draw(st.sampled_from(["Q4_0", "Q4_1", "Q5_0", "Q8_0"]))
    assume(holds(kind, tensor.form))
    np.testing.assert_array_equal(through_ggml(kind)(tensor), tensor.dequantize())
