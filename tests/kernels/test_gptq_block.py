"""GPTQ's inner loop: the kernel in Triton's interpreter against its reference, and that against float64 and numba."""

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

pytest.importorskip("triton", reason="triton is not here: install the extra gpu")

from quantpress.kernels import gptq_block
from tests.kernels.gptq_block_cases import Case, case, exact, extreme, outcome

ROOT = Path(__file__).resolve().parents[2]
HALF_ULP = 2.0**-24  # of float32, relative

# rows and columns: one, one below and above a tile, primes; a tile holds 256 weights
CASES = {
    "one": case(1, 1, groups=1),
    "column": case(257, 1),
    "below": case(9, 31),
    "above": case(5, 33, bits=2),
    "block": case(3, 128, groups=130, bits=3),
    "wide": case(1, 131, bits=8),
    "exact": exact(17, 32),
    "extreme": extreme(9, 32),
}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """What the kernel makes of each case, computed by the interpreter in another process."""
    folder = tmp_path_factory.mktemp("interpreted")
    np.savez(folder / "in.npz", **{f"{name}.{key}": value for name, one in CASES.items() for key, value in one.items()})
    script = Path(__file__).with_name("gptq_block_cases.py")
    command = [sys.executable, str(script), str(folder / "in.npz"), str(folder / "out.npz")]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})
    with np.load(folder / "out.npz") as stored:
        return dict(stored)


def _in_float64(one: Case) -> tuple[Case, np.ndarray, np.ndarray]:
    """The loop in float64 along the codes of the reference, with two bounds for what float32 may do to it.

    Returns:
        Results, the bound of each error, and how far each weight's quotient may be off, in codes.
    """
    wanted = outcome(one, "cpu", reference=True)
    values, upper = one["work"].astype(np.float64), one["upper"].astype(np.float64)
    count = values.shape[1]
    off = np.zeros_like(values)  # bound of |float32 - float64| for each value
    errors, bounds, doubts = np.empty_like(values), np.empty_like(values), np.empty_like(values)
    codes = one["codes"].copy()
    for column in range(count):
        step = one["scale"][:, one["groups"][column]].astype(np.float64)
        middle = one["zero"][:, one["groups"][column]].astype(np.float64)
        divisor = np.where(step == 0, 1, step)
        best = np.where(step == 0, middle, np.clip(np.rint(values[:, column] / divisor) + middle, 0, int(one["top"])))
        codes[:, one["order"][column]] = best
        doubts[:, column] = (off[:, column] + HALF_ULP * np.abs(values[:, column])) / np.abs(divisor)
        code = wanted["codes"][:, one["order"][column]]
        # product, difference and quotient are rounded once each
        product = step * (code - middle)
        error = (values[:, column] - product) / upper[column, column]
        rounded = off[:, column] + HALF_ULP * (np.abs(product) + np.abs(values[:, column] - product))
        bound = rounded / np.abs(upper[column, column]) + HALF_ULP * np.abs(error)
        errors[:, column], bounds[:, column] = error, bound
        # and so are product and difference of each update
        passed = error[:, None] * upper[column, column + 1 :]
        values[:, column + 1 :] -= passed
        off[:, column + 1 :] += bound[:, None] * np.abs(upper[column, column + 1 :])
        off[:, column + 1 :] += HALF_ULP * (np.abs(passed) + np.abs(values[:, column + 1 :]))
    losses = one["losses"] + np.square(errors).sum(1)
    # products of two bounds were left out: each is 2^-24 of a bound, 1 % covers a thousand columns of them
    return {"codes": codes, "errors": errors, "losses": losses}, 1.01 * bounds, 1.01 * doubts


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_gives_the_bits_of_the_reference(interpreted: dict[str, np.ndarray], name: str) -> None:
    with np.errstate(over="ignore"):
        wanted = outcome(CASES[name], "cpu", reference=True)
    for part, values in wanted.items():
        np.testing.assert_array_equal(interpreted[f"{name}.{part}"], values, strict=True)


def test_nothing_but_the_block_is_written(interpreted: dict[str, np.ndarray]) -> None:
    for name, one in CASES.items():
        others = np.setdiff1d(np.arange(one["codes"].shape[1]), one["order"])
        assert (interpreted[f"{name}.codes"][:, others] == 0xAA).all()
        assert np.isnan(interpreted[f"{name}.errors"][:, one["work"].shape[1] :]).all()
        assert not np.isnan(interpreted[f"{name}.errors"][:, : one["work"].shape[1]]).any()


def test_where_nothing_is_rounded_the_results_are_those_of_float64() -> None:
    wanted, _, _ = _in_float64(CASES["exact"])
    found = outcome(CASES["exact"], "cpu", reference=True)
    assert (found["codes"] == wanted["codes"]).all()
    assert (found["errors"][:, :32] == wanted["errors"]).all()
    assert (found["losses"] == wanted["losses"]).all()


