"""The tiled product in Triton's interpreter against float64 made of single bits, and its builds for real GPUs."""

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

from quantpress.kernels import tiled as module
from quantpress.kernels.launch import Launch, Problem
from quantpress.kernels.packed import PackedWeight
from quantpress.kernels.tiled import EXACT_ROWS, tiled, tiled_launch
from tests.kernels.packed_cases import framed_inputs, product, random_weight

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernel itself here")

SMALL = Launch("tiled", 16, 32, 64, 1)
SPLIT = Launch("tiled", 8, 16, 32, 3)

# rows_in, rows, columns, bits, group, launch; tiles that divide and that do not, all ways to share scales
CASES = {
    "tiles": (16, 64, 128, 4, 64, SMALL),
    "split": (5, 32, 256, 4, 128, SPLIT),
    "odd": (9, 37, 83, 4, 83, SPLIT),
    "tile is lowered to the group": (3, 17, 100, 4, 32, SMALL),
    "last group is short": (3, 33, 200, 2, 64, SPLIT),
    "any groups": (7, 33, 75, 4, 10, SPLIT),
    "a group for each place": (2, 16, 40, 8, 1, SPLIT),
    "three bits": (5, 40, 96, 3, 32, SPLIT),
    "three bits, odd": (5, 19, 107, 3, 107, SPLIT),
    "three bits, groups of half a tile": (5, 19, 64, 3, 16, SPLIT),
    "eight bits": (4, 40, 96, 8, 32, SPLIT),
    "more parts than tiles": (1, 8, 33, 4, 33, Launch("tiled", 8, 16, 32, 16)),
    "weights are rounded": (65, 40, 96, 4, 32, Launch("tiled", 32, 32, 32, 2)),
    "rounded, odd": (67, 33, 75, 3, 75, Launch("tiled", 64, 16, 32, 1)),
    "rounded, any groups": (65, 17, 45, 8, 7, Launch("tiled", 32, 16, 32, 2)),
    "several bands": (75, 20, 32, 2, 32, Launch("tiled", 8, 16, 32, 1)),
}


def _run(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, launch: Launch) -> torch.Tensor:
    out = torch.full((len(x), weight.rows), float("nan"), dtype=x.dtype)
    assert tiled(x, weight, bias, launch=launch, out=out) is out
    return out


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_the_product_is_that_of_float64_up_to_the_roundings(name: str, dtype: torch.dtype) -> None:
    rows_in, rows, columns, bits, group, launch = CASES[name]
    half = dtype == torch.float16
    weight = random_weight(rows, columns, bits, group, symmetric=half, scale=torch.float16 if half else torch.float32)
    x, bias = framed_inputs(rows_in, columns, dtype), torch.randn(rows).to(dtype)
    wanted, bound = product(x, weight, bias, rounded=rows_in > EXACT_ROWS)
    assert ((_run(x, weight, bias, launch).double() - wanted).abs() <= bound).all()


@pytest.mark.parametrize("name", CASES)
def test_whole_numbers_are_summed_exactly(name: str) -> None:
    rows_in, rows, columns, bits, group, launch = CASES[name]
    # |sum| <= 256 * 3 * 255 * 2 < 2^24: no operation rounds but the last
    weight = random_weight(rows, columns, bits, group, symmetric=False, ordered=True, whole=True, scale=torch.float32)
    x = framed_inputs(rows_in, columns, torch.float16, whole=True)
    wanted, _ = product(x, weight, None, rounded=False)
    assert torch.equal(_run(x, weight, None, launch), wanted.half())


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_and_tile_gives_the_exact_sum(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from([2, 3, 4, 8]))
    columns, rows = data.draw(st.integers(1, 100)), data.draw(st.integers(1, 40))
    group = min(columns, data.draw(st.one_of(st.integers(1, 130), st.sampled_from([16, 32, 64]))))
    rows_in = data.draw(st.sampled_from([1, 2, 7, 17, 64, 65]))
    block_n, block_k = data.draw(st.sampled_from([16, 32])), data.draw(st.sampled_from([32, 64]))
    launch = Launch("tiled", data.draw(st.sampled_from([8, 32])), block_n, block_k, data.draw(st.integers(1, 4)))
    weight = random_weight(rows, columns, bits, group, symmetric=data.draw(st.booleans()), whole=True)
    x = framed_inputs(rows_in, columns, torch.float16, whole=True)
    wanted, _ = product(x, weight, None, rounded=False)
    assert torch.equal(_run(x, weight, None, launch), wanted.to(torch.float16))


