"""Products with 4-bit levels in Triton's interpreter, against the formula in float64 and bitsandbytes itself."""

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

from quantpress.kernels.launch import Launch, Problem
from quantpress.kernels.nf4.matmul import nf4_dequantize, nf4_launch, nf4_matmul, reference_nf4_dequantize
from tests.kernels.nf4_cases import Case, case, check, dense

ROOT = Path(__file__).resolve().parents[2]
HALF, SINGLE, BRAIN = torch.float16, torch.float32, torch.bfloat16


def _product(one: Case, launch: Launch | None, rounding: torch.dtype | None = None) -> torch.Tensor:
    out = one.poison()
    found = nf4_matmul(one.x, *one.weight, one.bias, launch=launch, rounding=rounding, out=out)
    assert found is out
    return found


# rows around a block of outputs; one quad, a quad more and less than a step, several steps; blocks longer than a row
@pytest.mark.parametrize(
    ("rows_in", "rows", "columns", "blocksize", "dtype", "launch"),
    [
        (1, 1, 32, 64, HALF, Launch("gemv", block_n=1, warps=1)),
        (1, 7, 992, 64, SINGLE, Launch("gemv", block_n=8, warps=1)),
        (1, 9, 1056, 32, HALF, Launch("gemv", block_n=8, warps=1)),
        (1, 5, 2080, 4096, SINGLE, Launch("gemv", block_n=2, warps=2)),
        (2, 3, 1024, 128, HALF, Launch("gemv", block_n=4, warps=1)),
        (3, 6, 96, 64, HALF, Launch("gemv", block_n=4, warps=1)),
        (4, 13, 1088, 64, SINGLE, Launch("gemv", block_n=8, warps=1)),
        (4, 5, 4096, 64, HALF, Launch("gemv", block_n=8, warps=1, split_k=4)),
        (1, 5, 3584, 64, HALF, Launch("gemv", block_n=4, warps=1, split_k=3)),
    ],
)
def test_a_vector_product_is_the_formula_with_float32_sums_and_no_rounded_weights(
    rows_in: int, rows: int, columns: int, blocksize: int, dtype: torch.dtype, launch: Launch
) -> None:
    for bias in (False, True):
        one = case(rows_in, rows, columns, blocksize, dtype, bias=bias)
        check(_product(one, launch), one, None)


@pytest.mark.parametrize(
    ("rows_in", "rows", "columns", "blocksize", "dtype", "launch"),
    [
        (5, 33, 96, 64, HALF, Launch("tiled", 16, 32, 32, 1, 4, 3)),
        (17, 70, 352, 64, HALF, Launch("tiled", 16, 32, 64, 3, 4, 3)),
        (16, 31, 128, 4096, SINGLE, Launch("tiled", 16, 32, 32, 2, 4, 3)),
        (65, 64, 64, 32, SINGLE, Launch("tiled", 32, 64, 64, 1, 4, 3)),
        (131, 40, 160, 128, HALF, Launch("tiled", 16, 32, 128, 1, 4, 3)),  # more blocks of inputs than a band
    ],
)
def test_tiles_multiply_weights_rounded_to_the_type_of_the_inputs(
    rows_in: int, rows: int, columns: int, blocksize: int, dtype: torch.dtype, launch: Launch
) -> None:
    one = case(rows_in, rows, columns, blocksize, dtype, bias=rows_in % 2 == 1)
    check(_product(one, launch), one, dtype)


@pytest.mark.parametrize(("rows_in", "rows", "columns", "blocksize"), [(1, 1, 1, 64), (3, 5, 31, 32), (7, 9, 333, 64)])
def test_any_number_of_columns_will_do(rows_in: int, rows: int, columns: int, blocksize: int) -> None:
    for dtype in (HALF, SINGLE):
        one = case(rows_in, rows, columns, blocksize, dtype, bias=True)
        check(_product(one, None), one, None)


