"""Blocks taken apart: the steps and offsets that codes are multiplied with, and the codes alone.

A weight is `step * level[code] + offset` for the types of `BLOCK_GRIDS`. A method that finds codes by other means than
a type's own search lets that search find the scales, reads them here and puts its own codes into the same blocks.
Layouts: ggml-common.h; `k`, `legacy` and `iq` decode them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.errors import LayoutError
from quantpress.quant.ggml.types import ggml_type

__all__ = ["BLOCK_GRIDS", "BlockGrid", "codes_of", "parts", "with_codes"]

Floats: TypeAlias = NDArray[np.float32]
Bytes: TypeAlias = NDArray[Any]  # uint8; numpy's stubs lose that where bits are shifted
Scales: TypeAlias = tuple[Floats, "Floats | None"]

_NIBBLES = np.array([0, 4], np.uint8)[:, None]
_BIT_PAIRS = np.array([0, 2, 4, 6], np.uint8)[:, None]
_BITS = np.arange(8, dtype=np.uint8)[:, None]
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True, slots=True)
class BlockGrid:
    """How the blocks of a type are made up.

    Attributes:
        group: weights that share a step (and an offset).
        levels: (L,) float32 rising: what a code stands for before the step. Evenly spaced by 1 for all types but IQ4.
        affine: whether groups have an offset.
        scales: (B, block bytes) uint8 -> steps and offsets, (B, groups of a block) float32 each; no offsets for types
            that are not affine.
        read: (B, block bytes) uint8 -> codes (B, weights of a block) uint8, each less than L.
        write: blocks and codes, as above; the codes of the blocks are overwritten.
    """

    group: int
    levels: Floats
    affine: bool
    scales: Callable[[Bytes], Scales]
    read: Callable[[Bytes], Bytes]
    write: Callable[[Bytes, Bytes], None]

    @property
    def even(self) -> bool:
        """Whether levels follow each other at a distance of 1."""
        return bool((np.diff(self.levels) == 1).all())


def parts(kind: str, data: Bytes) -> tuple[Floats, Floats, int]:
    """Gives what the codes of a matrix are multiplied with and moved by.

    Args:
        kind: name of the type, one of `BLOCK_GRIDS`.
        data: (N, row bytes) uint8.

    Returns:
        Steps (N, G) float32, offsets (N, G) float32 (0 for types that have none), and the columns of a group.

    Raises:
        LayoutError: the type is not one of those.
    """
    grid = _grid(kind)
    step, offset = grid.scales(_blocks(kind, data))
    step = step.reshape(len(data), -1)
    return step, np.zeros_like(step) if offset is None else offset.reshape(len(data), -1), grid.group


def codes_of(kind: str, data: Bytes) -> Bytes:
    """Gives the codes of a matrix, (N, K) uint8; `data` as for `parts`."""
    return np.ascontiguousarray(_grid(kind).read(_blocks(kind, data)).reshape(len(data), -1))


def with_codes(kind: str, data: Bytes, codes: Bytes) -> Bytes:
    """Gives the same blocks with other codes.

    Args:
        kind: name of the type, one of `BLOCK_GRIDS`.
        data: (N, row bytes) uint8; not changed.
        codes: (N, K) uint8, each less than the number of levels.

    Returns:
        (N, row bytes) uint8.

    Raises:
        LayoutError: the type is none of those, or the codes do not fit the blocks.
    """
    grid, size = _grid(kind), ggml_type(kind).block_size
    blocks = _blocks(kind, data).copy()
    if codes.shape != (len(data), len(blocks) // max(len(data), 1) * size):
        raise LayoutError(f"{kind}: codes of shape {codes.shape} do not fit blocks of shape {data.shape}")
    if codes.size and int(codes.max()) >= grid.levels.size:
        raise LayoutError(f"{kind}: code {int(codes.max())}, there are {grid.levels.size}")
    grid.write(blocks, np.ascontiguousarray(codes).reshape(-1, size))
    return blocks.reshape(data.shape)


def _grid(kind: str) -> BlockGrid:
    grid = BLOCK_GRIDS.get(kind)
    if grid is None:
        raise LayoutError(f"{kind} has no steps that codes could be found for; there are {', '.join(BLOCK_GRIDS)}")
    return grid


def _blocks(kind: str, data: Bytes) -> Bytes:
    return np.ascontiguousarray(data).reshape(-1, ggml_type(kind).block_bytes)


def _half(blocks: Bytes, place: int) -> Floats:
    """The float16 at a byte of each block, (B, 1) float32."""
    return np.ascontiguousarray(blocks[:, place : place + 2]).view("<f2").astype(np.float32)


def _planes(blocks: Bytes, place: int, bits: int) -> Bytes:
    """Codes (B, 256) of `bits` bits, plane after plane of 32 in 32 bytes; from byte `place` on."""
    shifts = (_BIT_PAIRS if bits == 2 else _NIBBLES).reshape(1, 1, -1, 1)
    packed = blocks[:, place : place + 32 * bits].reshape(len(blocks), bits, 1, 32)
    return ((packed >> shifts) & np.uint8((1 << bits) - 1)).reshape(len(blocks), 256)


def _put_planes(blocks: Bytes, place: int, codes: Bytes, bits: int) -> None:
    shifts = (_BIT_PAIRS if bits == 2 else _NIBBLES).reshape(1, 1, -1, 1)
    planes = codes.reshape(len(blocks), bits, 8 // bits, 32) << shifts
    blocks[:, place : place + 32 * bits] = np.bitwise_or.reduce(planes, axis=2).reshape(len(blocks), -1)


def _high(blocks: Bytes, place: int) -> Bytes:
    """Bits (B, 256), bit s of byte i for weight i of plane s."""
    return ((blocks[:, None, place : place + 32] >> _BITS) & np.uint8(1)).reshape(len(blocks), 256)


def _put_high(blocks: Bytes, place: int, bits: Bytes) -> None:
    blocks[:, place : place + 32] = np.bitwise_or.reduce(bits.reshape(len(blocks), 8, 32) << _BITS, axis=1)


def _halves(blocks: Bytes, place: int) -> Bytes:
    """Codes of 4 bits in groups of 32: 16 bytes hold the first 16 low and the next 16 high; up to the block's end."""
    packed = blocks[:, place:].reshape(len(blocks), -1, 1, 16)
    return ((packed >> _NIBBLES) & np.uint8(15)).reshape(len(blocks), -1)