@pytest.mark.parametrize("name", ["below", "above", "block", "wide"])
def test_the_results_are_those_of_float64_within_the_roundings(name: str) -> None:
    one = CASES[name]
    wanted, bounds, doubts = _in_float64(one)
    found = outcome(one, "cpu", reference=True)
    assert (np.abs(found["errors"][:, : bounds.shape[1]] - wanted["errors"]) <= bounds).all()
    # another code than float64's: only where the quotient is as near to a tie as it may be off
    assert doubts.max() < 0.01
    differs = found["codes"][:, one["order"]] != wanted["codes"][:, one["order"]]
    assert differs.mean() <= 4 * doubts.mean()  # a quotient falls that near a tie with a probability of 2 doubts


def _by_numba(one: Case) -> Case:
    from quantpress.quant.gptq_kernels import quantize_columns

    rows, count = one["work"].shape
    found, errors = np.empty((count, rows), np.uint8), np.empty((count, rows), np.float32)
    losses, codes = one["losses"].copy(), one["codes"].copy()
    quantize_columns(
        one["work"].T.copy(), one["upper"], one["scale"].T.copy(), one["zero"].T.astype(np.float32), one["groups"],
        found, errors, losses, np.float32(one["top"]),
    )  # fmt: skip
    codes[:, one["order"]] = found.T
    return {"codes": codes, "errors": errors.T, "losses": losses}


@pytest.mark.parametrize("name", ["exact", "below", "above", "block", "wide"])
def test_the_compiled_loop_of_the_processor_gives_the_same(name: str) -> None:
    one = CASES[name]
    found, wanted = outcome(one, "cpu", reference=True), _by_numba(one)
    _, bounds, _ = _in_float64(one)
    # it may fuse multiply-adds, which leaves roundings out: both are within the same bound of float64. A near tie that
    # falls the other way changes the rest of its row, so rows are compared that have the same codes
    alike = (found["codes"] == wanted["codes"]).all(1)
    assert alike.mean() >= (1.0 if name == "exact" else 0.6)
    difference = np.abs(found["errors"][:, : bounds.shape[1]] - wanted["errors"])
    assert (difference <= (0 if name == "exact" else 2 * bounds))[alike].all()
    np.testing.assert_allclose(found["losses"][alike], wanted["losses"][alike], rtol=0 if name == "exact" else 1e-4)


def test_weights_are_left_as_they_are() -> None:
    one = CASES["above"]
    tensors = {name: torch.from_numpy(value.copy()) for name, value in one.items() if name != "top"}
    gptq_block.reference_quantize_block(**tensors, top=int(one["top"]))
    assert (tensors["work"].numpy() == one["work"]).all()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("scale", torch.zeros(9, 3, dtype=torch.float16), "scale is .*float16"),
        ("zero", torch.zeros(9, 2, dtype=torch.uint8), "zero is"),
        ("errors", torch.zeros(9, 30), "errors is .*30.* wanted .*31"),
        ("order", torch.zeros(31, dtype=torch.int32), "order is .*int32"),
        ("work", torch.zeros(31, 9).T, "work has gaps"),
        ("work", torch.zeros(9, 1025), "1025 columns: at most 1024"),
        ("losses", torch.zeros(9, dtype=torch.float64, device="meta"), "losses is .*meta"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(name: str, value: torch.Tensor, message: str) -> None:
    tensors = {key: torch.from_numpy(part) for key, part in CASES["below"].items() if key != "top"} | {name: value}
    with pytest.raises(ValueError, match=message):
        gptq_block.quantize_block(**tensors, top=15)


def test_on_the_processor_the_kernel_says_that_it_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    tensors = {key: torch.from_numpy(part) for key, part in CASES["below"].items() if key != "top"}
    with pytest.raises(ValueError, match="runs on CUDA devices"):
        gptq_block.quantize_block(**tensors, top=15)


def _compiled(script: str, *arguments: str) -> Any:
    """What a program that compiles kernels prints; in a process of its own, because this one may interpret them."""
    folder = Path(__file__).resolve().parent
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", str(folder / script), *arguments]
    ran = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=ROOT)
    return json.loads(ran.stdout)


def test_compiled_for_gpus_it_rounds_every_operation_as_ieee_says() -> None:
    for capability, operations in _compiled("compile_gptq_block.py").items():
        arithmetic = {name for name in operations if name.split(".")[0] in {"add", "sub", "mul", "div", "fma", "mad"}}
        wanted = {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32", "add.rn.f64", "mul.rn.f64"}
        assert arithmetic == wanted, capability
        assert "ftz" not in operations, capability


def test_compiled_for_gpus_it_keeps_its_tile_in_registers() -> None:
    cases = Path(__file__).with_name("compile_gptq_block.py")
    for row in _compiled("compiling.py", str(cases)):
        assert row["stack"] == 0, row["arch"]
        assert row["registers"] <= 80, row["arch"]  # 24 programs or more on a multiprocessor of 65536
        assert not any(key.startswith("BAR") for key in row["instructions"]), row["arch"]
