"""The correction for drift against least squares in float64."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from quantpress.quant.drift import check_share, made_up
from quantpress.quant.errors import InputError, UsageError
from quantpress.quant.gptq import Factor, GptqOptions, factorize


def inputs(tokens: int = 600, columns: int = 40) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What a linear was made for, and what it gets: the same, mixed a little and with noise of its own."""
    rng = np.random.default_rng(5)
    before = rng.standard_normal((tokens, columns)) @ rng.standard_normal((columns, columns)) / 6
    after = before @ (np.eye(columns) + 0.1 * rng.standard_normal((columns, columns)))
    return before, after + 0.1 * rng.standard_normal(after.shape)


def statistics(
    before: NDArray[np.float64], after: NDArray[np.float64], damping: float
) -> tuple[Factor, NDArray[np.float32]]:
    tokens = len(after)
    factor = factorize((after.T @ after / tokens).astype(np.float32), GptqOptions(damping=damping))
    return factor, ((before - after).T @ after / tokens).astype(np.float32)


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_it_is_the_least_squares_solution(damping: float, share: float) -> None:
    before, after = inputs()
    weight = np.random.default_rng(1).standard_normal((300, 40)).astype(np.float32)
    factor, drift = statistics(before, after, damping)
    found = made_up([weight[:200], weight[200:]], factor, drift, share, threads=2)
    # ridge regression of the source's outputs on the new inputs, as rows appended to them, in float64
    ridge = np.sqrt(damping * np.diag(after.T @ after).mean()) * np.eye(40)
    wide = weight.astype(np.float64)
    both = np.vstack([before @ wide.T, ridge @ wide.T])  # the ridge pulls towards the weights themselves
    solution = np.linalg.lstsq(np.vstack([after, ridge]), both, rcond=None)[0].T
    # float32 inputs to a solve of condition c are worth c * 2^-24 each way; three products of 40 terms besides
    condition = np.linalg.cond(after.T @ after)
    bound = (condition + 3 * 40) * 2.0**-23 * np.abs(solution).max()
    np.testing.assert_allclose(np.vstack(found), wide + share * (solution - wide), rtol=0, atol=bound)
    error = [float(((after @ w.T - before @ wide.T) ** 2).sum()) for w in (wide, np.vstack(found).astype(np.float64))]
    assert error[1] < error[0] * (0.6 if share == 1 else 0.8)


def test_no_drift_changes_nothing_and_threads_no_bit() -> None:
    before, after = inputs()
    weight = np.random.default_rng(2).standard_normal((300, 40)).astype(np.float32)
    factor, drift = statistics(before, after, 0.01)
    assert made_up([weight], factor, np.zeros_like(drift), 1.0)[0].tobytes() == weight.tobytes()
    assert made_up([weight], factor, drift, 0.0)[0].tobytes() == weight.tobytes()
    one, three = (made_up([weight], factor, drift, 1.0, threads=threads)[0] for threads in (1, 3))
    assert one.tobytes() == three.tobytes()
    parts = made_up([weight[:128], weight[128:]], factor, drift, 1.0)
    assert np.vstack(parts).tobytes() == one.tobytes()


def test_where_the_matrices_lie_in_memory_changes_no_bit() -> None:
    before, after = inputs()
    factor, drift = statistics(before, after, 0.01)
    space = np.empty(300 * 40 + 16, np.float32)
    values = np.random.default_rng(3).standard_normal((300, 40)).astype(np.float32)
    found = []
    for shift in range(16):
        weight = space[shift : shift + values.size].reshape(values.shape)
        weight[...] = values
        found.append(made_up([weight], factor, drift, 1.0)[0].tobytes())
    assert set(found) == {found[0]}


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_is_from_0_to_1(share: float) -> None:
    with pytest.raises(UsageError, match="must be a share from 0 to 1"):
        check_share(share)


def test_a_correction_that_is_not_finite_is_refused() -> None:
    before, after = inputs()
    factor, drift = statistics(before, after, 0.01)
    weight = np.full((2, 40), 3e38, np.float32)
    with np.errstate(all="ignore"), pytest.raises(InputError, match="not finite"):
        made_up([weight], factor, drift * np.float32(1e6), 1.0)
