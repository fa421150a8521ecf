"""GPTQ inside the blocks of ggml's types: codes column by column, on the scales that a type's own search finds.

When the columns of a block come up, the search (`codec.quantize_rows`) sees the weights as the errors of the columns
before have left them, so its scales fit what is to be rounded; they then stay, and only the codes of the block are
found anew, one column after the other, each making up for the errors before (Frantar et al., arXiv 2210.17323). Blocks
are visited whole, the costliest first, and so are the columns inside of each. What comes out is then refined, see
`block_refine`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.block_refine import LANES, SWEEPS, refined
from quantpress.quant.drift import made_up
from quantpress.quant.errors import InputError, LayoutError
from quantpress.quant.ggml.block_parts import BLOCK_GRIDS, BlockGrid, parts, with_codes
from quantpress.quant.ggml.blocks import BlockTensor
from quantpress.quant.ggml.codec import quantize_rows
from quantpress.quant.ggml.types import ggml_type, row_bytes
from quantpress.quant.gptq import Factor, GptqOptions, GptqReport, factorize
from quantpress.quant.workers import Workers, chunks

if TYPE_CHECKING:
    import torch  # at run time it is loaded by the first call: importing this module stays cheap

__all__ = ["block_gptq_shared"]

Array = NDArray[Any]

_ROWS = LANES  # of a chunk
_PASSED = 64  # columns whose errors are passed on together, at most


def block_gptq_shared(
    weights: Sequence[NDArray[np.float32]], hessian: NDArray[np.float32], kinds: Sequence[str],
    options: GptqOptions | None = None, *, drift: NDArray[np.float32] | None = None, share: float = 0.0,
    sweeps: int = SWEEPS, threads: int = 1,
) -> list[tuple[BlockTensor, GptqReport]]:  # fmt: skip
    """Quantizes matrices with the same input, each to a type of its own, each as it would be alone.

    Args:
        weights: (N, K) float32 each, finite; not changed. K is a multiple of each type's block.
        hessian: (K, K) float32, X^T X / tokens of the inputs; not changed.
        kinds: names of types, one for each matrix, of `block_parts.BLOCK_GRIDS`.
        options: order and damping.
        drift: (K, K) float32 as for `quant.drift.made_up`, where weights are to make up for it.
        share: how much of it.
        sweeps: rounds of `block_refine.refined`.
        threads: workers; the bytes do not depend on it.

    Raises:
        InputError: a Hessian that cannot be worked with.
        LayoutError: a type that has no codes to be found, a K that its blocks do not divide, or a scale that it cannot
            hold.
    """
    options = options or GptqOptions()
    for kind, weight in zip(kinds, weights, strict=True):
        row_bytes(ggml_type(kind), weight.shape[1])
    sizes = {_block_size(kind) for kind in kinds}
    results: dict[int, tuple[BlockTensor, GptqReport]] = {}
    for size in sorted(sizes):
        factor = factorize(hessian, options, threads, order=_visiting_order(hessian.diagonal(), size, options))
        chosen = [number for number, kind in enumerate(kinds) if _block_size(kind) == size]
        own = [weights[number] for number in chosen]
        if drift is not None:
            own = made_up(own, factor, drift, share, threads)
        found = _run(own, factor, hessian, [kinds[number] for number in chosen], sweeps, threads)
        results |= dict(zip(chosen, found, strict=True))
    return [results[number] for number in range(len(kinds))]


def _block_size(kind: str) -> int:
    if kind not in BLOCK_GRIDS:
        raise LayoutError(f"GPTQ finds no codes of {kind}; there are {', '.join(BLOCK_GRIDS)}")
    return ggml_type(kind).block_size


def _visiting_order(diagonal: Array, size: int, options: GptqOptions) -> NDArray[np.int64]:
    """Columns in the order they are visited: block by block."""
    places = np.arange(len(diagonal)).reshape(-1, size)
    if not options.act_order:
        return places.reshape(-1)
    power = diagonal.reshape(-1, size)
    blocks = np.argsort(-power.sum(axis=1, dtype=np.float64), kind="stable")
    inside = np.argsort(-power, axis=1, kind="stable")
    return np.take_along_axis(places, inside, axis=1)[blocks].reshape(-1)


def _run(
    weights: Sequence[NDArray[np.float32]], factor: Factor, hessian: NDArray[np.float32], kinds: Sequence[str],
    sweeps: int, threads: int,
) -> list[tuple[BlockTensor, GptqReport]]:  # fmt: skip
    import torch

    # in torch's own memory: a product may differ in the last bit with the alignment of what it reads
    upper, metric = torch.from_numpy(factor.upper), torch.empty(hessian.shape).copy_(torch.from_numpy(hessian))
    importance = factor.importance
    parts_of = [(matrix, rows) for matrix, weight in enumerate(weights) for rows in chunks(len(weight), _ROWS)]
    with Workers(threads) as workers:
        done = workers.run(
            partial(_quantize_chunk, weights[matrix][rows], factor, upper, metric, kinds[matrix], importance, sweeps)
            for matrix, rows in parts_of
        )
    results = []
    for matrix, kind in enumerate(kinds):
        own = [result for (which, _), result in zip(parts_of, done, strict=True) if which == matrix]
        loss, power = sum(part.loss for part in own), sum(part.power for part in own)
        if not math.isfinite(loss):
            raise InputError("the errors of GPTQ are not finite: the weights or their errors are beyond float32")
        tensor = BlockTensor(kind, np.concatenate([part.data for part in own]))
        report = GptqReport(loss, loss / power if power else 0.0, factor.damping, int(factor.dead.sum()))
        results.append((tensor, report))
    return results


@dataclass(frozen=True, eq=False, slots=True)
class _Chunk:
    data: NDArray[np.uint8]
    loss: float
    power: float


def _quantize_chunk(
    weight: NDArray[np.float32], factor: Factor, upper: torch.Tensor, metric: torch.Tensor, kind: str,
    importance: Array, sweeps: int,
) -> _Chunk:  # fmt: skip
    """Quantizes at most `_ROWS` rows (n, K); on one thread."""
    clean = np.ascontiguousarray(np.where(factor.dead, np.float32(0), weight) if factor.dead.any() else weight)
    data = _visit_blocks(clean, factor, upper, kind, importance)
    data = refined(clean, data, metric, factor.added, kind, sweeps)
    loss = _loss(clean - BlockTensor(kind, data).dequantize(), metric)
    power = float(np.square(clean, dtype=np.float64).sum(axis=0) @ factor.diagonal.astype(np.float64))
    return _Chunk(data, loss, power)


def _loss(error: NDArray[np.float32], metric: torch.Tensor) -> float:
    import torch

    own = torch.zeros((_ROWS, error.shape[1]))
    own[: len(error)] = torch.from_numpy(error)
    return max(float((own.double() * (own @ metric).double()).sum()), 0.0)


def _visit_blocks(clean: Array, factor: Factor, upper: torch.Tensor, kind: str, importance: Array) -> NDArray[np.uint8]:
    """Gives the blocks of rows (n, K), the scales of each found when it comes up."""
    import torch

    from quantpress.quant.gptq_kernels import gather

    rows, columns = clean.shape
    grid, stored = BLOCK_GRIDS[kind], ggml_type(kind)
    work = torch.zeros((columns, _ROWS))  # always as many lanes: each row takes the same path, wherever it stands
    gather(clean, factor.order, work.numpy())
    data = np.empty((rows, columns // stored.block_size, stored.block_bytes), np.uint8)
    for part in chunks(columns, stored.block_size):
        inside, number = factor.order[part] % stored.block_size, int(factor.order[part.start]) // stored.block_size
        current = np.empty((rows, stored.block_size), np.float32)
        current[:, inside] = work.numpy()[part, :rows].T
        found = quantize_rows(kind, current, importance[number * stored.block_size :][: stored.block_size])
        codes = _block_codes(work, part, inside, upper, grid, parts(kind, found))
        natural = np.empty((rows, stored.block_size), np.uint8)
        natural[:, inside] = codes[:, :rows].T
        data[:, number] = with_codes(kind, found, natural)
    return data.reshape(rows, -1)


def _block_codes(
    work: torch.Tensor, block: slice, inside: Array, upper: torch.Tensor, grid: BlockGrid,
    scales: tuple[Array, Array, int],
) -> NDArray[np.uint8]:  # fmt: skip
    """Gives the codes of a block's columns in visiting order, (columns, lanes), and passes their errors on."""
    import torch

    from quantpress.quant.block_gptq_kernels import round_columns

    step, offset, group = scales
    steps, offsets = np.zeros((2, step.shape[1], _ROWS), np.float32)
    steps[:, : len(step)], offsets[:, : len(step)] = step.T, offset.T
    codes, errors = np.empty((len(inside), _ROWS), np.uint8), torch.empty((_PASSED, _ROWS))
    for own in chunks(len(inside), _PASSED):
        part = slice(block.start + own.start, block.start + own.stop)
        passed = errors[: own.stop - own.start]
        round_columns(
            work.numpy()[part], upper.numpy()[part, part], steps, offsets, inside[own] // group, grid.levels,
            codes[own], passed.numpy(), grid.even,
        )  # fmt: skip
        if part.stop < len(work):
            work[part.stop :].addmm_(upper[part, part.stop :].T, passed, alpha=-1)
    return codes
