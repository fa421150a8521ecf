"""GPTQ on a GPU: factor, column loop and the products between blocks stay on the device, grids are fitted beside it.

The same algorithm, options and report as `quantpress.quant.gptq`. The factor comes from the device's own Cholesky,
whose sums are rounded in another order, so codes may differ from the processor's where a quotient is nearly a tie. Two
runs on the same device and versions give the same bytes: no step adds up in an order that can change (cuBLAS keeps to
that as long as one stream is used). On tensors that are not on a GPU the kernel's plain reference does the column loop,
which is how the wiring is tested without one.

Not run on hardware yet: the kernel has been interpreted and compiled (see `quantpress.kernels.gptq_block`), and
everything around it has run on the processor.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.errors import InputError, OutputError, UsageError
from quantpress.quant.gptq import GptqOptions, GptqReport, mean_diagonal, more_damping
from quantpress.quant.grid import Grid, fit
from quantpress.quant.qtensor import QuantizedTensor
from quantpress.quant.workers import Workers, chunks

if TYPE_CHECKING:
    import torch  # at run time it is loaded by the first call: importing this module stays cheap

__all__ = [
    "DeviceFactor", "factorize_on_device", "full_float32", "gptq_on_device", "gptq_shared_on_device",
    "made_up_on_device",
]  # fmt: skip

Array = NDArray[Any]

_BLOCK = 128  # columns of a launch; the kernel's tile is two rows of it
_ROWS = 256  # rows of a chunk in what is done beside the column loop


@dataclass(frozen=True, eq=False, slots=True)
class DeviceFactor:
    """What all matrices with the same input share, as `quantpress.quant.gptq.Factor` but on the device.

    Attributes:
        upper: (K, K) float32, U with H^-1 = U^T U, columns in the order of `order`; 0 below the diagonal.
        order: (K,) int64, columns in the order they are visited.
        diagonal: (K,) float32 of the Hessian, in the columns' own order.
        damping: the share of the mean diagonal that was needed.
        added: what was added to the diagonal.
    """

    upper: torch.Tensor
    order: torch.Tensor
    diagonal: torch.Tensor
    damping: float
    added: float

    def importance(self) -> NDArray[np.float32]:
        """What an error of a column costs when the others may make up for it, 1 / diag(H^-1), (K,)."""
        costs = np.empty(len(self.order), np.float32)
        columns = [self.upper[:, part].double().square().sum(0) for part in chunks(len(costs), _ROWS)]
        costs[self.order.cpu().numpy()] = 1 / np.concatenate([part.cpu().numpy() for part in columns])
        return costs


@contextmanager
def full_float32() -> Iterator[None]:
    """Has float32 products computed in float32, not in TF32, and restores what was set before."""
    import torch

    matmul = torch.backends.cuda.matmul
    named = getattr(matmul, "fp32_precision", None)  # the newer name of the setting, from torch 2.9 on
    try:
        general = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set by its newer name only, and torch refuses to tell it by the older one
        general = None
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if general is not None:
            torch.set_float32_matmul_precision(general)
        if named is not None:
            matmul.fp32_precision = named


def factorize_on_device(hessian: torch.Tensor, options: GptqOptions) -> DeviceFactor:
    """Inverts a Hessian into the triangular factor that the column loop needs.

    One Cholesky of the reversed matrix and one triangular inverse: with H = R R^T for an upper R, U = R^-1. The damping
    grows tenfold up to the mean diagonal where the matrix is not positive definite in float32.

    Args:
        hessian: (K, K) float32, X^T X of the inputs; only its scale is free. Not changed; three matrices of its size
            are needed beside it.
        options: order and damping.

    Raises:
        InputError: it is not finite, or not positive definite whatever the damping.
    """
    import torch

    if not bool(torch.isfinite(hessian).all()):
        raise InputError("the Hessian is not finite: the layer's inputs or their squares are beyond float32")
    diagonal = hessian.diagonal().clone()
    columns = torch.arange(len(diagonal), device=hessian.device)
    order = torch.argsort(diagonal, descending=True, stable=True) if options.act_order else columns
    mean = mean_diagonal(diagonal.cpu().numpy())
    turned = order.flip(0)
    filled = torch.where(diagonal == 0, mean, diagonal)[turned]
    arranged, damping = hessian[turned[:, None], turned], options.damping
    with full_float32():
        while True:
            arranged.diagonal().copy_(filled + damping * mean)
            lower, failed = torch.linalg.cholesky_ex(arranged)
            # a Cholesky of values that are not numbers may end without a word
            if not failed.item() and bool(torch.isfinite(lower.diagonal()).all()):
                break
            damping = more_damping(damping)
        del arranged
        inverse = torch.eye(len(order), device=hessian.device)
        torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    return DeviceFactor(inverse.flip(0, 1), order, diagonal, damping, damping * mean)


def gptq_on_device(
    weight: torch.Tensor, hessian: torch.Tensor | DeviceFactor, grid: Grid, options: GptqOptions, *, threads: int = 1
) -> tuple[QuantizedTensor, GptqReport]:
    """Quantizes a matrix where it lies.

    Args:
        weight: (N, K) of a floating type, finite; not changed. Worked on as float32.
        hessian: (K, K) float32 on the same device, or what `factorize_on_device` made of it, for matrices that share
            their input.
        grid: what kind of grid; its clip search weighs squared errors by `DeviceFactor.importance`.
        options: order and damping; unused where the factor is given.
        threads: workers that fit the grid on the processor; the bytes do not depend on it.

    Raises:
        InputError: a Hessian that cannot be worked with, or weights that are not finite.
        LayoutError: a scale that the stored type cannot hold.
        OutputError: triton is not installed.
    """
    import torch

    factor = hessian if isinstance(hessian, DeviceFactor) else factorize_on_device(hessian, options)
    dead = factor.diagonal == 0
    clean = torch.where(dead, 0.0, weight.to(torch.float32))
    importance = factor.importance() if grid.clip_search else None
    scale, zero = _fitted(clean.cpu().numpy(), grid, importance, threads)
    wide = torch.from_numpy(scale.astype(np.float32)).to(weight.device)
    middle = np.full(scale.shape, 1 << (grid.bits - 1), np.uint8) if zero is None else zero
    zeros = torch.from_numpy(middle).to(weight.device)
    with full_float32():
        codes, losses = _visit_columns(clean, factor, grid, wide, zeros)
    # the column loop minimizes the loss with the damped Hessian: what the damping adds is |W - Q|^2 times it
    square, power = _sums(clean, codes, wide, zeros, factor.diagonal, grid.group(weight.shape[1]))
    loss = max(float(losses.sum()) - factor.added * square, 0.0)
    if not np.isfinite(loss):
        raise InputError("the errors of GPTQ are not finite: the weights or the Hessian are beyond float32")
    report = GptqReport(loss, loss / power if power else 0.0, factor.damping, int(dead.sum()))
    return QuantizedTensor(codes.cpu().numpy(), scale, zero, grid.bits, grid.group(weight.shape[1])), report


def gptq_shared_on_device(
    weights: Sequence[NDArray[np.float32]], hessian: NDArray[np.float32], grids: Sequence[Grid], options: GptqOptions,
    *, drift: NDArray[np.float32] | None = None, share: float = 0.0, device: str = "cuda", threads: int = 1,
) -> list[tuple[QuantizedTensor, GptqReport]]:  # fmt: skip
    """Quantizes matrices with the same input on a device: one factor, then one matrix after the other.

    Args:
        weights: (N, K) float32 each.
        hessian: (K, K) float32 of the inputs.
        grids: one for each matrix.
        options: order and damping.
        drift: (K, K) float32 of the inputs, see `made_up_on_device`; None where there is none to make up for.
        share: of the drift that is made up for.
        device: "cuda", "cuda:1", ...
        threads: workers that fit the grids on the processor.

    Raises:
        UsageError: there is no such device.
        InputError: a Hessian or weights that cannot be worked with.
        LayoutError: a scale that the stored type cannot hold.
        OutputError: triton is not installed.
    """
    import torch

    place = torch.device(device)
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {device}: torch sees {torch.cuda.device_count()} CUDA devices")

    def moved(values: Array) -> torch.Tensor:
        # arrays that may not be written to are copied: torch warns about them, although nothing here writes
        return torch.from_numpy(np.require(values, requirements=["C", "W"])).to(place)

    factor = factorize_on_device(moved(hessian), options)
    wanted = [moved(weight) for weight in weights]
    if drift is not None:
        matrix = moved(drift)
        wanted = [made_up_on_device(weight, factor, matrix, share) for weight in wanted]
    return [
        gptq_on_device(weight, factor, grid, options, threads=threads)
        for weight, grid in zip(wanted, grids, strict=True)
    ]


def made_up_on_device(weight: torch.Tensor, factor: DeviceFactor, drift: torch.Tensor, share: float) -> torch.Tensor:
    """Gives W + share * W D H^-1, as `quantpress.quant.drift.made_up` but where the matrix lies.

    Args:
        weight: (N, K) float32; not changed.
        factor: of H = X^T X / tokens, with its damping.
        drift: (K, K) float32, D = (X' - X)^T X / tokens.
        share: from 0 to 1.

    Raises:
        InputError: the result is not finite.
    """
    import torch

    with full_float32():
        correction = (weight @ drift)[:, factor.order] @ factor.upper.T @ factor.upper
    result = weight.clone()
    result[:, factor.order] += share * correction
    if not bool(torch.isfinite(result).all()):
        raise InputError("the correction for drift is not finite: the weights or their inputs are beyond float32")
    return result


def _fitted(
    weight: NDArray[np.float32], grid: Grid, importance: NDArray[np.float32] | None, threads: int
) -> tuple[Array, NDArray[np.uint8] | None]:
    with Workers(threads) as workers:
        parts = workers.run(partial(fit, weight[rows], grid, importance) for rows in chunks(len(weight), _ROWS))
    scale, zero = zip(*parts, strict=True)
    return np.concatenate(scale), None if grid.symmetric else np.concatenate(zero)


def _visit_columns(
    clean: torch.Tensor, factor: DeviceFactor, grid: Grid, scale: torch.Tensor, zero: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gives the codes (N, K) and the rows' squared errors (N,)."""
    import torch

    try:
        from quantpress.kernels.gptq_block import quantize_block, reference_quantize_block
    except ModuleNotFoundError as error:
        raise OutputError(
            f"GPTQ on a GPU needs {error.name}: pip install 'quantpress[gpu]', or use --device cpu"
        ) from error
    on_chip = clean.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    inner = quantize_block if on_chip else reference_quantize_block
    rows, columns = clean.shape
    groups = factor.order // grid.group(columns)
    work = clean[:, factor.order]
    codes = torch.empty((rows, columns), dtype=torch.uint8, device=clean.device)
    errors = torch.empty((rows, _BLOCK), device=clean.device)
    losses = torch.zeros(rows, dtype=torch.float64, device=clean.device)
    for part in chunks(columns, _BLOCK):
        inner(
            work[:, part], factor.upper[part, part], scale, zero, groups[part], codes, factor.order[part], errors,
            losses, (1 << grid.bits) - 1,
        )  # fmt: skip
        passed = errors[:, : part.stop - part.start]
        if part.stop < columns:
            work[:, part.stop :].addmm_(passed, factor.upper[part, part.stop :], alpha=-1)
    return codes, losses


def _sums(
    clean: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, diagonal: torch.Tensor, size: int
) -> tuple[float, float]:
    """Gives |W - Q|^2 and the sum over j of H_jj |W_j|^2, both in float64."""
    import torch

    groups = torch.arange(clean.shape[1], device=clean.device) // size
    square, power = 0.0, 0.0
    for rows in chunks(len(clean), _ROWS):
        values = scale[rows][:, groups] * (codes[rows].float() - zero[rows][:, groups].float())
        square += float((clean[rows] - values).double().square().sum())
        power += float((clean[rows].double().square() @ diagonal.double()).sum())
    return square, power
