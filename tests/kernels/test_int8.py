"""W8A8: rounded inputs and products in Triton's interpreter, against compressed-tensors' rounding and whole numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not here: install the extra gpu")

from quantpress.convert.compressed_tensors.activations import round_inputs
from quantpress.kernels.int8 import plain as int8_plain
from quantpress.kernels.int8 import product as int8_product
from quantpress.kernels.int8 import w8a8 as int8
from quantpress.kernels.int8.product import int8_launch
from quantpress.kernels.launch import Launch, Problem
from quantpress.kernels.workspace import counters
from tests.kernels.int8_cases import LAUNCHES, inputs, poisoned, product, weights

ROOT = Path(__file__).resolve().parents[2]
SHAPES = [(1, 1), (1, 131), (3, 31), (5, 128), (4, 257), (3, 4099)]
# around tiles of 16 to 64 rows, 16 to 128 outputs and 32 to 128 columns; primes
SIZES = [(1, 1, 1), (1, 127, 129), (3, 17, 131), (17, 65, 256), (16, 128, 128), (33, 31, 97), (65, 129, 33)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("rows_in", "columns"), SHAPES)
def test_codes_and_scales_are_those_of_a_run_of_compressed_tensors(
    rows_in: int, columns: int, dtype: torch.dtype
) -> None:
    x = inputs(rows_in, columns, dtype)
    codes, scale = int8.quantize_tokens(x)
    assert torch.equal(codes.to(dtype) * scale.to(dtype)[:, None], round_inputs(x))
    assert rows_in < 3 or scale[1] == torch.finfo(dtype).eps == int8_plain.reference_quantize_tokens(x)[1][1]
    assert codes.amin() < -64 or codes.amax() > 64


def test_rows_longer_than_a_program_keeps_are_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "_WIDEST", 64)
    for columns in (63, 64, 65, 131, 192):
        for dtype in (torch.float16, torch.float32):
            x = inputs(4, columns, dtype)
            codes, scale = int8.quantize_tokens(x)
            assert torch.equal(codes.to(dtype) * scale.to(dtype)[:, None], round_inputs(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_plain_rounding_has_the_codes_of_compressed_tensors_in_every_type(dtype: torch.dtype) -> None:
    for rows_in, columns in SHAPES:
        x = inputs(rows_in, columns, dtype)
        codes, scale = int8_plain.reference_quantize_tokens(x)
        assert torch.equal(codes.to(dtype) * scale.to(dtype)[:, None], round_inputs(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_product_with_the_reciprocal_rounds_to_16_bits_as_the_quotient_does(dtype: torch.dtype) -> None:
    # the kernel's short cut for 16-bit types: all pairs of mantissas, which stand for all pairs of numbers
    bits = 10 if dtype == torch.float16 else 7
    mantissas = torch.arange(1 << bits, 2 << bits).to(dtype)
    for exponent in (0, -20, -133 + bits if dtype == torch.bfloat16 else -24):  # the last one is subnormal
        step = (mantissas.double() * 2.0**exponent).to(dtype)
        x = step[:, None]
        lift = torch.where(step.float() < 2.0**-60, 2.0**64, 1.0)
        found = ((x.float() * lift) * (1 / (step.float() * lift))).to(dtype)
        assert torch.equal(found, (x.double() / step.double()).to(dtype))


def test_sums_that_are_shared_leave_their_counters_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[torch.Tensor] = []

    def remember(device: torch.device, count: int) -> torch.Tensor:
        kept.append(counters(device, count))
        return kept[-1]

    monkeypatch.setattr(int8_product, "counters", remember)
    weight, scale, _ = weights(70, 200)
    int8.w8a8(inputs(3, 200, torch.float16), weight, scale, launch=LAUNCHES[1])
    assert len(kept) == 1
    assert not kept[0].any()


@pytest.mark.parametrize("exponent", [-24, -20, -14, 0, 8])
def test_ties_and_subnormal_scales_are_rounded_as_ieee_says(exponent: int) -> None:
    steps = torch.arange(-255, 256) / 2  # halves: as many ties as there are codes
    x = (steps * 2.0**exponent).to(torch.float16)[None]
    codes, scale = int8.quantize_tokens(x)
    assert torch.equal(codes.half() * scale.half()[:, None], round_inputs(x))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_not_finite_comes_out_as_nan(value: float) -> None:
    x = inputs(3, 70, torch.float16)
    x[2, 69] = value
    weight, scale, bias = weights(5, 70)
    with np.errstate(invalid="ignore"):  # the interpreter is numpy
        found = int8.w8a8(x, weight, scale, bias)
    for result in (found, int8_plain.reference_w8a8(x, weight, scale, bias)):
        assert result[2].isnan().all()
        assert result[:2].isfinite().all()


@pytest.mark.parametrize("launch", LAUNCHES)
def test_products_have_the_bits_of_the_formula_whatever_the_launch(launch: Launch) -> None:
    for number, (rows_in, rows, columns) in enumerate(SIZES):
        dtype = (torch.float16, torch.float32)[number % 2]
        weight, scale, bias = weights(rows, columns)
        codes, token_scale = int8_plain.reference_quantize_tokens(inputs(rows_in, columns, dtype))
        given = bias.to(dtype) if number % 3 else None
        out = poisoned(rows_in, rows, dtype)
        result = int8.int8_matmul(codes, token_scale, weight, scale, given, dtype, launch=launch, out=out)
        assert result is out
        assert torch.equal(out, product(codes, token_scale, weight, scale, given, dtype))


def test_sums_of_the_greatest_products_do_not_overflow() -> None:
    columns = int8_plain.LONGEST
    codes = torch.full((1, columns), -128, dtype=torch.int8)
    one = torch.ones(1)
    launch = Launch("tiled", 16, 16, 2048, 4, 4, 1)
    found = int8.int8_matmul(codes, one, codes, one, None, torch.float32, launch=launch)
    assert found.item() == float(np.float32(columns * 2**14))
    assert int8_plain.int8_sums(codes, codes).item() == columns * 2**14
    longer = torch.zeros(1, columns + 1, dtype=torch.int8)
    with pytest.raises(ValueError, match="131072 columns: wanted 1 to 131071"):
        int8.int8_matmul(longer, one, longer, one)


@pytest.mark.parametrize("exact", [True, False])
def test_sums_on_a_processor_are_exact_with_and_without_its_int8_products(
    exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exact:
        monkeypatch.setattr(int8_plain, "_int_mm_is_exact", lambda: False)
    monkeypatch.setattr(int8_plain, "_BLOCK", 3 * 1024)
    for rows_in, rows, columns in [*SIZES, (0, 3, 8), (2, 0, 8), (2, 7, 2500)]:
        codes = weights(rows_in, columns)[0]
        weight = weights(rows, columns)[0]
        if rows_in and rows:
            codes[0], weight[0] = 127, 127  # odd products: float32 holds 1040 of them
        wanted = codes.numpy().astype(np.int64) @ weight.numpy().astype(np.int64).T
        assert np.array_equal(int8_plain.int8_sums(codes, weight).numpy(), wanted)


def test_the_whole_layer_is_the_formula_on_compressed_tensors_inputs() -> None:
    for rows_in, rows, columns in SIZES:
        x = inputs(rows_in, columns, torch.float16)
        weight, scale, bias = weights(rows, columns)
        scale, bias = scale.half(), bias.half()
        rounded = round_inputs(x.clone())
        step = int8_plain.reference_quantize_tokens(x)[1]
        codes = (rounded.double() / step.double()[:, None]).round().to(torch.int8)
        wanted = product(codes, step, weight, scale, bias, torch.float16)
        assert torch.equal(int8.w8a8(x, weight, scale, bias), wanted)
        assert torch.equal(int8_plain.reference_w8a8(x, weight, scale, bias), wanted)


def test_nothing_comes_of_no_rows_and_of_no_outputs() -> None:
    weight, scale, _ = weights(5, 40)
    assert int8.w8a8(torch.empty(0, 40, dtype=torch.float16), weight, scale).shape == (0, 5)
    assert int8.w8a8(inputs(2, 40, torch.float16), weight[:0], scale[:0]).shape == (2, 0)


def test_what_does_not_fit_is_refused_before_a_launch() -> None:
    weight, scale, bias = weights(5, 40)
    codes, token_scale = torch.zeros(3, 40, dtype=torch.int8), torch.ones(3)
    with pytest.raises(ValueError, match=r"x is torch\.float64"):
        int8.quantize_tokens(torch.zeros(2, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="contiguous"):
        int8.quantize_tokens(torch.zeros(8, 2).T)
    wrong: list[tuple[int, torch.Tensor, str]] = [
        (0, codes[:, :39], r"codes \(3, 39\) and weight \(5, 40\)"),
        (1, token_scale[:2], "token_scale is"),
        (1, token_scale.half(), "token_scale is torch.float16"),
        (2, weight.short(), "weight is torch.int16"),
        (2, torch.zeros(40, 5, dtype=torch.int8).T, "weight has gaps"),
        (3, scale[:4], "scale is"),
        (4, bias.double(), "bias is torch.float64"),
        (2, weight.to("meta"), "cpu, meta: wanted one device"),
    ]
    for place, tensor, message in wrong:
        arguments = [codes, token_scale, weight, scale, bias]
        arguments[place] = tensor
        with pytest.raises(ValueError, match=message):
            int8.int8_matmul(*arguments, torch.float32)
    with pytest.raises(ValueError, match=r"out is torch\.float16"):
        int8.int8_matmul(codes, token_scale, weight, scale, bias, torch.float32, out=torch.zeros(3, 5).half())


@pytest.mark.parametrize("capability", [8, 9])
@pytest.mark.parametrize("rows_in", [1, 16, 33, 64, 65, 256, 4096])
def test_launches_by_arithmetic_fit_a_gpu_and_leave_no_program_idle(rows_in: int, capability: int) -> None:
    limit = {8: 163 * 1024, 9: 227 * 1024}[capability]
    for columns, rows in [(4096, 6144), (4096, 4096), (14336, 4096), (8192, 57344), (18944, 3584), (1, 1), (100, 7)]:
        launch = int8_launch(Problem(rows_in, rows, columns, 8, columns, "bfloat16", kind="w8a8"), 132, capability)
        assert launch.stages * (launch.block_m + launch.block_n) * launch.block_k <= limit
        assert launch.split_k == 1 or launch.split_k * 4 * launch.block_k <= columns + 4 * launch.block_k
        assert capability == 9 or launch.block_n <= 128
        if rows * columns >= 1 << 24 and rows_in <= 64:  # 2 stages of each program's weights are under way
            programs = -(-rows // launch.block_n) * launch.split_k / 132
            assert programs * (launch.stages - 1) * launch.block_n * launch.block_k > 20_000


def test_compiled_for_gpus_it_runs_on_tensor_cores_without_spills() -> None:
    script, cases = Path(__file__).with_name("compiling.py"), Path(__file__).with_name("compile_int8.py")
    plain = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, str(script), str(cases)], check=True, cwd=ROOT, env=plain, capture_output=True
    )
    for found in json.loads(ran.stdout):
        name, counts = (found["name"], found["arch"]), found["instructions"]
        assert found["stack"] == 0 or ("wide" in found["name"] and found["arch"] == 80), name
        assert found["shared"] <= (163 if found["arch"] == 80 else 227) * 1024, name
        if "product" in found["name"]:
            kinds = {kind.split(".")[0] for kind in counts if "MMA" in kind}
            grouped = found["arch"] == 90 and "one row" not in found["name"]  # warp groups multiply 64 rows
            assert ("IGMMA" if grouped else "IMMA") in kinds, name
            assert any(kind.startswith("LDGSTS") and kind.endswith(".128") for kind in counts), name
            assert ("HGMMA" if grouped else "HMMA") in kinds or "kept" not in found["name"], name
        elif "rounding" in found["name"]:
            assert any(kind.startswith("LDG.E.128") for kind in counts), name
