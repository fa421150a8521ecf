"""What a tensor of a GGUF file has of its source's: scale, and errors of the whole, of rows and of blocks.

Relative errors in root mean square are what a type is known by: whatever chose the codes, rounding to nearest with or
without importance leaves a tensor within twice the type's own error. GPTQ moves values on purpose, to make up for the
errors of others, so a file of which most tensors have more than that is held to wider limits. A scale is off where both
<w,v>/<v,v> and <w,v>/<w,w> are: an error that is orthogonal to v leaves the first at 1, one orthogonal to w the second.

Measured on three trained models of 0.3, 0.9 and 6 million parameters, every type, plain, with importance and by GPTQ:
all figures of good files lie below half of the limits here, but for Q2_K's scale under GPTQ (0.069 of 0.085).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ERRORS", "Figures", "Limits", "differing_floats", "measure"]

Array = NDArray[Any]
# type -> relative error in root mean square of weights like a Gaussian's, the worst tensor of what was measured
ERRORS = {
    "Q8_0": 0.006, "Q6_K": 0.019, "Q5_K": 0.037, "Q5_1": 0.042, "Q5_0": 0.05, "Q4_K": 0.078, "IQ4_NL": 0.084,
    "IQ4_XS": 0.084, "Q4_1": 0.086, "Q4_0": 0.096, "MXFP4": 0.15, "NVFP4": 0.15, "Q3_K": 0.16, "IQ3_S": 0.2,
    "IQ3_XXS": 0.25, "Q2_K": 0.3, "IQ2_S": 0.4, "IQ2_XS": 0.4, "IQ2_XXS": 0.4,
}  # fmt: skip
_ROUNDING = {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8, "F64": 2.0**-24}
_SUBNORMAL = {"F16": 2.0**-25}
_MERGED = 2.0**-7  # of a value, where adapters were merged: in bfloat16 by other programs
_BLOCK, _SUPER, _SUPERS = 32, 256, ("_K", "_XS", "_S", "_XXS")
_CHUNK = 1 << 20  # values that are compared at once


@dataclass(frozen=True, slots=True)
class Limits:
    """What a type explains.

    Attributes:
        whole: relative error of a tensor.
        scale: how far its scale may be from 1.
        row: relative error of a row.
        block_scale: how far the scale of a block may be from 1.
        block: error of 32 values, relative to the values of the block that shares their scale.
    """

    whole: float
    scale: float
    row: float
    block_scale: float
    block: float

    @classmethod
    def of(cls, kind: str, *, plain: bool) -> Limits:
        """Gives the limits of a type.

        Args:
            kind: name of a ggml type in `ERRORS`.
            plain: the file's codes were chosen by rounding to nearest.
        """
        error = ERRORS[kind]
        coarse, wide, many = 0.085 if error >= 0.2 else 0.06, error >= 0.15, kind.endswith(_SUPERS)
        if plain:  # 256 values tell a scale more exactly than 32
            block = 0.003 + (0.8 if many else 1.7) * error
            return cls(2 * error, min(0.003 + error / 2, coarse), 4 * error, block, 0.01 + 6 * error)
        block = 0.4 if wide else 0.15 if many else 0.25
        return cls(0.8 if wide else 0.6, coarse if wide else 0.05, 0.9, block, 1.8 if wide else 1.2)


@dataclass(frozen=True, slots=True)
class Figures:
    """A tensor beside its source's.

    Attributes:
        whole: relative error in root mean square.
        factor: what the source's values seem to have been multiplied by.
        scale: how far that is from 1, as the module says.
        row, row_number: greatest relative error of a row, and which.
        block_scale, block_scale_place: how far the scale of a block is from 1 at most; row and block.
        block, block_place: greatest error of 32 values; row and block of 32.
    """

    whole: float
    factor: float
    scale: float
    row: float
    row_number: int
    block_scale: float
    block_scale_place: tuple[int, int]
    block: float
    block_place: tuple[int, int]

    def problem(self, limits: Limits) -> tuple[str, str] | None:
        """What is found and what was wanted, the plainest first; None where the type explains everything."""
        if not self.whole <= limits.whole:
            return f"relative error {self.whole:.3g}", f"at most {limits.whole:.3g} for its type"
        if not self.scale <= limits.scale:
            return f"the source's values times {self.factor:.3f}", f"1 +- {limits.scale:.3g}"
        if not self.row <= limits.row:
            return f"relative error {self.row:.3g} in row {self.row_number}", f"at most {limits.row:.3g}"
        if not self.block_scale <= limits.block_scale:
            row, block = self.block_scale_place
            return f"scale of row {row}, block {block} off by {self.block_scale:.2g}", f"{limits.block_scale:.2g}"
        if not self.block <= limits.block:
            row, block = self.block_place
            return f"relative error {self.block:.3g} in row {row}, block {block}", f"at most {limits.block:.3g}"
        return None


def measure(wanted: Array, found: Array, kind: str) -> Figures:
    """Compares a tensor with its source.

    Args:
        wanted: (N, K) float32, of the source.
        found: (N, K) float32, of the file.
        kind: name of the ggml type.
    """
    count, width = wanted.shape
    size = _BLOCK if width % _BLOCK == 0 else width
    wide = _SUPER if kind.endswith(_SUPERS) and width % _SUPER == 0 else size
    sums = np.empty((3, count, width // size), np.float64)
    step = max(1, _CHUNK // width)
    for start in range(0, count, step):
        a, b = (each[start : start + step].reshape(-1, width // size, size) for each in (wanted, found))
        for number, (one, other) in enumerate(((a, a), (a, b), (b, b))):
            sums[number, start : start + step] = np.einsum("nbk,nbk->nb", one, other)
    grouped = sums.reshape(3, count, width // wide, wide // size).sum(axis=3)
    rows = grouped.sum(axis=2)
    whole = rows.sum(axis=1)
    # a block of nothing is compared with the least that its tensor has elsewhere: codes cannot be finer than a scale
    floor = 1e-6 * whole[0] / max(wanted.size, 1)
    errors = sums[0] - 2 * sums[1] + sums[2]
    near = np.repeat(grouped[0] / (wide // size), wide // size, axis=1)
    block = np.sqrt(np.maximum(errors, 0) / np.maximum(near, floor * size))
    row = np.sqrt(np.maximum(rows[0] - 2 * rows[1] + rows[2], 0) / np.maximum(rows[0], floor * width))
    off = np.where(grouped[0] > floor * wide, _scale_off(grouped), 0)
    return Figures(
        whole=_root(whole),
        factor=float(whole[1] / whole[0]) if whole[0] else 1.0,
        scale=float(_scale_off(whole[:, None])[0]) if whole[0] else 0.0,
        row=_most(row), row_number=int(row.argmax()),
        block_scale=_most(off), block_scale_place=_place(off),
        block=_most(block), block_place=_place(block),
    )  # fmt: skip


def _scale_off(sums: Array) -> Array:
    """How far scales are from 1, of sums (3, ...): w * w, w * v, v * v."""
    with np.errstate(divide="ignore", invalid="ignore"):
        both = np.minimum(np.abs(sums[1] / sums[2] - 1), np.abs(sums[1] / sums[0] - 1))
    return np.where(sums[2] == 0, np.where(sums[0] == 0, 0.0, 1.0), both)


def _root(whole: Array) -> float:
    error = max(float(whole[0] - 2 * whole[1] + whole[2]), 0.0)
    if whole[0] == 0:
        return 0.0 if error == 0 else float("inf")
    return float(np.sqrt(error / whole[0])) if np.isfinite(error) else float("inf")


def _most(values: Array) -> float:
    return float(np.nan_to_num(values, nan=np.inf).max(initial=0))


def _place(values: Array) -> tuple[int, int]:
    row, block = np.unravel_index(int(np.nan_to_num(values, nan=np.inf).argmax()), values.shape)
    return int(row), int(block)


def differing_floats(wanted: Array, found: Array, kind: str, *, merged: bool) -> tuple[str, str] | None:
    """Says what is wrong with a tensor that is stored in floats: nothing but rounding to its type may have changed it.

    Args:
        wanted: float32, of the source.
        found: float32 of the same shape, of the file.
        kind: "F32", "F16", "BF16" or "F64".
        merged: adapters were merged into the source, so that sums may have been rounded on the way.
    """
    rows = wanted.reshape(len(wanted) if wanted.ndim > 1 else 1, -1)
    others = found.reshape(rows.shape)
    step = max(1, _CHUNK // max(rows.shape[1], 1))
    worst, place = 0.0, 0
    for start in range(0, len(rows), step):
        a, b = rows[start : start + step], others[start : start + step]
        size = np.abs(a)
        limit = size * np.float32(_ROUNDING[kind] * (1 + 2.0**-6)) + np.float32(_SUBNORMAL.get(kind, 0) + 1e-38)
        if merged:
            limit += np.float32(_MERGED) * (size + np.sqrt(np.mean(np.square(a), axis=1, keepdims=True)))
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        with np.errstate(invalid="ignore"):
            excess = np.where(same, 0, np.nan_to_num(np.abs(a - b) / limit, nan=np.inf, posinf=np.inf))
        if excess.size and (most := float(excess.max())) > worst:
            worst, place = most, start + int(np.unravel_index(int(excess.argmax()), excess.shape)[0])
    if worst <= 1:
        return None
    where = f"row {place}" if wanted.ndim > 1 else "a value"
    return f"{where} is off by {worst:.3g} times what rounding explains", "the source's values"
