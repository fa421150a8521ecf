"""AWQ's search against a search in float64 that rounds for itself, and SmoothQuant's formula."""

from __future__ import annotations

import numpy as np
import pytest

from quantpress.quant.awq import output_error, search_scale
from quantpress.quant.grid import Grid
from quantpress.quant.smooth import migration_scale


def _case(columns: int = 96, seed: int = 0) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Two matrices, and inputs of which a few columns are far greater than the others."""
    rng = np.random.default_rng(seed)
    weights = [(rng.standard_normal((rows, columns)) * 0.02).astype(np.float32) for rows in (24, 40)]
    power = np.where(rng.random(columns) < 0.05, 30.0, 1.0) * rng.gamma(2, 1, columns)
    inputs = rng.standard_normal((400, columns)) * power
    return weights, (inputs.T @ inputs / 400).astype(np.float32), np.abs(inputs).mean(0).astype(np.float32)


def _round(weight: np.ndarray, size: int) -> np.ndarray:
    """Symmetric int4 in float64 with the scale in float16."""
    parts = weight.astype(np.float64).reshape(len(weight), -1, size)
    largest = np.take_along_axis(parts, np.abs(parts).argmax(-1)[..., None], -1)
    step = (largest / -8).astype(np.float16).astype(np.float64)
    return (step * np.clip(np.rint(parts / step), -8, 7)).reshape(weight.shape)


def _loss(weights: list[np.ndarray], scale: np.ndarray, hessian: np.ndarray) -> float:
    total = 0.0
    for weight in weights:
        error = _round((weight * scale).astype(np.float32), 32) / scale.astype(np.float64) - weight
        total += float(((error @ hessian.astype(np.float64)) * error).sum())
    return total


def test_the_loss_is_the_quadratic_form_in_float64() -> None:
    weights, hessian, _ = _case()
    for scale in (np.ones(96, np.float32), np.linspace(0.5, 3, 96, dtype=np.float32)):
        found = sum(output_error(weight, Grid(4, 32), scale, hessian) for weight in weights)
        # float32 against float64: near ties of one weight in thousands may be rounded the other way
        assert found == pytest.approx(_loss(weights, scale, hessian), rel=1e-2)


def test_the_scale_that_is_found_is_as_good_as_that_of_a_search_over_plain_powers() -> None:
    weights, hessian, mean = _case()
    found = search_scale(weights, [Grid(4, 32)] * 2, mean, hessian)
    brute = []
    for alpha in np.arange(0, 21) / 20:
        scale = mean.astype(np.float64) ** alpha
        brute.append(_loss(weights, (scale / np.sqrt(scale.max() * scale.min())).astype(np.float32), hessian))
    assert found.loss <= min(brute) * 1.01  # the search also tries the form with the weights' shares
    assert found.loss < 0.5 * found.unscaled
    # as AWQ's code: the scales are centred, so that weights and norms keep their size
    assert float(found.scale.max()) * float(found.scale.min()) == pytest.approx(1, rel=1e-5)
    assert found.unscaled == pytest.approx(brute[0], rel=1e-2)
    assert found.loss == pytest.approx(_loss(weights, found.scale, hessian), rel=1e-2)


def test_inputs_that_are_all_alike_are_hardly_scaled_and_never_to_the_worse() -> None:
    weights, _, _ = _case()
    found = search_scale(weights, [Grid(4, 32)] * 2, np.ones(96, np.float32), np.eye(96, dtype=np.float32))
    assert found.loss <= found.unscaled


def test_tied_columns_get_one_scale() -> None:
    weights, hessian, mean = _case()
    tie = np.concatenate([np.arange(48), np.arange(48)])
    found = search_scale(weights, [Grid(4, 32)] * 2, mean, hessian, tie=tie)
    assert found.alpha > 0
    assert (found.scale[:48] == found.scale[48:]).all()


def test_the_search_does_not_depend_on_the_number_of_threads() -> None:
    weights, hessian, mean = _case()
    results = [search_scale(weights, [Grid(3, 32)] * 2, mean, hessian, threads=threads) for threads in (1, 2, 3)]
    assert len({(result.scale.tobytes(), result.loss, result.alpha) for result in results}) == 1


def test_columns_without_input_stay_finite() -> None:
    weights, hessian, mean = _case()
    hessian[5] = hessian[:, 5] = mean[5] = 0
    assert np.isfinite(search_scale(weights, [Grid(4, 32)] * 2, mean, hessian).scale).all()
    assert np.isfinite(migration_scale(weights, mean)).all()
    assert (migration_scale(weights, np.zeros(96, np.float32)) == 1).all()


def test_migration_evens_out_inputs_and_weights_as_the_paper_says() -> None:
    weights, _, _ = _case()
    largest = np.abs(np.concatenate(weights)).max(0).astype(np.float64)
    inputs = np.random.default_rng(1).gamma(1, 10, 96).astype(np.float32)
    scale = migration_scale(weights, inputs)
    assert np.allclose(scale, np.sqrt(inputs / largest), rtol=1e-6)
    # with alpha = 1/2 both have the same range: section 4 of the paper
    assert np.allclose(inputs / scale, largest * scale, rtol=1e-5)