@pytest.mark.parametrize("rounding", [HALF, BRAIN])
@pytest.mark.parametrize(
    ("rows_in", "columns", "launch"),
    [
        (2, 96, Launch("gemv", block_n=4, warps=1)),
        (5, 96, Launch("tiled", 16, 32, 32, 1, 4, 3)),
        (2, 33, None),
    ],
)
def test_weights_are_rounded_to_a_stored_type_where_that_is_asked_for(
    rows_in: int, columns: int, launch: Launch | None, rounding: torch.dtype
) -> None:
    one = case(rows_in, 6, columns, 64, SINGLE)
    check(_product(one, launch, rounding), one, rounding)


@pytest.mark.parametrize("rounding", [HALF, BRAIN])
@pytest.mark.parametrize(
    "launch", [Launch("gemv", block_n=2, warps=1), Launch("tiled", 16, 16, 32, 1, 4, 3), Launch("dense")]
)
def test_a_weight_half_way_between_two_values_becomes_the_even_one(launch: Launch, rounding: torch.dtype) -> None:
    one = case(2, 4, 64, 32, SINGLE)
    one.packed.fill_(0xFF)  # level 1, so the weights are absmax: 1 and an odd number of half steps above
    one.absmax.copy_(1 + (2 * torch.arange(8) + 1) * torch.finfo(rounding).eps / 2)
    check(_product(one, launch, rounding), one, rounding)


def test_the_counters_are_zero_again_after_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr("quantpress.kernels.slabs.counters", lambda device, count: kept)
    one = case(3, 20, 2048, 64, SINGLE)
    for launch in (Launch("gemv", block_n=8, warps=1, split_k=2), Launch("tiled", 16, 32, 64, 4, 4, 3)):
        check(_product(one, launch), one, None)
        assert not kept.any()


def test_dense_rounds_and_multiplies_as_torch_does() -> None:
    one = case(6, 9, 64, 64, SINGLE, bias=True)
    half = Case(one.x.half(), *one.weight[:3], one.bias.half(), 9, 64, 64)  # type: ignore[union-attr]
    # torch on processors may add float16 in float32 and round between, or not: as many roundings as there are products
    check(_product(half, Launch("dense")), half, HALF, weights=64 * 2.0**-11)
    check(_product(one, Launch("dense")), one, SINGLE)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize(("rows", "columns", "blocksize"), [(2, 5, 32), (34, 65, 64), (7, 1024, 1024), (64, 96, 128)])
