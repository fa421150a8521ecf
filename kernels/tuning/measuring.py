"""Measures one product: with the launch that it gets, or with the best that a search finds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from quantpress.kernels.launch import Launch, Problem
from quantpress.kernels.tuning.ahead import Ahead
from quantpress.kernels.tuning.candidates import Device, candidates
from quantpress.kernels.tuning.choice import choose
from quantpress.kernels.tuning.products import DTYPES, Products, weight_bytes
from quantpress.kernels.tuning.search import search
from quantpress.kernels.tuning.timing import Timing, copies, timing

__all__ = ["Clock", "Measured", "dense_seconds", "measure"]

Clock = Callable[[Sequence[Callable[[], object]], int], Sequence[float]]
"""Takes the same work on several copies of a weight and a number of samples; gives seconds of each sample."""

_SAMPLES = 25


@dataclass(frozen=True, slots=True)
class Measured:
    """A product that was measured.

    Attributes:
        problem: the product.
        launch: how it was launched.
        timing: seconds.
        nbytes: read and written: weight with its scales and zeros, input and output.
        dense: seconds of cuBLAS with a dense weight of the input's type; None where it was not measured.
        tried: launches that a search measured, 0 without one.
        refused: launches that could not run or gave a wrong result, and why.
    """

    problem: Problem
    launch: Launch
    timing: Timing
    nbytes: int
    dense: float | None = None
    tried: int = 0
    refused: tuple[tuple[Launch, str], ...] = ()

    def to_json(self, copy_bandwidth: float) -> dict[str, Any]:
        """Gives it as `bench kernels --json` prints it."""
        speed = self.nbytes / self.timing.median
        record: dict[str, Any] = {**asdict(self.problem), "launch": asdict(self.launch)}
        record |= {
            "microseconds": round(self.timing.median * 1e6, 3),
            "fifths": [round(self.timing.low * 1e6, 3), round(self.timing.high * 1e6, 3)],
            "gb_per_s": round(speed / 1e9, 1),
            "share_of_copy": round(speed / copy_bandwidth, 4),
        }
        if self.dense is not None:
            record["cublas_microseconds"] = round(self.dense * 1e6, 3)
            record["times_cublas"] = round(self.dense / self.timing.median, 3)
        if self.tried:
            record |= {"tried": self.tried, "refused": [[asdict(launch), why] for launch, why in self.refused]}
        return record


def measure(
    problem: Problem,
    device: Device,
    clock: Clock,
    ahead: Ahead | None = None,
    *,
    dense: bool = True,
    place: str = "cuda",
) -> Measured:
    """Measures one product.

    Args:
        problem: the product.
        device: that it runs on, which torch calls `place`.
        clock: takes the time.
        ahead: compiles candidates; with it, launch parameters are searched for.
        dense: whether to measure cuBLAS too.
        place: see `device`.

    Raises:
        Refused: no launch of the product can run.
    """
    products = Products(problem, place, copies(weight_bytes(problem), device.cache_bytes))
    size = products.x.element_size()
    nbytes = weight_bytes(problem) + size * problem.rows_in * (problem.columns + problem.rows)
    refused: tuple[tuple[Launch, str], ...] = ()
    if ahead is None:
        launch = choose(problem, device.name)
        taken, tried = timing(clock(products.runs(launch), _SAMPLES)), 0
    else:
        allowed = candidates(problem, device)
        found = search(
            _starts(problem, device, allowed),
            allowed,
            lambda launch, samples: clock(products.runs(launch), samples),
            lambda launches: ahead.compile(problem, launches),
        )
        launch, taken, tried, refused = found.launch, found.timing, found.measured, found.refused
    other = dense_seconds(problem, device, clock, place=place) if dense else None
    return Measured(problem, launch, taken, nbytes, other, tried, refused)


def dense_seconds(problem: Problem, device: Device, clock: Clock, *, place: str = "cuda") -> float:
    """Measures torch's product with a dense weight of the input's type: cuBLAS on a GPU; median seconds."""
    dtype = DTYPES[problem.dtype]
    count = copies(problem.rows * problem.columns * dtype.itemsize, device.cache_bytes)
    x = torch.randn((problem.rows_in, problem.columns), device=place).to(dtype)
    weights = [torch.randn((problem.rows, problem.columns), device=place).to(dtype) for _ in range(count)]
    runs = [functools.partial(torch.nn.functional.linear, x, weight) for weight in weights]
    return timing(clock(runs, _SAMPLES)).median


def _starts(problem: Problem, device: Device, allowed: Sequence[Launch]) -> list[Launch]:
    """Where a search begins: what is chosen now, and what each kernel chooses by arithmetic."""
    from quantpress.kernels.gemv import gemv_launch
    from quantpress.kernels.tiled import tiled_launch

    arithmetic = {"gemv": gemv_launch, "tiled": tiled_launch, "dense": _dense_launch}
    names = sorted({launch.kernel for launch in allowed})
    return list(dict.fromkeys([choose(problem, device.name), *(arithmetic[name](problem) for name in names)]))


def _dense_launch(problem: Problem) -> Launch:
    del problem
    return Launch("dense")
