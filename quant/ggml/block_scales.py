"""The quantized steps and offsets of K-quants and IQ4_XS: what they are multiples of, and how others take their place.

The step of a group is `unit * code`, its offset `-(offset_unit * offset_code)`; a unit is a float16 of the block. The
types with blocks of 32 have nothing of the kind: their steps are float16 themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.ggml.types import ggml_type

__all__ = ["SCALE_RANGES", "ScaleUnits", "units", "with_scale_codes"]

Floats: TypeAlias = NDArray[np.float32]
Bytes: TypeAlias = NDArray[Any]  # uint8; numpy's stubs lose that where bits are shifted

SCALE_RANGES: Final = MappingProxyType(
    {"Q2_K": (0, 15), "Q3_K": (-32, 31), "Q4_K": (0, 63), "Q5_K": (0, 63), "Q6_K": (-128, 127), "IQ4_XS": (-32, 31)}
)
"""Type -> least and greatest code of a step; codes of offsets go from 0 to the same greatest one."""

_NIBBLES = np.array([0, 4], np.uint8)[:, None]
_PAIRS = np.array([0, 2, 4, 6], np.uint8)[:, None]
_AT = {"Q2_K": 80, "Q3_K": 108, "Q4_K": 0, "Q5_K": 0, "Q6_K": 208, "IQ4_XS": 0}  # byte of the unit in a block


@dataclass(frozen=True, eq=False, slots=True)
class ScaleUnits:
    """What codes of steps and offsets are multiplied with.

    Attributes:
        step: (N, blocks of a row) float32.
        offset: (N, blocks of a row) float32; zeros for types without offsets.
    """

    step: Floats
    offset: Floats


def units(kind: str, data: Bytes) -> ScaleUnits:
    """Reads the units of rows (N, row bytes) of a type in `SCALE_RANGES`."""
    blocks = _blocks(kind, data)
    step = _half(blocks, _AT[kind]).reshape(len(data), -1)
    if kind not in ("Q2_K", "Q4_K", "Q5_K"):
        return ScaleUnits(step, np.zeros_like(step))
    return ScaleUnits(step, _half(blocks, _AT[kind] + 2).reshape(len(data), -1))


def with_scale_codes(kind: str, data: Bytes, steps: NDArray[np.integer], offsets: NDArray[np.integer]) -> Bytes:
    """Gives the same blocks with other codes of steps and offsets.

    Args:
        kind: one of `SCALE_RANGES`.
        data: (N, row bytes) uint8; not changed.
        steps: (N, G) integers in the type's range.
        offsets: (N, G) integers; not looked at for types without offsets.

    Returns:
        (N, row bytes) uint8.
    """
    blocks = _blocks(kind, data).copy()
    count = len(blocks)
    _WRITERS[kind](blocks, steps.reshape(count, -1).astype(np.int16), offsets.reshape(count, -1).astype(np.int16))
    return blocks.reshape(data.shape)


def _blocks(kind: str, data: Bytes) -> Bytes:
    return np.ascontiguousarray(data).reshape(-1, ggml_type(kind).block_bytes)


def _half(blocks: Bytes, place: int) -> Floats:
    return np.ascontiguousarray(blocks[:, place : place + 2]).view("<f2").astype(np.float32)


def _write_q2_k(blocks: Bytes, steps: Bytes, offsets: Bytes) -> None:
    blocks[:, :16] = steps | offsets << 4


def _write_q3_k(blocks: Bytes, steps: Bytes, offsets: Bytes) -> None:
    del offsets
    codes = (steps + 32).astype(np.uint8)
    blocks[:, 96:104] = np.bitwise_or.reduce((codes & 15).reshape(-1, 2, 8) << _NIBBLES, axis=1)
    blocks[:, 104:108] = np.bitwise_or.reduce((codes >> 4).reshape(-1, 4, 4) << _PAIRS, axis=1)


def _write_six_bits(blocks: Bytes, steps: Bytes, offsets: Bytes) -> None:
    blocks[:, 4:8] = steps[:, :4] | steps[:, 4:] >> 4 << 6
    blocks[:, 8:12] = offsets[:, :4] | offsets[:, 4:] >> 4 << 6
    blocks[:, 12:16] = steps[:, 4:] & 15 | (offsets[:, 4:] & 15) << 4


def _write_q6_k(blocks: Bytes, steps: Bytes, offsets: Bytes) -> None:
    del offsets
    blocks[:, 192:208] = steps.astype(np.int8).view(np.uint8)


def _write_iq4_xs(blocks: Bytes, steps: Bytes, offsets: Bytes) -> None:
    del offsets
    codes = (steps + 32).astype(np.uint16)
    high = np.bitwise_or.reduce((codes >> 4) << np.arange(0, 16, 2, dtype=np.uint16), axis=1)
    blocks[:, 2:4] = high.astype("<u2")[:, None].view(np.uint8)
    low = (codes & 15).reshape(-1, 4, 2)
    blocks[:, 4:8] = low[:, :, 0] | low[:, :, 1] << 4


_WRITERS: Final[MappingProxyType[str, Callable[[Bytes, Bytes, Bytes], None]]] = MappingProxyType(
    {
        "Q2_K": _write_q2_k,
        "Q3_K": _write_q3_k,
        "Q4_K": _write_six_bits,
        "Q5_K": _write_six_bits,
        "Q6_K": _write_q6_k,
        "IQ4_XS": _write_iq4_xs,
    }
)
