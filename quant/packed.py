"""From the one quantized form to the layout that the kernels read, for matrices that come from any format."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from quantpress.quant.errors import LayoutError
from quantpress.quant.packing import pack_stream
from quantpress.quant.qtensor import QuantizedTensor

if TYPE_CHECKING:
    import torch

    from quantpress.kernels.packed import PackedWeight

__all__ = ["packed_weight"]

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

    from quantpress.kernels.packed import PackedWeight

    codes, order = tensor.codes, None
    if tensor.g_idx is not None:
        _check_groups(tensor)
        order = np.argsort(tensor.g_idx, kind="stable")
        codes = codes[:, order]
    rest = -tensor.columns % _WHOLE
    padded = np.pad(codes, ((0, 0), (0, rest))) if rest else codes
    words = pack_stream(np.ascontiguousarray(padded), tensor.bits)[:, : -(-tensor.columns * tensor.bits // 32)]
    scale = np.ascontiguousarray(tensor.scale.T)
    if scale.dtype == ml_dtypes.bfloat16:
        stored = torch.from_numpy(scale.view(np.int16)).view(torch.bfloat16)
    else:
        stored = torch.from_numpy(scale)
    zero = None if tensor.zero is None else torch.from_numpy(np.ascontiguousarray(tensor.zero.T))
    return PackedWeight(
        words=torch.from_numpy(np.ascontiguousarray(words.T)), scale=stored, zero=zero,
        order=None if order is None else torch.from_numpy(order.astype(np.int64)), columns=tensor.columns,
        bits=tensor.bits, group_size=min(tensor.group_size, tensor.columns),
    ).to(device)  # fmt: skip


def _check_groups(tensor: QuantizedTensor) -> None:
    sizes = np.bincount(tensor.g_idx if tensor.g_idx is not None else [], minlength=tensor.groups)
    wanted = np.full(tensor.groups, tensor.group_size)
    wanted[-1] = tensor.columns - tensor.group_size * (tensor.groups - 1)
    if not np.array_equal(sizes, wanted):
        wrong = int(np.flatnonzero(sizes != wanted)[0])
        raise LayoutError(f"group {wrong} has {sizes[wrong]} columns, wanted {wanted[wrong]}: the kernels need even groups")
