"""Rows of weights out of bytes as ONNX's operators lay them out; no code of the exporter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "HeldRows", "block_rows", "float_rows", "linear_rows", "nibbles", "turned_rows"]

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class HeldRows:
    """Some rows of a weight.

    Attributes:
        numbers: (n, blocks, size) float32, codes less their zero, the last block filled up; floats of a weight that
            has no codes, in one block.
        scale: (n, blocks) float32; None of floats.
        least, most: (n, blocks) the least and greatest number that a code stands for; None of floats.
    """

    numbers: Array
    scale: Array | None = None
    least: Array | None = None
    most: Array | None = None


def _fields(packed: Array, bits: int) -> Array:
    """Codes of a last dimension of bytes, low bits first."""
    if bits == 8:
        return packed
    parts = [(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return np.stack(parts, axis=-1).reshape(*packed.shape[:-1], -1)


def nibbles(flat: Array, signed: bool) -> Array:
    """Gives codes of 4 bits, two to a byte, low bits first."""
    codes = _fields(flat.reshape(-1), 4)
    return (codes.astype(np.int8) ^ 8) - 8 if signed else codes


def _grid(codes: Array, scale: Array, zero: Array, least: int, most: int) -> HeldRows:
    """Codes (n, blocks, size), scale and zero (n, blocks)."""
    zero = zero.astype(np.float32)
    numbers = codes.astype(np.float32) - zero[:, :, None]
    return HeldRows(numbers, np.asarray(scale, np.float32), np.float32(least) - zero, np.float32(most) - zero)


def float_rows(values: Array, start: int, stop: int) -> HeldRows:
    """Gives rows of floats."""
    part = np.asarray(values[start:stop], np.float32)
    return HeldRows(part.reshape(len(part), 1, -1))


def block_rows(
    packed: Array, scale: Array, zeros: Array | None, bits: int, size: int, start: int, stop: int
) -> HeldRows:
    """Gives rows of codes low bits first, as MatMulNBits has them; without zeros they are half of the range."""
    part = scale[start:stop]
    codes = _fields(packed[start:stop], bits).reshape(len(part), -1, size)[:, : part.shape[1]]
    zero = np.full(part.shape, 1 << (bits - 1))
    if zeros is not None:
        zero = _fields(zeros[start:stop], bits)[:, : part.shape[1]]
    return _grid(codes, part, zero, 0, (1 << bits) - 1)


def linear_rows(
    codes: Array, shape: tuple[int, int], scale: Array, zero: Array | None, bits: int, signed: bool, size: int,
    start: int, stop: int,
) -> HeldRows:  # fmt: skip
    """Gives rows of DequantizeLinear's codes (N, K) in blocks along K."""
    columns = shape[1]
    if bits == 4:  # rows of an odd length do not begin at a byte
        first = start * columns // 2
        part = nibbles(codes.reshape(-1)[first : -(-stop * columns // 2)], signed)
        skipped = start * columns - 2 * first
        part = part[skipped : skipped + (stop - start) * columns].reshape(stop - start, columns)
    else:
        part = codes[start:stop]
    blocks = scale.shape[1]
    if blocks * size > columns:
        part = np.pad(part, ((0, 0), (0, blocks * size - columns)))
    offset = np.zeros((stop - start, blocks)) if zero is None else zero[start:stop]
    least = -(1 << (bits - 1)) if signed else 0
    return _grid(part.reshape(len(part), blocks, size), scale[start:stop], offset, least, least + (1 << bits) - 1)


def turned_rows(codes: Array, scale: Array, zero: Array | None, signed: bool, start: int, stop: int) -> HeldRows:
    """Gives rows of codes that are stored as (K, N), with a scale for each row."""
    part = np.ascontiguousarray(codes[:, start:stop].T)
    zeros = np.zeros(len(part)) if zero is None else np.broadcast_to(zero.reshape(-1), (len(scale),))[start:stop]
    least = -128 if signed else 0
    return _grid(part[:, None, :], scale[start:stop, None], zeros[:, None], least, least + 255)
