"""Candidates fit the device as compiled, run, and are no more than the shape has room for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not here: install the extra gpu")

from quantpress.kernels.launch import Launch, Problem
from quantpress.kernels.tuning.candidates import H200, candidates, shared_bytes
from quantpress.kernels.tuning.choice import choose
from quantpress.kernels.tuning.product_kinds import KINDS
from quantpress.kernels.tuning.products import Products, random_weight, weight_bytes
from quantpress.kernels.tuning.search import Refused

LAYER = Problem(1, 4096, 4096, 4, 128, "bfloat16")
A100 = replace(H200, name="NVIDIA A100", capability=(8, 0), processors=108, shared_bytes=166912, cache_bytes=40 << 20)
HERE = Path(__file__).parent
SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096]


def test_shared_memory_is_what_the_compiler_takes() -> None:
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / "compiling.py"), str(HERE / "compile_candidates.py")]
    ran = subprocess.run(command, capture_output=True, text=True, env=kept, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    reports = json.loads(ran.stdout)
    assert len(reports) == 6
    for report in reports:
        problem, launch = json.loads(report["name"])
        said = shared_bytes(Problem(**problem), Launch(**launch), H200 if report["arch"] == 90 else A100)
        # never less, or a launch would fail; at most 512 bytes and an eighth more, for what the compiler finds unused
        assert report["shared"] <= said <= report["shared"] * 1.125 + 512, report["name"]
        assert report["stack"] == 0, report["name"]


@pytest.mark.parametrize("rows_in", SIZES)
@pytest.mark.parametrize("device", [H200, A100])
def test_candidates_are_different_fit_the_device_and_stay_within_groups(rows_in: int, device: object) -> None:
    for shape in ((4096, 4096), (28672, 4096), (4096, 14336)):
        problem = replace(LAYER, rows_in=rows_in, rows=shape[0], columns=shape[1])
        found = candidates(problem, device)
        assert 50 <= len(found) == len(set(found)) < 2000
        assert all(shared_bytes(problem, launch, device) <= device.shared_bytes for launch in found)
        tiles = [launch for launch in found if launch.kernel == "tiled"]
        assert all(problem.group_size % launch.block_k == 0 for launch in tiles)
        assert all(launch.block_m < 2 * max(rows_in, 8) for launch in tiles)
        assert all(launch.block_m * launch.block_n <= 128 * 32 * launch.warps for launch in tiles)
        assert bool(tiles) == (rows_in > 1)
        assert ("gemv" in {launch.kernel for launch in found}) == (rows_in <= 4)
        assert ("dense" in {launch.kernel for launch in found}) == (rows_in > 64)


def test_a_device_with_little_shared_memory_gets_fewer_candidates() -> None:
    problem = replace(LAYER, rows_in=256)
    small = replace(H200, shared_bytes=48 << 10)
    assert set(candidates(problem, small)) < set(candidates(problem, H200))


def test_small_matrices_have_few_candidates_and_no_split_beyond_their_steps() -> None:
    for rows_in in SIZES:
        found = candidates(Problem(rows_in, 7, 33, 4, 33, "float16"), H200)
        assert 1 <= len(found) < 200
        assert all(launch.block_n <= 32 and launch.block_k <= 64 for launch in found if launch.kernel != "dense")
        assert all(launch.split_k <= -(-33 // launch.block_k) for launch in found)


CASES = [
    Problem(1, 40, 70, 4, 32, "float16"),
    Problem(3, 33, 64, 3, 64, "float32", False),
    Problem(5, 48, 64, 8, 16, "float16", False),
    Problem(65, 16, 96, 2, 32, "float32"),
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU")
@pytest.mark.parametrize("problem", CASES, ids=str)
def test_candidates_run_and_pass_the_check_of_their_results(problem: Problem) -> None:
    products, found = Products(problem, "cpu"), candidates(problem, H200)
    assert found
    for launch in {found[0], found[len(found) // 2], found[-1]}:
        products.check(launch)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU")
@pytest.mark.parametrize(
    "problem", [Problem(3, 40, 64, 8, 64, "float16", kind="w8a8"), Problem(1, 40, 96, 4, 64, "float16", kind="nf4")]
)
def test_other_kinds_have_one_launch_that_passes_the_check(problem: Problem) -> None:
    assert candidates(problem, H200) == []
    Products(problem, "cpu").check(choose(problem, ""))


@pytest.mark.parametrize("kind", ["packed", "w8a8", "nf4"])
def test_the_check_refuses_a_wrong_result_and_one_that_is_not_written(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem(2, 100, 64, 8 if kind == "w8a8" else 4, 32, "float32", kind=kind)
    products = Products(problem, "cpu", copies=2)
    made = KINDS[kind]
    right = made.wanted(products.x, products.weights[0], problem, slice(0, 100))[0].float()
    for damage in ("none", "last", "nan"):
        given = right.clone()
        given[1, 99] = {"none": given[1, 99], "last": given[1, 99] * 1.001 + 1e-3, "nan": torch.nan}[damage]
        monkeypatch.setattr(type(made), "product", lambda self, x, weight, problem, launch, given=given: given)
        if damage == "none":
            assert len(products.runs(Launch("dense"))) == 2
        else:
            with pytest.raises(Refused, match="wrong result"):
                products.check(Launch("dense"))


@pytest.mark.parametrize(
    "problem", [Problem(1, 9, 33, 8, 33, "float16", kind="w8a8"), Problem(1, 9, 33, 4, 32, "float16", kind="nf4")]
)
def test_other_kinds_have_the_bytes_that_are_said(problem: Problem) -> None:
    (parts,) = Products(problem, "cpu").weights
    assert sum(part.numel() * part.element_size() for part in parts) == weight_bytes(problem)


def test_a_launch_that_no_kernel_takes_is_refused_with_its_reason() -> None:
    with pytest.raises(Refused, match="ValueError"):
        Products(Problem(1, 8, 64, 4, 32, "float16"), "cpu").check(Launch("gemv", block_n=17))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "columns", "group"), [(4, 64, 32), (3, 33, 5), (2, 17, 17), (8, 5, 2)])
def test_a_random_weight_has_the_bytes_that_are_said(bits: int, columns: int, group: int, symmetric: bool) -> None:
    problem = Problem(1, 9, columns, bits, group, "bfloat16", symmetric)
    assert random_weight(problem, "cpu").nbytes == weight_bytes(problem)
