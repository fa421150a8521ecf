"""The kinds of quantized matrices that are measured: a random one, its product, and the same product in float64.

Speed does not depend on what weights say, as long as they are not all alike (a processor that multiplies zeros draws
less power and runs faster); so the bits of the codes are random, and no model is needed.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from quantpress.kernels.dispatch import run
from quantpress.kernels.int8.plain import reference_w8a8
from quantpress.kernels.int8.w8a8 import w8a8
from quantpress.kernels.launch import Launch, Problem
from quantpress.kernels.nf4.matmul import nf4_matmul, reference_nf4_dequantize
from quantpress.kernels.packed import PackedWeight, reference_dequantize

__all__ = ["KINDS", "Kind", "Packed"]


class Kind(Protocol):
    """One kind; `problem.kind` names it."""

    def weight(self, problem: Problem, device: torch.device | str, seed: int) -> Any:
        """Makes a random weight."""
        ...

    def nbytes(self, problem: Problem) -> int:
        """Gives the bytes of a weight with all that belongs to it."""
        ...

    def product(self, x: torch.Tensor, weight: Any, problem: Problem, launch: Launch) -> torch.Tensor:
        """Gives (M, N) of the type of `x`, by the kernel that a launch names."""
        ...

    def wanted(self, x: torch.Tensor, weight: Any, problem: Problem, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Gives outputs `part` in float64, and the sums of magnitudes of what they are made of."""
        ...


class Packed:
    """Codes of 2, 3, 4 or 8 bits with scales of groups; scales are float16, bfloat16 where `x` is."""

    def weight(self, problem: Problem, device: torch.device | str, seed: int = 0) -> PackedWeight:
        """As `Kind.weight`."""
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

    def nbytes(self, problem: Problem) -> int:
        """As `Kind.nbytes`."""
        groups = -(-problem.columns // problem.group_size)
        words = -(-problem.columns * problem.bits // 32)
        return problem.rows * (4 * words + groups * (2 if problem.symmetric else 3))

    def product(self, x: torch.Tensor, weight: PackedWeight, problem: Problem, launch: Launch) -> torch.Tensor:
        """As `Kind.product`."""
        del problem
        return run(x, weight, launch=launch)

    def wanted(
        self, x: torch.Tensor, weight: PackedWeight, problem: Problem, part: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Kind.wanted`."""
        stop = min(part.stop, problem.rows)
        return _dense_product(x, reference_dequantize(weight, torch.float64, part.start, stop))


class W8A8:
    """int8 codes with a scale for each output, and inputs rounded to int8."""

    def weight(self, problem: Problem, device: torch.device | str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Kind.weight`: codes and scales."""
        random = torch.Generator(device).manual_seed(seed)
        shape = (problem.rows, problem.columns)
        codes = torch.randint(-128, 128, shape, generator=random, device=device, dtype=torch.int8)
        return codes, torch.rand(problem.rows, generator=random, device=device) * 0.01 + 0.005

    def nbytes(self, problem: Problem) -> int:
        """As `Kind.nbytes`."""
        return problem.rows * (problem.columns + 4)

    def product(
        self, x: torch.Tensor, weight: tuple[torch.Tensor, torch.Tensor], problem: Problem, launch: Launch
    ) -> torch.Tensor:
        """As `Kind.product`."""
        del problem
        return w8a8(x, *weight, launch=launch)

    def wanted(
        self, x: torch.Tensor, weight: tuple[torch.Tensor, torch.Tensor], problem: Problem, part: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Kind.wanted`; sums of codes are exact, so only the result counts."""
        del problem
        wanted = reference_w8a8(x, weight[0][part], weight[1][part]).double()
        return wanted, wanted.abs()


class Nf4:
    """bitsandbytes' four-bit codes: levels of a table, float32 scales of blocks that run on over rows."""

    def weight(self, problem: Problem, device: torch.device | str, seed: int) -> tuple[torch.Tensor, ...]:
        """As `Kind.weight`: packed codes, scales and levels."""
        random = torch.Generator(device).manual_seed(seed)
        size = problem.rows * problem.columns
        packed = torch.randint(0, 256, (-(-size // 2),), generator=random, device=device, dtype=torch.uint8)
        absmax = torch.rand(-(-size // problem.group_size), generator=random, device=device) * 0.05 + 0.02
        return packed, absmax, torch.linspace(-1, 1, 16, device=device)

    def nbytes(self, problem: Problem) -> int:
        """As `Kind.nbytes`."""
        size = problem.rows * problem.columns
        return -(-size // 2) + 4 * (-(-size // problem.group_size) + 16)

    def product(
        self, x: torch.Tensor, weight: tuple[torch.Tensor, ...], problem: Problem, launch: Launch
    ) -> torch.Tensor:
        """As `Kind.product`."""
        packed, absmax, levels = weight
        shape = (problem.rows, problem.columns, problem.group_size)
        return nf4_matmul(x, packed, absmax, levels, *shape, launch=launch)

    def wanted(
        self, x: torch.Tensor, weight: tuple[torch.Tensor, ...], problem: Problem, part: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Kind.wanted`."""
        packed, absmax, levels = weight
        shape = (problem.rows, problem.columns, problem.group_size)
        return _dense_product(
            x, reference_nf4_dequantize(packed, absmax, levels, *shape, torch.float64, part.start, part.stop)
        )


def _dense_product(x: torch.Tensor, dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x.double()
    return wide @ dense.T, wide.abs() @ dense.abs().T


KINDS: dict[str, Kind] = {"packed": Packed(), "w8a8": W8A8(), "nf4": Nf4()}
"""By `Problem.kind`."""
