"""What a weight of a file has of its source's: factor, errors of rows and blocks, and codes that are not the nearest.

Errors are counted in steps of the weight's own grid: one limit serves every type. Rounding to nearest (RTN, HQQ) leaves
no value more than half a step from its code, except where the grid ends; GPTQ and AWQ's folded scales do. The
most in 72 good files of four trained models of 0.3 to 6 million parameters:

4 bits:  factor 1 +- 0.012, GPTQ 0.050, AWQ 0.062; relative error 0.10, 0.27, 0.20, of a row 0.13, 0.35, 0.55; mean of
         a tensor 0.012, 0.022, 0.019, row 0.14, 0.29, 0.30, block 0.28, 1.4, 0.90; square of a block 0.54, 2.4, 2.7
8 bits:  GPTQ: factor 1 +- 0.0004, relative error 0.011, row 0.19, block 0.59, square of a block 1.3
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.pipelines.content_proof import Finding
from quantpress.pipelines.onnx_proof_read import HeldWeight
from quantpress.pipelines.onnx_proof_rows import HeldRows

__all__ = ["LOOSE", "Figures", "ReadRows", "judge_codes", "judge_floats", "judge_loose", "measure"]

Array = NDArray[Any]
ReadRows = Callable[[int, int], Array]
"""`(start, stop)` -> rows of the source, (n, K) float32."""

_CHUNK = 1 << 19  # values that are compared at once
_NEAR = 0.51  # of a step: half, and what rounding of float32 adds
_ROUNDING = {"FLOAT": 2.0**-24, "FLOAT16": 2.0**-11, "BFLOAT16": 2.0**-8, "DOUBLE": 2.0**-24}
_MERGED = 2.0**-20  # of the greatest value: sums of an adapter's products may be added up in another order
_LEAST_STEP = {"FLOAT16": 2.0**-24, "FLOAT": 2.0**-126}  # a scale of 0 stands for less than half of these
_SUBNORMAL = 2.0**-25
_FARTHEST = 1e4  # steps that an error is counted as at most
# bits -> how far the factor may be from 1 (times 1.1 is 0.091), and the relative error; 3 and 2: of tiny random models
_FACTOR = {8: 0.02, 4: 0.065, 3: 0.25, 2: 0.5}
_RELATIVE = {8: 0.1, 4: 0.7, 3: 0.9, 2: 1.2}
_SPREAD, _SPREADS = 0.75, 0.45  # steps of errors that are no factor, and how far the factor goes with what is above
_SHRINKS = 0.6  # of the squared relative error: values with errors in them are longer by as much
_TENSOR_MEAN, _ROW_MEAN, _BLOCK_MEAN, _BLOCK_SQUARE = 0.15, 0.5, 2.0, 3.0
_ROW_ERROR = 0.9  # of a row's own length
LOOSE = {"~int8": 0.1, "~fp8": 0.1, "~int4": 0.4}
"""Kinds of weights whose grid is not known here, and their greatest relative error."""
_LOOSE_FACTOR = 0.08
_KEPT = 0.25  # of a step, where the source has these very codes and numbers in 16 bits


@dataclass(frozen=True, slots=True)
class Figures:
    """A weight beside its source's; arrays are (rows,) or (rows, blocks).

    Attributes:
        name: what messages call it.
        bits: of a code, 0 of floats.
        count: values.
        source, both, held: per row, the sums of w * w, w * v and v * v for w of the source and v of the file.
        mean, square: per block, mean and mean square of the error in steps.
        outer: per block, the greatest error of a value whose code is not the nearest one; 0 where all are.
        worst: per block, the greatest error.
        excess: of floats, the greatest error over what rounding explains; `place` is its row.
        columns: values of a row.
        dtype: of the weight, see `HeldWeight`.
    """

    name: str
    bits: int
    count: int
    columns: int
    source: Array
    both: Array
    held: Array
    mean: Array
    square: Array
    outer: Array
    worst: Array
    excess: float = 0.0
    place: int = 0
    dtype: str = ""

    @property
    def nearest(self) -> bool:
        """Whether every value has its nearest code."""
        return not self.outer.any()

    @property
    def factor(self) -> float:
        """What the file's values have to be multiplied by to be nearest to the source's."""
        held = float(self.held.sum())
        return float(self.both.sum()) / held if held else 0.0 if self.source.any() else 1.0

    @property
    def relative(self) -> float:
        """Relative error of all values."""
        whole = float(self.source.sum())
        return float(np.sqrt(max(self.errors.sum(), 0.0) / whole)) if whole else float(np.sqrt(self.held.sum()))

    @property
    def spread(self) -> float:
        """Root mean square of the error in steps, without what a factor on all values explains."""
        both, whole, held = (float(each.sum()) for each in (self.both, self.source, self.held))
        if not whole or not held or not self.errors.sum() > 0:
            return 0.0
        share = max(1 - both * both / (whole * held), 0.0) * whole / float(self.errors.sum())
        return float(np.sqrt(share * self.square.mean()))

    @property
    def errors(self) -> Array:
        """Squared error of each row."""
        found: Array = self.source - 2 * self.both + self.held
        return found

    @property
    def row_factors(self) -> Array:
        """What each row of the source has been multiplied by; NaN where there is nothing."""
        nothing = np.full(len(self.both), np.nan)
        found: Array = np.divide(self.both, self.source, out=nothing, where=self.source > 0)
        return found


def measure(
    held: HeldWeight, source: ReadRows, *, columns: Array | None = None, rows: Array | None = None, name: str = ""
) -> Figures:
    """Compares row by row.

    Args:
        held: of the file.
        source: reads the same rows of the source.
        columns: (K,) what the source's columns are to be multiplied by first.
        rows: (N,) the same of its rows.
        name: for messages; by default the initializer's.
    """
    count, width = held.shape[0], int(np.prod(held.shape[1:], dtype=np.int64))
    step = max(1, _CHUNK // max(width, 1))
    parts, excess, place = list[tuple[Array, ...]](), 0.0, 0
    for start in range(0, count, step):
        stop = min(start + step, count)
        wanted = np.asarray(source(start, stop), np.float32).reshape(stop - start, -1)
        if columns is not None:
            wanted = wanted * columns
        if rows is not None:
            wanted = wanted * rows[start:stop, None]
        if held.order is not None:
            wanted = wanted[:, held.order]
        found = held.read(start, stop)
        if held.bits:
            parts.append(_codes(found, wanted, _LEAST_STEP.get(held.dtype, 2.0**-126)))
            continue
        sums, most, row = _floats(found.numbers.reshape(wanted.shape), wanted, held.dtype)
        parts.append(sums)
        if most > excess:
            excess, place = most, start + row
    joined = [np.concatenate(each) for each in zip(*parts, strict=True)]
    named = dict(zip(_ARRAYS, joined, strict=True))
    return Figures(
        name or held.name, held.bits, count * width, width, **named, excess=excess, place=place, dtype=held.dtype
    )


_ARRAYS = ("source", "both", "held", "mean", "square", "outer", "worst")


def _sums(wanted: Array, found: Array) -> tuple[Array, Array, Array]:
    wide = wanted.astype(np.float64)
    return (
        np.einsum("nk,nk->n", wide, wide),
        np.einsum("nk,nk->n", wide, found),
        np.einsum("nk,nk->n", found, found, dtype=np.float64),
    )


def _codes(found: HeldRows, wanted: Array, least_step: float) -> tuple[Array, ...]:
    assert found.scale is not None, "these are codes"
    assert found.least is not None, "these are codes"
    assert found.most is not None, "these are codes"
    count, blocks, size = found.numbers.shape
    values = (found.numbers * found.scale[:, :, None]).reshape(count, -1)[:, : wanted.shape[1]]
    sums = _sums(wanted, values.astype(np.float64))
    rest = blocks * size - wanted.shape[1]
    filled = np.pad(wanted, ((0, 0), (0, rest))) if rest else wanted
    step = np.where(found.scale == 0, np.float32(least_step), found.scale)[:, :, None]
    with np.errstate(over="ignore", invalid="ignore"):
        error = found.numbers - filled.reshape(count, blocks, size) / step
    if rest:
        error.reshape(count, -1)[:, wanted.shape[1] :] = 0
    error = np.clip(np.nan_to_num(error, nan=_FARTHEST), -_FARTHEST, _FARTHEST)
    size_of = np.abs(error)
    at_end = (found.numbers <= found.least[:, :, None]) & (error > 0)
    at_end |= (found.numbers >= found.most[:, :, None]) & (error < 0)
    outer = np.where((size_of > _NEAR) & ~at_end, size_of, 0).max(axis=2)
    used = np.full(blocks, size, np.float32)
    used[-1] -= rest
    square = np.einsum("nbk,nbk->nb", error, error, dtype=np.float64) / used
    return (*sums, error.sum(axis=2, dtype=np.float64) / used, square, outer, size_of.max(axis=2))


def _floats(found: Array, wanted: Array, dtype: str) -> tuple[tuple[Array, ...], float, int]:
    same = (found == wanted) | (np.isnan(found) & np.isnan(wanted))
    with np.errstate(invalid="ignore", over="ignore"):
        size_of = np.abs(wanted)
        greatest = float(np.max(size_of, initial=0, where=np.isfinite(size_of)))
        limit = size_of * np.float32(_ROUNDING.get(dtype, 1.0) * (1 + 2.0**-6)) + np.float32(greatest * _MERGED + 1e-37)
        if dtype == "FLOAT16":
            limit += np.float32(_SUBNORMAL)
        excess = np.where(same, 0, np.nan_to_num(np.abs(found - wanted) / limit, nan=np.inf))
    worst = int(excess.argmax()) if excess.size else 0
    usable = np.isfinite(found) & np.isfinite(wanted)
    sums = _sums(np.where(usable, wanted, 0), np.where(usable, found, 0).astype(np.float64))
    none = np.zeros((len(wanted), 1))
    most = float(excess.reshape(-1)[worst]) if excess.size else 0.0
    return (*sums, none, none, none, none), most, worst // max(wanted.shape[1], 1)


def judge_floats(figures: Figures) -> list[Finding]:
    """Says what is wrong with floats: nothing but rounding to their type may have changed them."""
    if figures.excess <= 1:
        return []
    found = f"row {figures.place} is off by {figures.excess:.3g} times what rounding to its type explains"
    found += f", all of it by {figures.relative:.2%}"
    return [Finding("weights", figures.name, found, "the source's values")]


def judge_loose(figures: Figures) -> list[Finding]:
    """Says what is wrong with numbers that come from a grid which is not known here."""
    limit, factor = LOOSE[figures.dtype], figures.factor
    if not np.isfinite(figures.relative) or figures.relative > limit:
        return [Finding("weights", figures.name, f"relative error {figures.relative:.3g}", f"at most {limit}")]
    if figures.source.any() and abs(factor - 1) > _LOOSE_FACTOR:
        found = f"the source's values times {1 / factor if factor else 0:.3f}"
        return [Finding("weights", figures.name, found, f"1 +- {_LOOSE_FACTOR}")]
    whole = figures.source > 0
    error = np.sqrt(np.maximum(figures.errors[whole], 0) / figures.source[whole])
    if error.max(initial=0) > _ROW_ERROR:
        row = int(np.flatnonzero(whole)[error.argmax()])
        found = f"row {row} has a relative error of {error.max():.2f}"
        return [Finding("weights", figures.name, found, f"at most {_ROW_ERROR}")]
    return []


def judge_codes(figures: Figures, *, nearest: bool, kept: bool = False) -> list[Finding]:
    """Says what is wrong with codes; at most one finding, the plainest.

    Args:
        figures: of the weight.
        nearest: the file was made by a method that chooses the nearest codes.
        kept: the source has codes itself, so the very same ones are wanted if most are.
    """
    bits = figures.bits if figures.bits in _FACTOR else 8 if figures.bits > 4 else 4
    factor, relative, name = figures.factor, figures.relative, figures.name

    def finding(found: str, wanted: str) -> list[Finding]:
        return [Finding("weights", name, found, wanted)]

    if not np.isfinite(relative) or relative > _RELATIVE[bits]:
        return finding(f"relative error {relative:.3g}", f"at most {_RELATIVE[bits]} for {figures.bits} bits")
    coarse = 2.0 ** max(4 - bits, 0)  # a step of fewer bits is a larger share of a value
    allowed = max(_FACTOR[bits], _SHRINKS * relative**2, _SPREADS * coarse * (figures.spread - _SPREAD))
    if figures.source.any() and abs(factor - 1) > allowed:
        return finding(f"the source's values times {1 / factor if factor else 0:.3f}", f"1 +- {allowed:.3f}")
    if kept and float(np.median(figures.worst)) < _KEPT / 4:
        if (worst := float(figures.worst.max())) > _KEPT:
            return finding(f"{_where(figures.worst)} is {worst:.3g} steps off", "the codes of the source")
        return []
    mean = float(np.average(figures.mean)) if figures.mean.size else 0.0
    if abs(mean) > (_TENSOR_MEAN if figures.count >= 1024 else _ROW_MEAN):
        return finding(f"{mean:+.2f} steps off in the mean", f"at most {_TENSOR_MEAN}")
    if nearest and not figures.nearest:
        found = f"{_where(figures.outer)} has a code {figures.outer.max():.3g} steps from its value"
        return finding(found, "the nearest codes")
    return _outliers(figures, finding)


def _outliers(figures: Figures, finding: Callable[[str, str], list[Finding]]) -> list[Finding]:
    """Rows and blocks that stand out by more than any method explains."""
    means = np.abs(figures.mean.mean(axis=1))
    wide = max(1.0, figures.spread)
    limit = (_ROW_MEAN + 4 / np.sqrt(figures.columns)) * wide
    if means.max(initial=0) > limit:
        return finding(f"row {means.argmax()} is {means.max():.2f} steps off in the mean", f"at most {limit:.2f}")
    square = np.sqrt(figures.square.max(initial=0))
    if square > _BLOCK_SQUARE * wide:
        return finding(f"{_where(figures.square)} is {square:.3g} steps off", f"at most {_BLOCK_SQUARE * wide:.2f}")
    if np.abs(figures.mean).max(initial=0) > _BLOCK_MEAN * wide:
        where, most = _where(np.abs(figures.mean)), np.abs(figures.mean).max()
        return finding(f"{where} is {most:.2f} steps off in the mean", f"at most {_BLOCK_MEAN * wide:.2f}")
    whole = figures.source > 0
    error = np.sqrt(np.maximum(figures.errors[whole], 0) / figures.source[whole])
    if figures.bits >= 3 and error.max(initial=0) > _ROW_ERROR * wide:
        row = int(np.flatnonzero(whole)[error.argmax()])
        return finding(f"row {row} has a relative error of {error.max():.2f}", f"at most {_ROW_ERROR * wide:.2f}")
    return []


def _where(blocks: Array) -> str:
    row, block = np.unravel_index(int(blocks.argmax()), blocks.shape)
    return f"row {row}, block {block}"
