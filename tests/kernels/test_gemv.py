"""Products of few input rows in Triton's interpreter against float64 made of single bits, and their builds for GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not here: install the extra gpu")

from quantpress.kernels import gemv as module
from quantpress.kernels.gemv import gemv, gemv_launch, reference_gemv
from quantpress.kernels.launch import Launch, Problem
from quantpress.kernels.packed import PackedWeight
from tests.kernels.packed_cases import framed_inputs, product, random_weight

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernel itself here")

ONE_WARP = Launch("gemv", 1, 16, 64, 1, warps=1, stages=1)
PARTS = Launch("gemv", 1, 64, 64, 3, warps=2, stages=3)
WIDE = Launch("gemv", 1, 128, 128, 2, warps=4, stages=1)

# outputs and places: 1, one below and above blocks, primes, sizes that blocks divide
SIZES = [(1, 1), (16, 64), (15, 63), (17, 65), (64, 192), (37, 131)]
# outputs, places, group: what tiles, words or neither divide, one for all, one for each place, a short last one
GROUPS = [(16, 256, 128), (64, 64, 32), (33, 130, 64), (20, 100, 40), (18, 96, 17), (5, 33, 1), (7, 45, 45)]


def _run(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, launch: Launch) -> torch.Tensor:
    out = torch.full((len(x), weight.rows), float("nan"), dtype=x.dtype)
    assert gemv(x, weight, bias, launch=launch, out=out) is out
    return out


def _exact(
    rows_in: int, rows: int, columns: int, bits: int, group: int, launch: Launch, *, symmetric: bool = True,
    ordered: bool = False,
) -> None:  # fmt: skip
    # |sum| <= 256 * 3 * 255 * 2 < 2^24: no operation rounds but the last
    weight = random_weight(rows, columns, bits, group, whole=True, symmetric=symmetric, ordered=ordered)
    x = framed_inputs(rows_in, columns, torch.float16, whole=True)
    bias = torch.arange(rows).half()
    wanted, _ = product(x, weight, bias, rounded=False)
    assert torch.equal(_run(x, weight, bias, launch), wanted.to(x.dtype))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_whole_numbers_are_summed_exactly_whatever_the_sizes(bits: int) -> None:
    for number, (rows, columns) in enumerate(SIZES):
        launch = (ONE_WARP, PARTS, WIDE)[(number + bits) % 3]
        _exact(1 + number % 4, rows, columns, bits, columns, launch, symmetric=number % 2 == 0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_whole_numbers_are_summed_exactly_whatever_the_groups(bits: int) -> None:
    for number, (rows, columns, group) in enumerate(GROUPS):
        # three bits take four times as long: every other group with zeros
        for symmetric in (True, False) if bits != 3 else (number % 2 == 0,):
            launch = ONE_WARP if symmetric else PARTS
            rows_in = 2 if number == bits % 4 else 1
            _exact(rows_in, rows, columns, bits, group, launch, symmetric=symmetric, ordered=number % 3 == 0)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_and_launch_gives_the_exact_sum(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from([2, 3, 4, 8]))
    rows, columns = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 100))
    sizes = st.one_of(st.integers(1, columns), st.sampled_from([8, 16, 32, 64]).filter(lambda size: size <= columns))
    group = data.draw(sizes if columns >= 8 else st.integers(1, columns))
    launch = Launch(
        "gemv", 1, data.draw(st.sampled_from([16, 32, 64])), data.draw(st.sampled_from([32, 64, 128])),
        data.draw(st.integers(1, 5)), data.draw(st.sampled_from([1, 2, 4])), data.draw(st.sampled_from([1, 3])),
    )  # fmt: skip
    flags = {"symmetric": data.draw(st.booleans()), "ordered": data.draw(st.booleans())}
    _exact(data.draw(st.integers(1, 4)), rows, columns, bits, group, launch, **flags)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_small_shapes_of_real_models_differ_from_float64_by_the_roundings_of_sums(bits: int) -> None:
    # K and N of Llama-3-8B and Qwen2.5-7B divided by 32 and 128, with launches for a device of few multiprocessors
    for number, (columns, rows) in enumerate([(128, 224), (448, 32), (112, 36), (592, 28)]):
        dtype, symmetric = (torch.float16, torch.float32)[number % 2], number < 2
        launch = gemv_launch(Problem(1, rows, columns, bits, 32, str(dtype)[6:], symmetric), 2)
        weight = random_weight(rows, columns, bits, 32, symmetric=symmetric, scale=torch.float32)
        x, bias = framed_inputs(1, columns, dtype), torch.randn(rows).to(dtype)
        wanted, bound = product(x, weight, bias, rounded=False)
        assert ((_run(x, weight, bias, launch).double() - wanted).abs() <= bound).all()
        assert ((reference_gemv(x, weight, bias).double() - wanted).abs() <= bound).all()


def test_weights_are_not_rounded() -> None:
    # 2049/2048 * 3 has 13 bits, two more than float16 keeps; of such weights the sum is exact in float32
    weight = random_weight(32, 128, 4, 64, scale=torch.float32)
    weight.scale.fill_(2049 / 2048)
    x = framed_inputs(2, 128, torch.float16, whole=True).float()
    wanted, _ = product(x, weight, None, rounded=False)
    assert torch.equal(_run(x, weight, None, PARTS).double(), wanted)


def test_a_result_is_rounded_once_to_the_type_of_x() -> None:
    # 2049 and 3 lie halfway between two float16 numbers each way; ties go to even, after the bias is added
    weight = random_weight(16, 8, 8, 8)
    weight.scale.fill_(1)
    weight.words.fill_(0x81818181 - (1 << 32))  # all codes 1 above the zero
    x = torch.tensor([[2048, 1, 0, 0, 0, 0, 0, 0], [2048, 0, 0, 0, 0, 0, 0, 1.25]]).half()
    found = _run(x, weight, torch.full((16,), 2.0).half(), ONE_WARP)
    assert (found[0] == 2052).all()  # 2051, of 2050 and 2052
    assert (found[1] == 2052).all()  # 2051.25


def test_what_is_not_finite_stays_in_its_row() -> None:
    weight, x = random_weight(20, 96, 4, 32), framed_inputs(3, 96, torch.float32, whole=True)
    alone = _run(x[:1].contiguous(), weight, None, PARTS)
    x[1, 5], x[2, 95] = float("nan"), float("inf")
    with np.errstate(invalid="ignore"):  # inf * 0
        found = _run(x, weight, None, PARTS)
    assert torch.equal(found[:1], alone)
    assert found[1].isnan().all()
    assert not found[2].isfinite().any()


def test_programs_that_share_a_sum_give_the_same_bits_and_leave_the_counters_at_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(module, "counters", lambda device, count: kept[:count])
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **more: empty(*shape, **more).fill_(float("nan")))
    weight, x = random_weight(70, 256, 4, 32), framed_inputs(3, 256, torch.float32)
    runs = [gemv(x, weight, launch=PARTS, deterministic=flag) for flag in (True, False, True)]
    assert (kept == 0).all()
    assert all(torch.equal(run, runs[0]) for run in runs)
    wanted, bound = product(x, weight, None, rounded=False)
    assert ((runs[0].double() - wanted).abs() <= bound).all()


def test_nothing_in_gives_nothing_out() -> None:
    assert gemv(torch.empty(0, 64), random_weight(8, 64, 4, 32), launch=ONE_WARP).shape == (0, 8)
    nothing = PackedWeight(torch.empty((8, 0), dtype=torch.int32), torch.empty((2, 0)), None, None, 64, 4, 32)
    assert gemv(torch.empty(2, 64), nothing, launch=ONE_WARP).shape == (2, 0)


def test_what_does_not_fit_is_refused_by_name() -> None:
    weight, x = random_weight(8, 64, 4, 32), torch.ones(2, 64)
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("x has 5 rows: at most 4", {"x": torch.ones(5, 64)}),
        ("x is .*wanted .M, 64.", {"x": torch.ones(2, 63)}),
        ("x is .*contiguous", {"x": torch.ones(64, 2).T}),
        ("x is .*float64", {"x": torch.ones(2, 64, dtype=torch.float64)}),
        ("bias is", {"bias": torch.ones(9)}),
        ("bias is", {"bias": torch.ones(8, dtype=torch.float16)}),
        ("out is", {"out": torch.ones(2, 9)}),
        ("out is", {"out": torch.ones(8, 2).T}),
        ("powers of two", {"launch": Launch("gemv", 1, 24, 64)}),
        ("powers of two", {"launch": Launch("gemv", 1, 32, 48)}),
        ("16 or more outputs", {"launch": Launch("gemv", 1, 8, 64)}),
        ("one split", {"launch": Launch("gemv", 1, 32, 64, 0)}),
        ("read 8 at a time", {"launch": Launch("gemv", 1, 32, 4)}),
        ("tensors are on cpu, meta", {"x": torch.ones(2, 64, device="meta")}),
    ]
    for message, changed in wrong:
        with pytest.raises(ValueError, match=message):
            gemv(**{"x": x, "weight": weight, "launch": ONE_WARP, **changed})


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_launches_by_arithmetic_read_16_bytes_a_load_and_occupy_the_device(bits: int) -> None:
    for rows_in in (1, 2, 3, 4):
        for columns, rows in ((4096, 28672), (4096, 4096), (14336, 4096), (8192, 57344), (3584, 4608)):
            launch = gemv_launch(Problem(rows_in, rows, columns, bits, 128, "bfloat16"))
            units = launch.block_k * bits // (96 if bits == 3 else 32)
            assert units * min(16 * launch.warps, launch.block_n) >= 4 * 32 * launch.warps
            blocks, tiles = -(-rows // launch.block_n), -(-columns // launch.block_k)
            assert launch.split_k <= tiles
            assert blocks * launch.split_k >= min(3 * 132, blocks * tiles // 2)
    assert gemv_launch(Problem(1, 1, 1, bits, 1, "float16")).split_k == 1


def test_builds_spill_nothing_load_16_bytes_and_need_few_instructions() -> None:
    folder = Path(__file__).resolve().parent
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", str(folder / "compiling.py"), str(folder / "compile_gemv.py")]
    ran = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=folder.parents[1])
    for row in json.loads(ran.stdout):
        found, name = row["instructions"], f"{row['name']} for {row['arch']}"
        assert row["stack"] == 0, name
        assert row["shared"] <= 48 << 10, name
        ahead = "stages=3" in name
        assert any(key.startswith("LDGSTS.E.BYPASS.128" if ahead else "LDG.E.128") for key in found), name
        # no code is converted, which is slow: only zeros are, one each for the outputs of a thread and a tile
        assert sum(number for key, number in found.items() if key.startswith("I2F")) <= 24 * ("zeros" in name), name
    first = json.loads(ran.stdout)[1]
    # 128 weights of a thread: one multiply-add and one conversion each (a subtraction for the lowest code), one mask;
    # constants that are moved about for each weight would show
    assert (first["arch"], first["instructions"]["LDG.E.128"]) == (90, 4)
    assert sum(first["instructions"][key] for key in ("FFMA", "LOP3.LUT", "SHF.R.U32.HI")) <= 3.4 * 128
    assert sum(first["instructions"].values()) <= 128 * 4 + 400