def test_weights_are_not_rounded_for_few_rows_and_are_for_many() -> None:
    # 2049/2048 * 3 has 13 bits: of float16 only the rounded product is a weight
    weight = random_weight(16, 32, 4, 32, scale=torch.float32)
    weight.scale.fill_(2049 / 2048)
    x = framed_inputs(65, 32, torch.float16)
    for rows_in, rounded in ((64, False), (65, True)):
        wanted, bound = product(x[:rows_in], weight, None, rounded=rounded)
        other, _ = product(x[:rows_in], weight, None, rounded=not rounded)
        found = _run(x[:rows_in], weight, None, SMALL).double()
        assert ((found - wanted).abs() <= bound).all()
        assert (found - wanted).abs().mean() < 0.9 * (found - other).abs().mean()


def test_bits_past_the_last_place_do_not_count_where_they_would_overflow() -> None:
    weight = random_weight(16, 33, 4, 33)
    weight.scale.fill_(60000)
    weight.words[:4] = -0x77777778  # all codes 8: weights of 0
    weight.words[4] = 0x77777778  # one more; codes of 7 follow
    x = torch.ones(65, 33, dtype=torch.float16)
    with np.errstate(over="ignore"):
        assert (_run(x, weight, None, SMALL) == 0).all()
        assert (_run(x[:3].contiguous(), weight, None, SMALL) == 0).all()


def test_parts_are_added_in_one_order_and_the_counters_are_left_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(module, "counters", lambda device, count: kept[:count])
    weight, x = random_weight(20, 256, 4, 64), framed_inputs(10, 256, torch.float32)
    first = _run(x, weight, None, SPLIT)
    assert (kept == 0).all()
    assert torch.equal(_run(x, weight, None, SPLIT), first)


def test_no_inputs_give_no_outputs() -> None:
    weight = random_weight(8, 32, 4, 32)
    assert tiled(torch.empty(0, 32), weight, launch=SMALL).shape == (0, 8)


def test_what_does_not_fit_is_refused_by_name() -> None:
    weight, x = random_weight(8, 32, 4, 32), torch.ones(2, 32)
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("x is", {"x": torch.ones(2, 31)}),
        ("x is", {"x": torch.ones(32, 2).T}),
        ("x is", {"x": torch.ones(2, 32, dtype=torch.float64)}),
        ("bias is", {"bias": torch.ones(9)}),
        ("bias is", {"bias": torch.ones(8, dtype=torch.float16)}),
        ("out is", {"out": torch.ones(8, 2).T}),
        ("block_n is 24", {"launch": Launch("tiled", 16, 24, 32)}),
        ("block_k is 8", {"launch": Launch("tiled", 16, 32, 8)}),
        ("block_m is 4", {"launch": Launch("tiled", 4, 32, 32)}),
    ]
    for message, changed in wrong:
        with pytest.raises(ValueError, match=message):
            tiled(**{"x": x, "weight": weight, "launch": SMALL, **changed})
    with pytest.raises(ValueError, match="block_k is 16"):
        tiled(x, random_weight(8, 32, 3, 32), launch=Launch("tiled", 16, 32, 16))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_launches_by_arithmetic_fit_what_they_are_for(dtype: str) -> None:
    for rows_in in (1, 8, 16, 33, 64, 65, 512):
        for columns, group in ((4096, 128), (96, 32), (50, 50), (64, 10)):
            problem = Problem(rows_in, 4096, columns, 4, group, dtype)
            launch = tiled_launch(problem)
            assert launch.kernel == "tiled"
            assert launch.split_k == 1 or columns // (launch.block_k * launch.split_k) >= 4
            if columns < 100:
                weight, x = random_weight(8, columns, 4, group), framed_inputs(3, columns, getattr(torch, dtype))
                wanted, bound = product(x, weight, None, rounded=False)
                assert ((_run(x, weight, None, launch).double() - wanted).abs() <= bound).all()


def test_the_builds_use_tensor_cores_and_wide_copies_and_spill_nothing() -> None:
    folder = Path(__file__).resolve().parent
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", str(folder / "compiling.py"), str(folder / "compile_tiled.py")]
    ran = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=folder.parents[1])
    for row in json.loads(ran.stdout):
        found, name = row["instructions"], f"{row['name']} for {row['arch']}"
        # 128 sums for each thread leave too few registers where the tensor cores take inputs from registers too
        assert row["stack"] == 0 or name == "many rows, 4 warps for 80", name
        assert row["shared"] <= (227 if row["arch"] == 90 else 163) << 10, name
        if name.startswith("dequantize"):
            assert any(key.startswith("STG.E.128") for key in found), name
            continue
        assert any(key.startswith("HGMMA" if row["arch"] == 90 else "HMMA") for key in found), name
        # copies of 16 bytes from memory, and of all codes of a word to where tensor cores read
        assert any(key.startswith("LDGSTS.E.BYPASS.128") for key in found) or "three" in name, name
        stored = found.get("STS.128", 0) + found.get("STS.64", 0)
        assert stored >= 4 or name == "three bits, one group for 80", name
        # numbers are made without conversions: what is left belongs to the division of program numbers
        assert not any(key.startswith(("I2F", "F2F.")) and key != "I2F.RP" for key in found), name
