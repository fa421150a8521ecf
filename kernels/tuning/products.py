"""Products to measure: random weights of any kind and shape on a device, run with any launch, and checked."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from triton.errors import TritonError

from quantpress.kernels.launch import Launch, Problem
from quantpress.kernels.packed import PackedWeight
from quantpress.kernels.tuning.product_kinds import KINDS, Packed
from quantpress.kernels.tuning.search import Refused

__all__ = ["DTYPES", "Products", "random_weight", "weight_bytes"]

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_CHECKED = 32  # outputs at each end of the matrix that are compared with a product in float64
_ROUNDED = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}  # half the step above 1


def random_weight(problem: Problem, device: torch.device | str, seed: int = 0) -> PackedWeight:
    """Makes a random weight of the shape, bits and groups of a problem, whose kind is "packed"."""
    return Packed().weight(problem, device, seed)


def weight_bytes(problem: Problem) -> int:
    """Gives the bytes of a weight with its scales and zeros."""
    return KINDS[problem.kind].nbytes(problem)


class Products:
    """One problem on a device: an input, and weights that take turns."""

    def __init__(self, problem: Problem, device: torch.device | str, copies: int = 1) -> None:
        """Makes input and weights.

        Args:
            problem: the product.
            device: where they lie.
            copies: weights.
        """
        self.problem, self._kind = problem, KINDS[problem.kind]
        random = torch.Generator(device).manual_seed(1)
        x = torch.randn((problem.rows_in, problem.columns), generator=random, device=device)
        self.x = x.to(DTYPES[problem.dtype])
        self.weights = [self._kind.weight(problem, device, seed) for seed in range(copies)]
        self._checked: set[Launch] = set()

    def runs(self, launch: Launch) -> list[Callable[[], object]]:
        """Gives the product with each of the weights, to be timed.

        Raises:
            Refused: the launch does not compile, does not fit the device or gives a wrong result.
        """
        if launch not in self._checked:
            self.check(launch)
            self._checked.add(launch)
        product = functools.partial(self._kind.product, problem=self.problem, launch=launch)
        return [functools.partial(product, self.x, weight) for weight in self.weights]

    def check(self, launch: Launch) -> None:
        """Runs a launch once and compares the first and last outputs with a product in float64.

        Raises:
            Refused: the launch does not compile, does not fit the device or gives a wrong result.
        """
        try:
            found = self._kind.product(self.x, self.weights[0], self.problem, launch)
        except (RuntimeError, ValueError, TritonError) as error:
            if "CUDA error" in str(error):  # nothing runs on this device any more
                raise
            raise Refused(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
        for start in {0, max(self.problem.rows - _CHECKED, 0)}:
            part = slice(start, start + _CHECKED)
            self._compare(found[:, part], part)

    def _compare(self, found: torch.Tensor, part: slice) -> None:
        wanted, total = self._kind.wanted(self.x, self.weights[0], self.problem, part)
        # K roundings of sums in float32, one of each weight and its scale, one of the result
        half = _ROUNDED[self.x.dtype]
        bound = total * (self.problem.columns * 2.0**-24 + 2 * half) + wanted.abs() * half
        if not bool(((found.double() - wanted).abs() <= bound).all()):  # NaN is not within any bound
            raise Refused(f"wrong result: off by {float((found.double() - wanted).abs().max()):.3g}")