def _put_halves(blocks: Bytes, place: int, codes: Bytes) -> None:
    planes = codes.reshape(len(blocks), -1, 2, 16) << _NIBBLES
    blocks[:, place:] = (planes[:, :, 0] | planes[:, :, 1]).reshape(len(blocks), -1)


def _scales_q2_k(blocks: Bytes) -> Scales:
    step = _half(blocks, 80) * (blocks[:, :16] & 15).astype(np.float32)
    return step, -(_half(blocks, 82) * (blocks[:, :16] >> 4).astype(np.float32))


def _scales_q3_k(blocks: Bytes) -> Scales:
    low = ((blocks[:, None, 96:104] >> _NIBBLES) & np.uint8(15)).reshape(-1, 16)
    high = ((blocks[:, None, 104:108] >> _BIT_PAIRS) & np.uint8(3)).reshape(-1, 16)
    return _half(blocks, 108) * ((low | high << 4).astype(np.float32) - np.float32(32)), None


def _scales_six_bits(blocks: Bytes) -> Scales:
    first, second, third = (blocks[:, start : start + 4] for start in (4, 8, 12))
    scale = np.concatenate((first & 63, third & 15 | first >> 6 << 4), axis=1)
    minimum = np.concatenate((second & 63, third >> 4 | second >> 6 << 4), axis=1)
    return _half(blocks, 0) * scale.astype(np.float32), -(_half(blocks, 2) * minimum.astype(np.float32))


def _scales_q6_k(blocks: Bytes) -> Scales:
    return _half(blocks, 208) * np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32), None


