"""Statistics of inputs against the formula in float64."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch

from quantpress.convert.calibration.hessian import Statistics, finite
from quantpress.convert.calibration.workers import Workers

ALL = frozenset({"hessian", "mean_abs", "max_abs"})


def now(task: Callable[[], None]) -> Future[None]:
    future: Future[None] = Future()
    future.set_result(task())
    return future


@pytest.mark.parametrize("columns", [1, 15, 64, 255, 256, 257, 300, 576, 1040])
def test_statistics_are_those_of_float64(columns: int) -> None:
    values = torch.randn(700, columns, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.01, 3, columns)
    statistics = Statistics(ALL, columns, torch.device("cpu"))
    for part in values.split(256):
        statistics.add(statistics.measure(part), now)
    found = statistics.finish(now)
    wide = values.double().numpy()
    hessian = found["hessian"]
    assert statistics.tokens == 700
    np.testing.assert_array_equal(hessian, hessian.T)
    # a sum of 700 products is off by 700 half steps of float32 at most: |H_ij - exact| <= 700 * 2^-24 * sqrt(H_ii H_jj)
    size = np.sqrt(np.outer(*[np.diag(wide.T @ wide / 700)] * 2))
    assert (np.abs(hessian - wide.T @ wide / 700) <= 702 * 2.0**-24 * size).all()
    np.testing.assert_allclose(found["mean_abs"], np.abs(wide).mean(0), rtol=258 * 2.0**-24)
    np.testing.assert_array_equal(found["max_abs"], np.abs(values.numpy()).max(0))
    assert finite(found)


@pytest.mark.parametrize("columns", [1, 64, 300, 2050])
@pytest.mark.parametrize("narrow", [False, True])
def test_drift_is_that_of_float64(columns: int, narrow: bool) -> None:
    generator = torch.Generator().manual_seed(columns)
    values, source = (torch.randn(300, columns, generator=generator) for _ in range(2))
    statistics = Statistics(frozenset({"drift"}), columns, torch.device("cpu"), narrow=narrow)
    for ours, theirs in zip(values.split(128), source.split(128), strict=True):
        statistics.add(statistics.measure(ours, theirs), now)
    found = statistics.finish(now)["drift"]
    difference = (source - values).double().numpy()
    exact = difference.T @ values.double().numpy() / 300
    # per product: both factors and the sum of a slice are rounded, by a half step of 8 bits each where narrow
    size = np.abs(difference).T @ np.abs(values.double().numpy()) / 300
    bound = (3 * 2.0**-8 if narrow else 0) + 303 * 2.0**-24
    assert (np.abs(found - exact) <= bound * size).all()
    assert np.abs(found - exact).max() > 0  # the bound is not met by doing nothing


@pytest.mark.parametrize("wants", [{"hessian"}, {"mean_abs"}, {"max_abs"}])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_inputs_that_are_not_finite_are_seen_in_every_statistic(wants: set[str], bad: float) -> None:
    values = torch.randn(40, 300)
    values[17, 299] = bad
    statistics = Statistics(frozenset(wants), 300, torch.device("cpu"))
    statistics.add(statistics.measure(values), now)
    found = statistics.finish(now)
    assert set(found) == wants
    assert finite(found) == (bad == 1e30 and wants != {"hessian"})


def test_what_is_not_wanted_is_not_measured() -> None:
    statistics = Statistics(frozenset(), 3, torch.device("cpu"))
    statistics.add(statistics.measure(torch.ones(2, 3)), now)
    assert statistics.finish(now) == {}


@pytest.mark.parametrize("narrow", [False, True])
def test_threads_do_not_change_a_bit(narrow: bool) -> None:
    values = torch.randn(2000, 777, generator=torch.Generator().manual_seed(1))
    found = []
    for threads in (1, 2, 3):
        with Workers(threads) as workers:
            statistics = Statistics(ALL | {"drift"}, 777, torch.device("cpu"), narrow=narrow)
            submit = partial(workers.submit, "hessian")
            for part in values.split(300):
                statistics.add(statistics.measure(part, part * 1.01), submit)
            found.append(statistics.finish(submit))
            assert workers.take_seconds()["hessian"] > 0
    for other in found[1:]:
        for name in ALL | {"drift"}:
            assert other[name].tobytes() == found[0][name].tobytes()


def test_a_pool_leaves_torch_as_it_was() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with Workers(2) as workers:
            assert list(workers.in_order("forward", [torch.get_num_threads] * 7)) == [1] * 7
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as later:  # threads that start now take what was set last
            assert later.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)
