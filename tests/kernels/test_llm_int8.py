"""LLM.int8(): the split of inputs and the product in Triton's interpreter, against bitsandbytes and float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not here: install the extra gpu")

from quantpress.kernels.int8 import llm_int8
from quantpress.kernels.int8 import plain as int8_plain
from quantpress.kernels.launch import Launch
from quantpress.kernels.workspace import counters
from quantpress.pipelines.rounded_inputs import llm_int8_inputs
from tests.kernels.int8_cases import LAUNCHES, ROUNDING, inputs, poisoned, weights

SHAPES = [(1, 1), (1, 131), (3, 31), (5, 128), (17, 257)]


def with_outliers(rows_in: int, columns: int, dtype: torch.dtype, count: int = 3) -> torch.Tensor:
    """Inputs of which some columns have an outlier in one of the rows; the limit itself is one, just below is none."""
    x = inputs(rows_in, columns, dtype).clamp(-5, 5)
    for number in range(min(count, columns)):
        x[number % rows_in, (number * 37 + columns - 1) % columns] = (6.0, -6.0, 70.0)[number % 3]
    x[0, 0] = torch.nextafter(torch.tensor(6.0, dtype=dtype), torch.zeros((), dtype=dtype))
    return x


def split(x: torch.Tensor, threshold: float = 6.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the kernels give, with the columns as they are listed."""
    codes, scale, kept = llm_int8.quantize_split(x, threshold)
    return codes, scale, kept[1 : 1 + int(kept[0])]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("rows_in", "columns"), SHAPES)
def test_codes_scales_and_columns_are_those_of_bitsandbytes(rows_in: int, columns: int, dtype: torch.dtype) -> None:
    pytest.importorskip("bitsandbytes")
    operator = torch.ops.bitsandbytes.int8_vectorwise_quant
    for count in (0, 1, 20):
        x = with_outliers(rows_in, columns, dtype, count)
        wanted, absmax, columns_kept = operator(x.clone(), 6.0)
        plain = int8_plain.reference_quantize_split(x)
        codes, scale, listed = split(x)
        assert torch.equal(codes, wanted)
        assert torch.equal(scale, absmax / 127)
        assert torch.equal(listed.long(), columns_kept)
        assert torch.equal(plain[0], codes)
        assert torch.equal(plain[1], scale)
        assert torch.equal(plain[2].nonzero().view(-1), columns_kept)


def test_rounded_inputs_are_those_that_the_judge_runs_a_model_with() -> None:
    x = with_outliers(5, 300, torch.float32, 7)
    codes, scale, listed = split(x)
    rounded = codes * scale[:, None]
    rounded[:, listed.long()] = x[:, listed.long()]
    assert torch.equal(rounded, llm_int8_inputs(x[None])[0])


def test_rows_longer_than_a_tile_are_taken_in_parts_and_columns_listed_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(llm_int8, "_BLOCK", 32)
    for columns in (31, 33, 100):
        x = with_outliers(9, columns, torch.float16, 40)
        codes, scale, listed = split(x)
        plain = int8_plain.reference_quantize_split(x)
        assert torch.equal(codes, plain[0])
        assert torch.equal(scale, plain[1])
        assert listed.tolist() == plain[2].nonzero().view(-1).tolist()


def test_counters_and_flags_are_left_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[torch.Tensor] = []

    def remember(device: torch.device, count: int) -> torch.Tensor:
        kept.append(counters(device, count))
        return kept[-1]

    monkeypatch.setattr(llm_int8, "counters", remember)
    split(with_outliers(4, 100, torch.float32, 9))
    assert len(kept) == 1
    assert not kept[0].any()


@pytest.mark.parametrize("greatest", [0.0, 1e-45, 1e-38, 1e-36, 3e38])
def test_the_least_and_the_greatest_scales_are_those_of_the_formula(greatest: float) -> None:
    x = torch.linspace(-1, 1, 33)[None] * greatest
    values = x.numpy()
    with np.errstate(all="ignore"):  # also for the interpreter, which is numpy
        codes, scale, listed = split(x, 0.0)
        steps = np.rint(values * (np.float32(1) / np.abs(values).max() * np.float32(127)))
    assert np.array_equal(codes.numpy(), np.nan_to_num(steps, nan=0, posinf=0, neginf=0))
    assert scale.item() == np.abs(values).max() / np.float32(127)
    assert not len(listed)
    if greatest < 6:
        assert torch.equal(codes * scale[:, None], llm_int8_inputs(x[None])[0])
    plain = int8_plain.reference_quantize_split(x, 0.0)
    assert torch.equal(codes, plain[0])
    assert torch.equal(scale, plain[1])


