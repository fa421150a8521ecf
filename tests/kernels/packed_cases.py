"""Random packed matrices and what they stand for, worked out bit by bit in numpy; for tests here and on a GPU."""

from __future__ import annotations

import numpy as np
import torch

from quantpress.kernels.packed import PackedWeight


def random_weight(
    rows: int, columns: int, bits: int, group: int, *, symmetric: bool = True, ordered: bool = False,
    scale: torch.dtype = torch.float16, whole: bool = False, seed: int = 0,
) -> PackedWeight:  # fmt: skip
    """Random words (those past the last code too) and scales of both signs, 1/32 to 1/16 or, where `whole`, 1 and 2.

    Words, scales and zeros lie between values that would show in a result.
    """
    rng = np.random.default_rng([rows, columns, bits, group, seed])
    words = rng.integers(-(2**31), 2**31, (-(-columns * bits // 32), rows)).astype(np.int32)
    shape = (-(-columns // group), rows)
    steps = rng.choice([1.0, 2.0], shape) if whole else (1 + rng.random(shape)) / 32
    zero = None if symmetric else _framed(torch.from_numpy(rng.integers(0, 1 << bits, shape).astype(np.uint8)), 255)
    order = torch.from_numpy(rng.permutation(columns)) if ordered else None
    signed = torch.from_numpy(steps * rng.choice([-1.0, 1.0], shape)).to(scale)
    return PackedWeight(
        _framed(torch.from_numpy(words), -1), _framed(signed, float("nan")), zero, order, columns, bits, group
    )


def _framed(values: torch.Tensor, poison: float) -> torch.Tensor:
    """Gives a view of the same values with poison before and after."""
    size = values.numel()
    framed = torch.full((size + 2048,), poison, dtype=values.dtype)
    framed[1024 : 1024 + size] = values.flatten()
    return framed[1024 : 1024 + size].view(values.shape)


def framed_inputs(rows_in: int, columns: int, dtype: torch.dtype, *, whole: bool = False) -> torch.Tensor:
    """Gives random inputs between NaNs: whole numbers from -3 to 3, or normal ones."""
    rng = np.random.default_rng([rows_in, columns])
    values = rng.integers(-3, 4, (rows_in, columns)) if whole else rng.standard_normal((rows_in, columns))
    return _framed(torch.from_numpy(values.astype(np.float32)).to(dtype), float("nan"))


def dense(weight: PackedWeight) -> torch.Tensor:
    """Gives the matrix (N, K) in float64, columns in their own order, from single bits."""
    words = weight.words.cpu().numpy().T.copy().view(np.uint8)  # (N, bytes)
    stream = np.unpackbits(words, axis=1, bitorder="little")[:, : weight.columns * weight.bits]
    codes = stream.reshape(weight.rows, weight.columns, weight.bits) @ (1 << np.arange(weight.bits))
    middle = np.full(weight.scale.shape, 1 << (weight.bits - 1))
    if weight.zero is not None:
        middle = weight.zero.cpu().numpy().astype(np.int64)
    group = np.arange(weight.columns) // weight.group_size
    values = (codes - middle[group].T) * weight.scale.cpu().double().numpy()[group].T
    if weight.order is not None:
        values = values[:, np.argsort(weight.order.cpu().numpy())]
    return torch.from_numpy(values)


def product(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, *, rounded: bool, unit: float = 2.0**-24
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gives x W^T + bias in float64, and how far a kernel may be from it.

    Args:
        x: (M, K).
        weight: the packed matrix.
        bias: (N,).
        rounded: the weights are rounded to x's type.
        unit: relative rounding of a sum: 2^-24 for float32 that rounds to nearest, 2^-23 for tensor cores, which cut.

    Returns:
        (M, N) float64 twice, on the processor. The bound: each of K products and K sums in float32, of partial sums
        that are at most the sum of |x w|; some more for the scales, the parts and the bias; then the rounding to x's
        type.
    """
    matrix = dense(weight)
    if rounded:
        matrix = matrix.float().to(x.dtype).double()
    inputs = x.cpu().double()
    added = torch.zeros(weight.rows, dtype=torch.float64) if bias is None else bias.cpu().double()
    wanted = inputs @ matrix.T + added
    size = inputs.abs() @ matrix.abs().T + added.abs()
    info = torch.finfo(x.dtype)
    bound = 2 * (weight.columns + 32) * unit * size
    return wanted, bound + (wanted.abs() + bound) * info.eps / 2 + info.smallest_normal * info.eps
