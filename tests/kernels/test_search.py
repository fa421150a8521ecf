"""The search for launch parameters, and the sums of samples, with a clock that needs no GPU."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="triton is not here: install the extra gpu")

from quantpress.kernels.launch import Launch, Problem
from quantpress.kernels.tuning.candidates import H200, candidates
from quantpress.kernels.tuning.search import Refused, neighbours, search
from quantpress.kernels.tuning.timing import copies, timing

ALLOWED = candidates(Problem(16, 4096, 4096, 4, 128, "bfloat16"), H200)


class FakeClock:
    """Seconds by a formula with one valley; notes what was asked."""

    def __init__(self, best: Launch, refused: frozenset[Launch] = frozenset(), noise: float = 0.0) -> None:
        self.best, self.refused, self.noise = best, refused, noise
        self.asked: list[tuple[Launch, int]] = []
        self._random = random.Random(0)

    def __call__(self, launch: Launch, samples: int) -> Sequence[float]:
        self.asked.append((launch, samples))
        if launch in self.refused:
            raise Refused("too much shared memory")
        away = 1.0
        for name in ("block_m", "block_n", "block_k", "split_k", "warps", "stages"):
            away += abs(math.log2(getattr(launch, name) / getattr(self.best, name)))
        return [1e-6 * away * (1 + self.noise * self._random.random()) for _ in range(samples)]


@pytest.mark.parametrize("best", random.Random(1).sample(ALLOWED, 12))
def test_the_bottom_of_a_valley_is_found_with_a_part_of_the_measurements(best: Launch) -> None:
    clock = FakeClock(best)
    found = search([ALLOWED[0]], ALLOWED, clock)
    assert found.launch == best
    assert found.timing.median == 1e-6
    assert found.measured == len({launch for launch, _ in clock.asked}) < len(ALLOWED)


def test_every_launch_is_measured_once_and_finalists_once_more_and_longer() -> None:
    clock = FakeClock(ALLOWED[40], noise=0.01)
    found = search(ALLOWED[:2], ALLOWED, clock)
    quick = [launch for launch, samples in clock.asked if samples == 5]
    long = [launch for launch, samples in clock.asked if samples > 5]
    assert len(quick) == len(set(quick)) == found.measured
    assert len(long) == len(set(long)) == 4
    assert found.launch in long
    assert found.timing.samples == 25


def test_launches_that_cannot_run_are_told_and_passed_over() -> None:
    best = ALLOWED[100]
    broken = frozenset(launch for launch in ALLOWED if launch.warps != best.warps)
    assert ALLOWED[0] in broken
    found = search([ALLOWED[0]], ALLOWED, FakeClock(best, broken))
    assert found.launch == best
    assert {launch for launch, _ in found.refused} <= broken
    assert ALLOWED[0] in dict(found.refused)
    assert set(dict(found.refused).values()) == {"too much shared memory"}


def test_where_no_launch_runs_the_reason_is_told() -> None:
    with pytest.raises(Refused, match="too much shared memory"):
        search([Launch("tiled")], ALLOWED[:5], FakeClock(ALLOWED[0], frozenset([*ALLOWED, Launch("tiled")])))
    with pytest.raises(Refused, match="no launch"):
        search([], [], FakeClock(ALLOWED[0]))


def test_every_kernel_is_climbed_from_its_own_start() -> None:
    problem = Problem(2, 4096, 4096, 4, 128, "bfloat16")
    both = candidates(problem, H200)
    names = {launch.kernel for launch in both}
    assert names == {"gemv", "tiled"}
    for best in random.Random(2).sample(both, 2):
        starts = [next(launch for launch in both if launch.kernel == name) for name in sorted(names)]
        # a launch of the other kernel is always slower here
        clock = FakeClock(best)

        def seconds(launch: Launch, samples: int, clock: FakeClock = clock, best: Launch = best) -> list[float]:
            return [(10 if launch.kernel != best.kernel else 1) * each for each in clock(launch, samples)]

        assert search(starts, both, seconds).launch == best


def test_what_is_measured_next_is_told_before_so_that_it_can_be_compiled() -> None:
    clock, told = FakeClock(ALLOWED[7]), []

    def prepare(launches: Sequence[Launch]) -> None:
        assert not set(launches) & {launch for launch, _ in clock.asked}
        told.extend(launches)

    search([ALLOWED[0]], ALLOWED, clock, prepare)
    assert [launch for launch, samples in clock.asked if samples == 5] == told


def test_neighbours_are_two_steps_of_one_parameter_away_or_one_of_two() -> None:
    middle = Launch("tiled", 16, 64, 64, 2, 4, 3)
    near = [replace(middle, split_k=4), replace(middle, split_k=8), replace(middle, block_n=128, warps=8)]
    far = [
        Launch("dense"),
        middle,
        replace(middle, split_k=16),  # three steps
        replace(middle, block_n=256, warps=8),  # two steps, as 128 is among the values
        replace(middle, block_n=128, warps=8, stages=4),  # three parameters
        replace(middle, kernel="gemv"),
    ]
    assert neighbours(middle, [*near, *far]) == near


def test_a_timing_is_the_median_between_the_fifths() -> None:
    values = random.Random(3).sample(range(1000), 101)
    found, ordered = timing(values), sorted(values)
    assert (found.median, found.samples) == (statistics.median(values), 101)
    assert (found.low, found.high) == (ordered[20], ordered[80])  # as many of the other 100 lie below and above
    assert timing([0.5]).low == timing([0.5]).median == timing([0.5]).high == 0.5


@pytest.mark.parametrize("nbytes", [1, 10**6, 8_650_752, 60 << 20, 10**9])
def test_copies_of_a_weight_are_more_than_the_cache_holds(nbytes: int) -> None:
    count = copies(nbytes, 60 << 20)
    # between two reads of one copy all others are read
    assert (count - 1) * max(nbytes, 1 << 16) >= 4 * (60 << 20)
    assert count >= 2
    assert (count - 2) * max(nbytes, 1 << 16) < 4 * (60 << 20)