@pytest.mark.parametrize("launch", LAUNCHES)
def test_products_are_those_of_float64_within_the_roundings(launch: Launch) -> None:
    for rows_in, rows, columns in [(1, 1, 1), (1, 127, 129), (17, 65, 256), (33, 31, 97)]:
        for dtype, count in ((torch.float16, 0), (torch.float16, 40), (torch.float32, 2), (torch.float32, 20)):
            x = with_outliers(rows_in, columns, dtype, count)
            weight, scale, bias = weights(rows, columns)
            bias = bias.to(dtype)
            out = poisoned(rows_in, rows, dtype)
            assert llm_int8.llm_int8(x, weight, scale, bias, launch=launch, out=out) is out
            limit = bound(x, weight, scale, bias)
            assert ((out.double() - in_float64(x, weight, scale, bias)).abs() <= limit).all()
            plain = int8_plain.reference_llm_int8(x, weight, scale, bias)
            assert torch.equal(out, plain) if not count else ((out.double() - plain.double()).abs() <= 2 * limit).all()


def in_float64(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The formula, with the inputs as bitsandbytes rounds them."""
    codes, token_scale, columns = int8_plain.reference_quantize_split(x)
    rounded = torch.where(columns, x.double(), codes.double() * token_scale.double()[:, None])
    return rounded @ (weight.double() * scale.double()[:, None]).T + bias.double()


def bound(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """What float32 may do: the sum in int8 is rounded twice, each kept column adds once, products, scale and bias."""
    codes, token_scale, columns = int8_plain.reference_quantize_split(x)
    rounded = torch.where(columns, x.double().abs(), codes.double().abs() * token_scale.double()[:, None])
    size = rounded @ (weight.double().abs() * scale.double()[:, None]).T + bias.double().abs()
    return (int(columns.sum()) + 6) * 2.0**-24 * size + ROUNDING[x.dtype] * size


def test_the_product_is_that_of_bitsandbytes_up_to_its_roundings() -> None:
    pytest.importorskip("bitsandbytes")
    x = with_outliers(9, 256, torch.float16, 12)
    weight, scale, _ = weights(65, 256)
    absmax = (scale * 127).float()
    codes, token_absmax, columns = torch.ops.bitsandbytes.int8_vectorwise_quant(x.clone(), 6.0)
    wanted, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(x, codes, weight, token_absmax, absmax, columns, None)
    found = llm_int8.llm_int8(x, weight, absmax / 127)
    # it rounds the kept columns' weights, both products and their sum to float16, each by 2^-11 of what is added up
    size = x.double().abs() @ (weight.double().abs() * scale.double()[:, None]).T
    assert ((found.double() - wanted.double()).abs() <= 5 * 2.0**-11 * size).all()
    assert (found.double() - wanted.double()).abs().max() > 0


def test_a_limit_of_0_keeps_no_column() -> None:
    x = with_outliers(5, 64, torch.float32, 5)
    codes, _, listed = split(x, 0.0)
    assert not len(listed)
    assert codes[:, 63].abs().max() == 127


def test_what_is_not_finite_shows() -> None:
    x = inputs(3, 70, torch.float32)
    weight, scale, bias = weights(5, 70)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    for threshold, whole in ((6.0, False), (0.0, True)):
        with np.errstate(all="ignore"):
            found = llm_int8.llm_int8(x, weight, scale, bias, threshold=threshold)
        for result in (found, int8_plain.reference_llm_int8(x, weight, scale, bias, threshold)):
            assert result[1].isnan().all()
            assert not result[2].isfinite().any()
            assert result[0].isfinite().all()
            assert result[2].isnan().all() == whole


def test_nothing_comes_of_no_rows() -> None:
    weight, scale, _ = weights(5, 40)
    assert llm_int8.llm_int8(torch.empty(0, 40), weight, scale).shape == (0, 5)
    with pytest.raises(ValueError, match=r"x is torch\.int8"):
        llm_int8.quantize_split(weight)
