"""Products to measure: random weights of any shape on a device, run with any launch, and checked.

Speed does not depend on what weights say, as long as they are not all alike (a processor that multiplies zeros draws
less power and runs faster); so the bits of the words are random, and no model is needed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from triton.errors import TritonError

from quantpress.kernels.dispatch import run
from quantpress.kernels.launch import Launch, Problem
from quantpress.kernels.packed import PackedWeight, reference_dequantize
from quantpress.kernels.search import Refused

__all__ = ["DTYPES", "Products", "random_weight", "weight_bytes"]

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_CHECKED = 32  # outputs at each end of the matrix that are compared with a product in float64
_ROUNDED = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}  # half the step above 1


def random_weight(problem: Problem, device: torch.device | str, seed: int = 0) -> PackedWeight:
    """Makes a random weight of the shape, bits and groups of a problem; scales are of 16 bits, float16 where x is not.

    Args:
        problem: its kind is "packed".
        device: of the weight.
        seed: of its values.
    """
    random = torch.Generator(device).manual_seed(seed)
    shape = (-(-problem.columns * problem.bits // 32), problem.rows)
    words = torch.randint(-(1 << 31), 1 << 31, shape, generator=random, device=device, dtype=torch.int32)
    groups = (-(-problem.columns // problem.group_size), problem.rows)
    scale = torch.rand(groups, generator=random, device=device) * 0.01 + 0.005
    zero = None
    if not problem.symmetric:
        zero = torch.randint(0, 1 << problem.bits, groups, generator=random, device=device, dtype=torch.uint8)
    kept = torch.bfloat16 if problem.dtype == "bfloat16" else torch.float16
    return PackedWeight(words, scale.to(kept), zero, None, problem.columns, problem.bits, problem.group_size)


def weight_bytes(problem: Problem) -> int:
    """Gives the bytes of `random_weight`: words, scales and zeros."""
    groups = -(-problem.columns // problem.group_size)
    words = -(-problem.columns * problem.bits // 32)
    return problem.rows * (4 * words + groups * (2 if problem.symmetric else 3))


class Products:
    """One problem on a device: an input, and weights that take turns."""

    def __init__(self, problem: Problem, device: torch.device | str, copies: int = 1) -> None:
        """Makes input and weights.

        Args:
            problem: its kind is "packed".
            device: where they lie.
            copies: weights.
        """
        self.problem = problem
        random = torch.Generator(device).manual_seed(1)
        x = torch.randn((problem.rows_in, problem.columns), generator=random, device=device)
        self.x = x.to(DTYPES[problem.dtype])
        self.weights = [random_weight(problem, device, seed) for seed in range(copies)]
        self._checked: set[Launch] = set()

    def runs(self, launch: Launch) -> list[Callable[[], object]]:
        """Gives the product with each of the weights, to be timed.

        Raises:
            Refused: the launch does not compile, does not fit the device or gives a wrong result.
        """
        if launch not in self._checked:
            self.check(launch)
            self._checked.add(launch)
        return [functools.partial(run, self.x, weight, launch=launch) for weight in self.weights]

    def check(self, launch: Launch) -> None:
        """Runs a launch once and compares the first and last outputs with a product in float64.

        Raises:
            Refused: the launch does not compile, does not fit the device or gives a wrong result.
        """
        try:
            found = run(self.x, self.weights[0], launch=launch)
        except (RuntimeError, ValueError, TritonError) as error:
            if "CUDA error" in str(error):  # nothing runs on this device any more
                raise
            raise Refused(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
        for start in {0, max(self.problem.rows - _CHECKED, 0)}:
            part = slice(start, start + _CHECKED)
            self._compare(found[:, part], part)

    def _compare(self, found: torch.Tensor, part: slice) -> None:
        dense = reference_dequantize(self.weights[0], torch.float64, part.start, part.stop)
        wide = self.x.double()
        wanted, total = wide @ dense.T, wide.abs() @ dense.abs().T
        # K roundings of sums in float32, one of each weight and its scale, one of the result
        half = _ROUNDED[self.x.dtype]
        bound = total * (self.problem.columns * 2.0**-24 + 2 * half) + wanted.abs() * half
        if not bool(((found.double() - wanted).abs() <= bound).all()):  # NaN is not within any bound
            raise Refused(f"wrong result: off by {float((found.double() - wanted).abs().max()):.3g}")
