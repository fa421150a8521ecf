"""Codes packed as GPTQ and AWQ are what AutoGPTQ and AutoAWQ pack, and what their documentation reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpress.convert.awq.pack import FORMAT as AWQ
from quantpress.convert.checkpoint import DTYPES
from quantpress.convert.gptq.pack import GPTQ_V1, GPTQ_V2, GptqFormat
from quantpress.convert.quantized import PackFormat
from quantpress.quant.errors import LayoutError
from quantpress.quant.qtensor import BITS, QuantizedForm, QuantizedTensor
from tests.quantized_tensors import read_awq, read_gptq

_NAME = "model.layers.0.mlp.up_proj.weight"
_GOLDEN = json.loads(Path(__file__).with_name("packed_golden.json").read_text())


def random_codes(
    bits: int, *, rows: int = 32, columns: int = 96, group_size: int = 32, symmetric: bool, seed: int = 0
) -> QuantizedTensor:
    """Codes, zeros and scales of every kind: zeros of 0, negative and subnormal scales, and scales of 0."""
    rng = np.random.default_rng(seed)
    groups = -(-columns // group_size)
    scale = (rng.standard_normal((rows, groups)) * 10.0 ** rng.integers(-7, 2, (rows, groups))).astype(np.float16)
    zero = None if symmetric else rng.integers(0, 1 << bits, scale.shape, np.uint8)
    codes = rng.integers(0, 1 << bits, (rows, columns), np.uint8)
    return QuantizedTensor(codes, scale, zero, bits, group_size)


def _packed(fmt: PackFormat, tensor: QuantizedTensor) -> dict[str, np.ndarray]:
    fmt.check(tensor.form)
    return {name.rpartition(".")[2]: part for name, part in fmt.pack(_NAME, tensor, tensor.form).items()}


def _golden_tensor(bits: int) -> QuantizedTensor:
    """The numbers that `values` of make_packed_golden.py gives."""
    row, column, group = np.arange(32)[:, None], np.arange(64)[None], np.arange(2)[None]
    codes = (row * 5 + column * 3 + row * column // 7) % (1 << bits)
    scale = ((1 + (row * 3 + group * 5) % 8) / 256).astype(np.float16)
    zero = 1 + (row * 7 + group * 3) % ((1 << bits) - 1)
    return QuantizedTensor(codes.astype(np.uint8), scale, zero.astype(np.uint8), bits, 32)


@pytest.mark.parametrize("bits", BITS)
def test_version_1_is_word_for_word_what_autogptq_packs(bits: int) -> None:
    packed, theirs = _packed(GPTQ_V1, _golden_tensor(bits)), _GOLDEN[f"gptq-{bits}"]
    for part in ("qweight", "qzeros", "g_idx"):
        np.testing.assert_array_equal(packed[part], np.array(theirs[part], np.int32))
        assert packed[part].dtype == np.int32
    np.testing.assert_array_equal(packed["scales"], _golden_tensor(bits).scale.T)


def test_awq_is_word_for_word_what_autoawq_packs() -> None:
    packed = _packed(AWQ, _golden_tensor(4))
    for part in ("qweight", "qzeros"):
        np.testing.assert_array_equal(packed[part], np.array(_GOLDEN["awq-4"][part], np.int32))
    np.testing.assert_array_equal(packed["scales"], _golden_tensor(4).scale.T)


@settings(max_examples=80, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    version=st.sampled_from((1, 2)),
    symmetric=st.booleans(),
    shape=st.sampled_from(((32, 32), (64, 96), (96, 160))),
    group_size=st.sampled_from((16, 32, 48, 64, 128)),
    seed=st.integers(0, 999),
)
def test_gptq_is_read_as_documented(
    bits: int, version: int, symmetric: bool, shape: tuple[int, int], group_size: int, seed: int
) -> None:
    rows, columns = shape
    size = min(group_size, columns)
    tensor = random_codes(bits, rows=rows, columns=columns, group_size=size, symmetric=symmetric, seed=seed)
    if version == 1 and tensor.zero is not None:
        np.maximum(tensor.zero, 1, out=tensor.zero)
    values = read_gptq(_packed(GPTQ_V1 if version == 1 else GPTQ_V2, tensor), bits, version=version)
    # A difference of two codes has 8 bits and a scale 11: float32 holds the product, so nothing is rounded.
    np.testing.assert_array_equal(values, tensor.dequantize())


@settings(max_examples=40, deadline=None)
@given(
    symmetric=st.booleans(),
    shape=st.sampled_from(((8, 128), (64, 256), (24, 384))),
    group_size=st.sampled_from((32, 64, 128, -1)),
    seed=st.integers(0, 999),
)
def test_awq_is_read_as_documented(symmetric: bool, shape: tuple[int, int], group_size: int, seed: int) -> None:
    rows, columns = shape
    size = columns if group_size == -1 else group_size
    tensor = random_codes(4, rows=rows, columns=columns, group_size=size, symmetric=symmetric, seed=seed)
    np.testing.assert_array_equal(read_awq(_packed(AWQ, tensor), size), tensor.dequantize())


def test_columns_in_an_order_of_their_own_keep_it() -> None:
    plain = random_codes(4, symmetric=True)
    g_idx = np.random.default_rng(1).permutation(np.arange(96) // 32).astype(np.int32)
    tensor = QuantizedTensor(plain.codes, plain.scale, None, 4, 32, g_idx)
    assert tensor.form.ordered
    values = read_gptq(_packed(GPTQ_V1, tensor), 4, version=1)
    np.testing.assert_array_equal(values, tensor.dequantize())
    with pytest.raises(LayoutError, match=r"AWQ stores columns in the order of their groups, found g_idx"):
        AWQ.check(tensor.form)


@pytest.mark.parametrize("fmt", [GPTQ_V1, GPTQ_V2, AWQ], ids=lambda fmt: str(fmt.name))
@pytest.mark.parametrize("group_size", [32, 96])
def test_the_plan_is_what_is_packed(fmt: PackFormat, group_size: int) -> None:
    tensor = random_codes(4, group_size=group_size, symmetric=True)
    packed, planned = fmt.pack(_NAME, tensor, tensor.form), fmt.planned(_NAME, tensor.form)
    assert [(part.name, part.shape, DTYPES[part.dtype]) for part in planned] == [
        (name, part.shape, part.dtype) for name, part in packed.items()
    ]
    assert all(part.flags.c_contiguous for part in packed.values())


def test_version_1_refuses_a_zero_of_0_and_names_the_way_out() -> None:
    tensor = random_codes(4, symmetric=False)
    assert tensor.zero is not None
    tensor.zero[:] = 1
    GPTQ_V1.pack(_NAME, tensor, tensor.form)
    tensor.zero[3, 1] = 0
    with pytest.raises(LayoutError, match=r"'model.*weight': 1 groups have a zero of 0.*--format gptq_v2"):
        GPTQ_V1.pack(_NAME, tensor, tensor.form)
    GPTQ_V2.pack(_NAME, tensor, tensor.form)


def test_bfloat16_scales_are_stored_where_float16_holds_them() -> None:
    plain = random_codes(4, symmetric=True)
    scale = np.full(plain.scale.shape, 0.0078125, ml_dtypes.bfloat16)
    tensor = QuantizedTensor(plain.codes, scale, None, 4, 32)
    np.testing.assert_array_equal(read_gptq(_packed(GPTQ_V1, tensor), 4, version=1), tensor.dequantize())
    for bad in (1e-9, 1e6):
        scale[5, 2] = bad
        for fmt in (GPTQ_V1, AWQ):
            with pytest.raises(LayoutError, match=r"1 scales, first (9.96\d*e-10|999424), are not float16 numbers"):
                fmt.pack(_NAME, tensor, tensor.form)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_scales_that_are_not_finite_are_not_packed(bad: float) -> None:
    tensor = random_codes(4, symmetric=True)
    tensor.scale[0, 0] = bad
    with pytest.raises(LayoutError, match=r"1 scales, first (inf|nan), are not float16 numbers"):
        GPTQ_V1.pack(_NAME, tensor, tensor.form)


_REFUSED: list[tuple[PackFormat, dict[str, Any], str]] = [
    (GPTQ_V1, {"shape": (30, 64)}, r"32 rows and 32 columns .*; 30 rows"),
    (GPTQ_V2, {"shape": (32, 172)}, r"172 columns"),
    (GPTQ_V2, {"shape": (32, 0)}, r"0 columns"),
    (GPTQ_V2, {"input_bits": 8}, r"no quantized inputs; give --format compressed-tensors"),
    (GPTQ_V2, {"scale_type": "F32"}, r"scales in float16, found float32"),
    (AWQ, {"input_bits": 8}, r"no quantized inputs"),
    (AWQ, {"bits": 8}, r"AWQ stores 4 bits, found 8"),
    (AWQ, {"bits": 3}, r"AWQ stores 4 bits, found 3"),
    (AWQ, {"group_size": 16}, r"groups of 32, 64 or 128 columns or whole rows, found 16"),
    (AWQ, {"shape": (32, 96), "group_size": 64}, r"no shorter last group: 96 columns in groups of 64"),
    (AWQ, {"shape": (12, 64)}, r"8 rows into a word; 12"),
    (AWQ, {"ordered": True}, r"found g_idx"),
]


@pytest.mark.parametrize(("fmt", "changes", "message"), _REFUSED)
def test_what_cannot_be_stored_is_refused_before_anything_is_packed(
    fmt: PackFormat, changes: dict[str, Any], message: str
) -> None:
    form = QuantizedForm(**{"shape": (32, 64), "bits": 4, "group_size": 32, "symmetric": True, **changes})
    with pytest.raises(LayoutError, match=message) as caught:
        fmt.check(form)
    assert "\n" not in str(caught.value)


def test_forms_that_readers_have_are_accepted() -> None:
    for bits in BITS:
        for group_size in (16, 32, 64, 128, 256):
            for fmt in (GPTQ_V1, GPTQ_V2):
                fmt.check(QuantizedForm((32, 256), bits, group_size, True))
    for group_size in (32, 64, 128, 256):
        AWQ.check(QuantizedForm((8, 256), 4, group_size, False))
    assert isinstance(GPTQ_V1, GptqFormat)