def test_the_dense_matrix_has_the_bits_of_bitsandbytes(
    rows: int, columns: int, blocksize: int, dtype: torch.dtype, kind: str
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not here")
    one = case(1, rows, columns, blocksize, dtype, kind=kind)
    # as one row: with several, its kernel for processors takes wrong absmax where blocks do not divide the columns
    state = functional.QuantState(
        absmax=one.absmax, shape=torch.Size((rows * columns,)), code=one.levels, blocksize=blocksize, quant_type=kind,
        dtype=dtype,
    )  # fmt: skip
    wanted = functional.dequantize_4bit(one.packed.view(-1, 1), state).view(rows, columns)
    found = nf4_dequantize(*one.weight, dtype, out=torch.full((rows, columns), torch.nan, dtype=dtype))
    assert torch.equal(found, wanted)
    assert torch.equal(reference_nf4_dequantize(*one.weight, dtype), wanted)


@pytest.mark.parametrize(("rows", "columns", "blocksize"), [(1, 1, 64), (3, 5, 32), (33, 127, 64), (3, 1365, 4096)])
def test_an_odd_number_of_values_makes_the_same_dense_matrix(rows: int, columns: int, blocksize: int) -> None:
    one = case(1, rows, columns, blocksize, SINGLE)
    found = nf4_dequantize(*one.weight, SINGLE, out=torch.full((rows, columns), torch.nan))
    assert np.array_equal(found.numpy(), dense(one, SINGLE))
    assert np.array_equal(reference_nf4_dequantize(*one.weight, torch.float64, 1).numpy(), dense(one)[1:])


def test_two_runs_with_shared_sums_give_the_same_bits() -> None:
    one = case(3, 20, 2048, 64, SINGLE)
    for launch in (Launch("gemv", block_n=8, warps=1, split_k=2), Launch("tiled", 16, 32, 64, 4, 4, 3)):
        assert torch.equal(_product(one, launch), _product(one, launch))


def test_without_input_rows_there_is_no_launch() -> None:
    one = case(0, 5, 32, 64, HALF)
    assert _product(one, None).shape == (0, 5)


@pytest.mark.parametrize("rows", [1, 1024, 4096, 28672])
@pytest.mark.parametrize("columns", [96, 3584, 28672])
@pytest.mark.parametrize("rows_in", [1, 4, 5, 64, 256, 257, 4096])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_default_launches_are_within_what_the_kernels_take(rows: int, columns: int, rows_in: int, dtype: str) -> None:
    launch = nf4_launch(Problem(rows_in, rows, columns, 4, 64, dtype, kind="nf4"))
    assert (launch.kernel == "gemv") == (rows_in <= 4)
    assert launch.kernel != "dense" or dtype == "bfloat16"
    if launch.kernel == "gemv":
        assert launch.block_n in (2, 4, 8)
        assert (launch.split_k - 1) * launch.warps * 1024 < columns
    assert 1 <= launch.split_k <= 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": torch.zeros(191, dtype=torch.uint8)}, "packed is .*191.* wanted .*192"),
        ({"absmax": torch.zeros(6, dtype=HALF)}, "absmax is .*float16"),
        ({"levels": torch.zeros(8)}, "levels is"),
        ({"blocksize": 48}, "blocks of 48"),
        ({"x": torch.zeros(2, 95)}, "x is .*95"),
        ({"x": torch.zeros(2, 96, dtype=torch.float64)}, "x is .*float64"),
        ({"x": torch.zeros(96, 2).T}, "contiguous"),
        ({"bias": torch.zeros(4, dtype=HALF)}, "bias is .*float16"),
        ({"out": torch.zeros(2, 5)}, "out is"),
        ({"rounding": SINGLE}, "rounding to"),
        ({"launch": Launch("gemv"), "x": torch.zeros(5, 96)}, "gemv takes up to 4"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    one = case(2, 4, 96, 64, SINGLE)
    given = {"x": one.x, "packed": one.packed, "absmax": one.absmax, "levels": one.levels, "rows": 4, "columns": 96}
    with pytest.raises(ValueError, match=message):
        nf4_matmul(**(given | {"blocksize": 64} | change))  # type: ignore[arg-type]


def test_compiled_for_gpus_nothing_spills_loads_are_wide_and_tiles_use_tensor_cores() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "tests/kernels/compiling.py", "tests/kernels/compile_nf4.py"]
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    rows = json.loads(ran.stdout)
    assert len(rows) == 2 * 6
    for row in rows:
        found, name = row["instructions"], f"{row['name']} {row['arch']}"
        assert row["stack"] == 0, name
        assert row["shared"] <= (227 if row["arch"] == 90 else 163) << 10, name
        kinds = {key.split(".")[0] for key in found}
        if name.startswith("tiled") and "fp32" not in name:
            assert kinds & {"HMMA", "HGMMA"}, name
            assert "LDGSTS" in kinds, name
        if name.startswith("gemv"):
            # codes of each row, and the inputs in four parts: 16 bytes a thread
            wide = sum(count for key, count in found.items() if key.startswith("LDG") and ".128" in key)
            assert wide >= 4 + 4 * 2, name
            assert row["registers"] <= 168, name
        if name.startswith("gemv fp16 m1"):
            # 8 rows of 32 weights in the loop, and everything around it: 5.3 instructions per weight at most
            assert sum(found.values()) <= 8 * 32 * 5.3, name
            # no copies through shared memory but of the results
            assert sum(count for key, count in found.items() if key.startswith("STS")) <= 4, name
