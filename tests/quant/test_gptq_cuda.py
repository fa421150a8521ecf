"""GPTQ on a device, here the processor: against the compiled one, RTN, the paper's sums and Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not here: install the extra gpu")

from quantpress.quant.errors import InputError, LayoutError, OutputError, UsageError
from quantpress.quant.gptq import GptqOptions, factorize, gptq
from quantpress.quant.gptq_cuda import (
    DeviceFactor,
    factorize_on_device,
    full_float32,
    gptq_on_device,
    gptq_shared_on_device,
    made_up_on_device,
)
from quantpress.quant.grid import Grid, round_to_nearest
from quantpress.quant.qtensor import QuantizedTensor
from tests.quant.gptq_cuda_cases import INTERPRETED, layer, run

ROOT = Path(__file__).resolve().parents[2]


def _loss(weight: np.ndarray, quantized: QuantizedTensor, hessian: np.ndarray) -> float:
    difference = quantized.dequantize().astype(np.float64) - weight
    return float(((difference @ hessian.astype(np.float64)) * difference).sum())


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("grid", [Grid(4, 64), Grid(3, -1, symmetric=False), Grid(2, 48, clip_search=True)])
def test_codes_and_report_are_those_of_the_compiled_loop_up_to_near_ties(act_order: bool, grid: Grid) -> None:
    weight, hessian = layer(40, 300)
    options = GptqOptions(act_order=act_order)
    quantized, report = run(weight, hessian, grid, options, "cpu")
    wanted, told = gptq(weight, factorize(hessian, options), grid)
    # a clip search weighs errors by the factor, which is rounded otherwise: nearly equal candidates may change places
    assert (quantized.scale == wanted.scale).mean() >= (0.98 if grid.clip_search else 1)
    assert (quantized.zeros() == wanted.zeros()).mean() >= (0.98 if grid.clip_search else 1)
    assert (quantized.codes == wanted.codes).mean() > 0.99
    assert np.abs(quantized.codes.astype(int) - wanted.codes).max() <= 2
    assert report.loss == pytest.approx(told.loss, rel=5e-3)
    assert report.relative_loss / report.loss == pytest.approx(told.relative_loss / told.loss, rel=1e-5)
    assert (report.damping, report.dead) == (told.damping, told.dead)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_reported_loss_is_that_of_the_outputs_and_less_than_that_of_rtn(bits: int) -> None:
    weight, hessian = layer(24, 200)
    grid = Grid(bits, 64)
    quantized, report = run(weight, hessian, grid, GptqOptions(), "cpu")
    # the loop's own sum: float32 errors of a few 1e-7, minus what the damping adds
    assert report.loss == pytest.approx(_loss(weight, quantized, hessian), rel=1e-3)
    assert report.loss < 0.8 * _loss(weight, round_to_nearest(weight, grid), hessian)


def test_an_identity_hessian_gives_rtn_bit_for_bit() -> None:
    weight, _ = layer(20, 260)
    for grid in (Grid(4, 64), Grid(3, -1, symmetric=False), Grid(8, 32)):
        quantized, _ = run(weight, np.eye(260, dtype=np.float32), grid, GptqOptions(), "cpu")
        assert (quantized.codes == round_to_nearest(weight, grid).codes).all()


def test_the_factor_is_that_of_the_inverse_in_the_order_of_falling_diagonals() -> None:
    _, hessian = layer(1, 90)
    factor = factorize_on_device(torch.from_numpy(hessian), GptqOptions(damping=0.01))
    order, upper = factor.order.numpy(), factor.upper.numpy().astype(np.float64)
    assert (np.diff(hessian.diagonal()[order]) <= 0).all()
    assert (np.tril(upper, -1) == 0).all()
    damped = hessian.astype(np.float64) + 0.01 * hessian.diagonal().mean(dtype=np.float64) * np.eye(90)
    # float32 Cholesky: backward errors of K roundings; the product with H then is off by that times the condition
    allowed = 90 * 2.0**-24 * np.linalg.cond(damped)
    assert np.abs(upper.T @ upper @ damped[np.ix_(order, order)] - np.eye(90)).max() < allowed < 0.1
    assert factor.added == pytest.approx(0.01 * hessian.diagonal().mean(dtype=np.float64), rel=1e-6)


def test_a_factor_made_once_serves_matrices_as_the_hessian_would() -> None:
    weight, hessian = layer(12, 140)
    factor = factorize_on_device(torch.from_numpy(hessian), GptqOptions())
    for part in (slice(0, 5), slice(5, 12)):
        one = torch.from_numpy(weight[part].copy())
        shared, _ = gptq_on_device(one, factor, Grid(4, 32), GptqOptions())
        alone, _ = gptq_on_device(one, torch.from_numpy(hessian), Grid(4, 32), GptqOptions())
        assert (shared.codes == alone.codes).all()


def test_matrices_of_a_site_are_each_quantized_as_alone() -> None:
    weight, hessian = layer(12, 140)
    weight.flags.writeable = False  # as a mapped file's
    parts, grids = [weight[:5], weight[5:]], [Grid(4, 32), Grid(3, -1, symmetric=False)]
    together = gptq_shared_on_device(parts, hessian, grids, GptqOptions(), device="cpu")
    for part, grid, (quantized, report) in zip(parts, grids, together, strict=True):
        alone, told = run(part.copy(), hessian, grid, GptqOptions(), "cpu")
        assert (quantized.codes == alone.codes).all()
        assert report == told


@pytest.mark.parametrize("act_order", [True, False])
def test_drift_is_made_up_for_before_the_weights_are_rounded(act_order: bool) -> None:
    weight, hessian = layer(12, 140)
    rng = np.random.default_rng(3)
    drift = (hessian * rng.normal(0, 0.1, hessian.shape)).astype(np.float32)  # as a few per cent of the inputs would be
    options, grid = GptqOptions(act_order=act_order), Grid(4, 32)
    factor = factorize_on_device(torch.from_numpy(hessian), options)
    given = torch.from_numpy(weight.copy())
    moved = made_up_on_device(given, factor, torch.from_numpy(drift), 0.5)
    assert (given.numpy() == weight).all()
    damped = hessian.astype(np.float64) + factor.added * np.eye(140)
    wanted = weight + 0.5 * weight.astype(np.float64) @ drift @ np.linalg.inv(damped)
    # float32 sums of K products three times over, each error as large as the condition of H lets it grow
    allowed = 3 * 140 * 2.0**-24 * np.linalg.cond(damped) * np.abs(wanted - weight).max()
    assert np.abs(moved.numpy() - wanted).max() < allowed < 0.1 * np.abs(wanted - weight).max()
    found = gptq_shared_on_device([weight[:5], weight[5:]], hessian, [grid, grid], options, drift=drift, share=0.5,
                                  device="cpu")  # fmt: skip
    for (quantized, report), rows in zip(found, (moved[:5], moved[5:]), strict=True):
        alone, told = gptq_on_device(rows, factor, grid, options)
        # a product of five rows may be summed in another order than one of twelve
        assert (quantized.codes == alone.codes).mean() > 0.99
        assert report.loss == pytest.approx(told.loss, rel=1e-2)
    with pytest.raises(InputError, match="correction for drift is not finite"):
        made_up_on_device(given, factor, torch.full((140, 140), torch.inf), 0.5)


def test_a_device_that_is_not_there_is_refused() -> None:
    weight, hessian = layer(2, 8)
    with pytest.raises(UsageError, match=r"device cuda:63: torch sees \d+ CUDA devices"):
        gptq_shared_on_device([weight], hessian, [Grid(4, 8)], GptqOptions(), device="cuda:63")


def test_the_inputs_are_left_as_they_are_and_the_bytes_do_not_depend_on_threads() -> None:
    weight, hessian = layer(300, 64)
    given = weight.copy(), hessian.copy()
    grid = Grid(3, 32, symmetric=False, clip_search=True)
    one, first = run(given[0], given[1], grid, GptqOptions(), "cpu")
    two, second = run(given[0], given[1], grid, GptqOptions(), "cpu", threads=3)
    assert (given[0] == weight).all()
    assert (given[1] == hessian).all()
    assert one.codes.tobytes() == two.codes.tobytes()
    assert one.scale.tobytes() == two.scale.tobytes()
    assert first == second
    power = float((weight.astype(np.float64) ** 2 @ hessian.diagonal()).sum())
    assert first.relative_loss == pytest.approx(first.loss / power, rel=1e-6)


def test_bfloat16_weights_are_worked_on_as_float32() -> None:
    weight, hessian = layer(6, 64)
    half, matrix = torch.from_numpy(weight).to(torch.bfloat16), torch.from_numpy(hessian)
    narrow, _ = gptq_on_device(half, matrix, Grid(4, 32), GptqOptions())
    wide, _ = gptq_on_device(half.float(), matrix, Grid(4, 32), GptqOptions())
    assert (narrow.codes == wide.codes).all()


def test_columns_without_input_are_counted_and_become_zero() -> None:
    weight, hessian = layer(6, 64)
    hessian[[3, 40]] = hessian[:, [3, 40]] = 0
    quantized, report = run(weight, hessian, Grid(4, 32), GptqOptions(damping=0.0), "cpu")
    assert report.dead == 2
    assert report.damping == 0  # they are no reason for more
    assert not quantized.dequantize()[:, [3, 40]].any()


def test_a_singular_hessian_is_damped_until_it_works_and_the_report_says_so() -> None:
    weight, _ = layer(4, 64)
    one = np.random.default_rng(0).standard_normal(64).astype(np.float32) * 1e3
    quantized, report = run(weight, np.outer(one, one), Grid(4, 32), GptqOptions(damping=1e-9), "cpu")
    assert report.damping > 1e-9
    assert np.isfinite(quantized.dequantize()).all()


def test_numbers_that_cannot_be_worked_with_are_refused() -> None:
    weight, hessian = layer(4, 8)
    with pytest.raises(InputError, match="Hessian is not finite"):
        run(weight, np.full((8, 8), np.nan, np.float32), Grid(4, 8), GptqOptions(), "cpu")
    wrong = np.eye(8, dtype=np.float32)
    wrong[0, 1] = wrong[1, 0] = 1e9
    with pytest.raises(InputError, match="not positive definite, even with a damping of 1"):
        run(weight, wrong, Grid(4, 8), GptqOptions(), "cpu")
    with pytest.raises(LayoutError, match="too large for F16"):
        run(weight * np.float32(1e9), hessian, Grid(4, 8), GptqOptions(), "cpu")
    huge = factorize_on_device(torch.from_numpy(hessian * np.float32(1e-30)), GptqOptions())
    bent = DeviceFactor(huge.upper * torch.inf, huge.order, huge.diagonal, huge.damping, huge.added)
    with pytest.raises(InputError, match="errors of GPTQ are not finite"):
        gptq_on_device(torch.from_numpy(weight), bent, Grid(4, 8), GptqOptions())


def test_without_triton_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "quantpress.kernels.gptq_block", raising=False)
    weight, hessian = layer(4, 8)
    with pytest.raises(OutputError, match=r"needs triton: pip install 'quantpress\[gpu\]'"):
        run(weight, hessian, Grid(4, 8), GptqOptions(), "cpu")


def test_the_interpreted_kernel_gives_the_bits_of_the_reference(tmp_path: Path) -> None:
    script = Path(__file__).with_name("gptq_cuda_cases.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(script), str(tmp_path / "out.npz")], check=True, cwd=ROOT, env=environment)
    rows, columns, grid, options = INTERPRETED
    with one_thread():
        quantized, report = run(*layer(rows, columns), grid, options, "cpu")
    with np.load(tmp_path / "out.npz") as found:
        assert (found["codes"] == quantized.codes).all()
        assert (found["scale"] == quantized.scale).all()
        assert (found["zero"] == quantized.zeros()).all()
        assert found["loss"] == report.loss


class one_thread:
    """torch on one thread, as in the interpreting process: sums are then added in the same order."""

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *error: object) -> None:
        torch.set_num_threads(self.before)


@pytest.fixture
def precision() -> Iterator[None]:
    """Puts torch's setting back whatever a test did to it."""
    with full_float32():
        yield


@pytest.mark.parametrize("before", ["highest", "high"])
def test_products_are_computed_in_full_float32_and_the_setting_is_put_back(before: str, precision: None) -> None:
    torch.set_float32_matmul_precision(before)
    with full_float32():
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.get_float32_matmul_precision() == before
    assert torch.backends.cuda.matmul.allow_tf32 == (before == "high")


def test_a_setting_made_by_its_newer_name_is_put_back_too(precision: None) -> None:
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has only the older name")
    matmul.fp32_precision = "tf32"
    with full_float32():
        assert matmul.fp32_precision == "ieee"
    assert matmul.fp32_precision == "tf32"