def _scales_iq4_xs(blocks: Bytes) -> Scales:
    low = ((blocks[:, 4:8, None] >> _NIBBLES[:, 0]) & np.uint8(15)).reshape(-1, 8)
    pairs = np.ascontiguousarray(blocks[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16)
    return _half(blocks, 0) * ((low | (pairs & 3).astype(np.uint8) << 4).astype(np.float32) - np.float32(32)), None


def _one_scale(blocks: Bytes) -> Scales:
    return _half(blocks, 0), None


def _scale_and_minimum(blocks: Bytes) -> Scales:
    return _half(blocks, 0), _half(blocks, 2)


def _read_q3_k(blocks: Bytes) -> Bytes:
    codes: Bytes = np.bitwise_or(_planes(blocks, 32, 2), _high(blocks, 0) << 2)
    return codes


def _write_q3_k(blocks: Bytes, codes: Bytes) -> None:
    _put_planes(blocks, 32, codes & 3, 2)
    _put_high(blocks, 0, codes >> 2)


def _read_q5_k(blocks: Bytes) -> Bytes:
    codes: Bytes = np.bitwise_or(_planes(blocks, 48, 4), _high(blocks, 16) << 4)
    return codes


def _write_q5_k(blocks: Bytes, codes: Bytes) -> None:
    _put_planes(blocks, 48, codes & 15, 4)
    _put_high(blocks, 16, codes >> 4)


def _read_q6_k(blocks: Bytes) -> Bytes:
    count = len(blocks)
    low = (blocks[:, :128].reshape(count, 2, 1, 64) >> _NIBBLES) & np.uint8(15)
    high = (blocks[:, 128:192].reshape(count, 2, 1, 32) >> _BIT_PAIRS) & np.uint8(3)
    return (low.reshape(count, 2, 4, 32) | high << 4).reshape(count, 256)


def _write_q6_k(blocks: Bytes, codes: Bytes) -> None:
    count = len(blocks)
    low = (codes & 15).reshape(count, 2, 2, 64) << _NIBBLES
    high = (codes >> 4).reshape(count, 2, 4, 32) << _BIT_PAIRS
    blocks[:, :128] = np.bitwise_or.reduce(low, axis=2).reshape(count, 128)
    blocks[:, 128:192] = np.bitwise_or.reduce(high, axis=2).reshape(count, 64)


def _five_bits(place: int) -> tuple[Callable[[Bytes], Bytes], Callable[[Bytes, Bytes], None]]:
    """Reads and writes codes of Q5_0 or Q5_1: a mask of fifth bits from `place` on, then nibbles."""

    def read(blocks: Bytes) -> Bytes:
        fifth = np.unpackbits(blocks[:, place : place + 4], axis=1, bitorder="little")
        codes: Bytes = np.bitwise_or(_halves(blocks, place + 4), fifth << 4)
        return codes

    def write(blocks: Bytes, codes: Bytes) -> None:
        blocks[:, place : place + 4] = np.packbits(codes >> 4, axis=1, bitorder="little")
        _put_halves(blocks, place + 4, codes & 15)

    return read, write


def _four_bits(place: int) -> tuple[Callable[[Bytes], Bytes], Callable[[Bytes, Bytes], None]]:
    def read(blocks: Bytes) -> Bytes:
        return _halves(blocks, place)

    def write(blocks: Bytes, codes: Bytes) -> None:
        _put_halves(blocks, place, codes)

    return read, write


def _in_planes(place: int, bits: int) -> tuple[Callable[[Bytes], Bytes], Callable[[Bytes, Bytes], None]]:
    def read(blocks: Bytes) -> Bytes:
        return _planes(blocks, place, bits)

    def write(blocks: Bytes, codes: Bytes) -> None:
        _put_planes(blocks, place, codes, bits)

    return read, write


def _read_q8_0(blocks: Bytes) -> Bytes:
    return (blocks[:, 2:].view(np.int8).astype(np.int16) + 127).astype(np.uint8)


def _write_q8_0(blocks: Bytes, codes: Bytes) -> None:
    blocks[:, 2:] = (codes.astype(np.int16) - 127).astype(np.int8).view(np.uint8)


def _range(low: int, high: int) -> Floats:
    return np.arange(low, high + 1, dtype=np.float32)


_LEVELS = np.array(_IQ4, np.float32)

BLOCK_GRIDS: Final[MappingProxyType[str, BlockGrid]] = MappingProxyType(
    {
        "Q2_K": BlockGrid(16, _range(0, 3), True, _scales_q2_k, *_in_planes(16, 2)),
        "Q3_K": BlockGrid(16, _range(-4, 3), False, _scales_q3_k, _read_q3_k, _write_q3_k),
        "Q4_K": BlockGrid(32, _range(0, 15), True, _scales_six_bits, *_in_planes(16, 4)),
        "Q5_K": BlockGrid(32, _range(0, 31), True, _scales_six_bits, _read_q5_k, _write_q5_k),
        "Q6_K": BlockGrid(16, _range(-32, 31), False, _scales_q6_k, _read_q6_k, _write_q6_k),
        "IQ4_XS": BlockGrid(32, _LEVELS, False, _scales_iq4_xs, *_four_bits(8)),
        "IQ4_NL": BlockGrid(32, _LEVELS, False, _one_scale, *_four_bits(2)),
        "Q4_0": BlockGrid(32, _range(-8, 7), False, _one_scale, *_four_bits(2)),
        "Q4_1": BlockGrid(32, _range(0, 15), True, _scale_and_minimum, *_four_bits(4)),
        "Q5_0": BlockGrid(32, _range(-16, 15), False, _one_scale, *_five_bits(2)),
        "Q5_1": BlockGrid(32, _range(0, 31), True, _scale_and_minimum, *_five_bits(4)),
        "Q8_0": BlockGrid(32, _range(-127, 127), False, _one_scale, _read_q8_0, _write_q8_0),
    }
)
"""Type -> its grid; the types that codes can be found for one by one."""
