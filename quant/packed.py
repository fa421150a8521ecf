"""From the one quantized form to the layout that the kernels read, for matrices that come from any format."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quantpress.quant.errors import LayoutError
from quantpress.quant.packing import pack_stream
from quantpress.quant.qtensor import QuantizedTensor

if TYPE_CHECKING:
    import torch

    from quantpress.kernels.packed import PackedWeight

__all__ = ["pack_down", "packed_streams", "packed_weight"]

Array = NDArray[Any]

_WHOLE = 32  # places along K: so many codes of any bits fill whole words


def packed_weight(tensor: QuantizedTensor, device: str | torch.device = "cpu") -> PackedWeight:
    """Lays a quantized matrix out for the kernels; nothing is rounded.

    Columns that belong to groups in an order of their own (`g_idx`) are sorted by group once, and the inputs are
    gathered in that order when the matrix is multiplied.

    Args:
        tensor: the matrix.
        device: where the result is kept.

    Raises:
        LayoutError: `g_idx` gives groups of other sizes than `group_size`.
    """
    import torch

    codes, order = tensor.codes.T, None
    if tensor.g_idx is not None:
        _check_groups(tensor)
        order = np.argsort(tensor.g_idx, kind="stable")
        codes = codes[order]
    zero = None if tensor.zero is None else np.ascontiguousarray(tensor.zero.T)
    packed = packed_streams(
        pack_down(codes, tensor.bits), np.ascontiguousarray(tensor.scale.T), zero, tensor.bits, tensor.group_size,
        columns=tensor.columns,
    )  # fmt: skip
    if order is not None:
        packed = replace(packed, order=torch.from_numpy(order.astype(np.int64)))
    return packed.to(device)


def packed_streams(
    words: Array, scale: Array, zero: Array | None, bits: int, group_size: int, *, columns: int
) -> PackedWeight:
    """Takes a matrix that is in the kernels' layout already, as GPTQ's `qweight` is; the arrays are not copied.

    Args:
        words: (ceil(K * bits / 32), N) int32.
        scale: (G, N) float16, bfloat16 or float32.
        zero: (G, N) uint8, None for symmetric codes.
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale.
        columns: K.
    """
    import torch

    from quantpress.kernels.packed import PackedWeight

    halves = scale.dtype == ml_dtypes.bfloat16
    stored = torch.from_numpy(_writable(scale.view(np.int16) if halves else scale))
    return PackedWeight(
        words=torch.from_numpy(_writable(words)), scale=stored.view(torch.bfloat16) if halves else stored,
        zero=None if zero is None else torch.from_numpy(_writable(zero)), order=None, columns=columns, bits=bits,
        group_size=min(group_size, columns),
    )  # fmt: skip


def pack_down(codes: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """Packs (K, N) codes down the columns: (ceil(K * bits / 32), N)."""
    columns, rows = codes.shape
    padded = np.zeros((-(-columns // _WHOLE) * _WHOLE, rows), np.uint8)
    padded[:columns] = codes
    count = -(-columns * bits // 32)
    if 32 % bits:
        return np.ascontiguousarray(pack_stream(np.ascontiguousarray(padded.T), bits).T[:count])
    fields = padded.reshape(-1, 32 // bits, rows)
    words = fields[:, 0].astype(np.uint32)
    for place in range(1, 32 // bits):  # whole rows at a time, not single codes
        words |= fields[:, place].astype(np.uint32) << np.uint32(place * bits)
    return words[:count].view(np.int32)


def _writable(values: Array) -> Array:
    """Gives a contiguous array that torch does not warn of; a copy only where it must be."""
    values = np.ascontiguousarray(values)
    return values if values.flags.writeable else values.copy()


def _check_groups(tensor: QuantizedTensor) -> None:
    sizes = np.bincount(tensor.g_idx if tensor.g_idx is not None else [], minlength=tensor.groups)
    wanted = np.full(tensor.groups, tensor.group_size)
    wanted[-1] = tensor.columns - tensor.group_size * (tensor.groups - 1)
    if not np.array_equal(sizes, wanted):
        wrong = int(np.flatnonzero(sizes != wanted)[0])
        raise LayoutError(
            f"group {wrong} has {sizes[wrong]} columns, wanted {wanted[wrong]}: the kernels need even groups"
        )
