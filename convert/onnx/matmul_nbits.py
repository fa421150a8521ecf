"""Quantized matrices as ONNX Runtime's MatMulNBits takes them, codes as they are.

The operator (com.microsoft, contrib_ops/cpu/quantization/matmul_nbits.cc; docs/ContribOperators.md) multiplies A (M, K)
with a matrix of N rows in blocks of a power of two of columns, at least 16: weight = scale * (code - zero), and without
zeros the zero is 2^(bits - 1). It knows 2, 4 and 8 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.errors import LayoutError
from quantpress.quant.qtensor import QuantizedTensor, group_count

__all__ = ["matmul_nbits"]

_LEAST_BLOCK = 16
_GREATEST_BLOCK = 128  # CUDA's kernels go no further; a scale of 16 bits more per 128 weights is one eighth of a bit


def matmul_nbits(
    tensor: QuantizedTensor,
) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[np.uint8] | None, dict[str, int]]:
    """Gives the inputs and attributes of the operator; nothing is rounded.

    Groups that are no power of two, or larger than 128, become several blocks with the same scale. Codes of 3 bits are
    stored in 4; those without zeros are moved up by 4, so that their zero is the operator's own.

    Args:
        tensor: N rows of K columns; the last group may be shorter.

    Returns:
        B (N, blocks, block_size * bits / 8) uint8, low bits first; scales (N, blocks) in the type the matrix has them
        in, which must be that of A (a wider type holds them exactly); zero points (N, ceil(blocks * bits / 8)) uint8,
        None if symmetric; and the attributes K, N, bits and block_size.

    Raises:
        LayoutError: columns in an order of their own, or groups that do not divide into blocks of 16.
    """
    if tensor.g_idx is not None:
        raise LayoutError("MatMulNBits needs columns in the order of their groups; these have an order of their own")
    size = _block_size(tensor)
    blocks = group_count(tensor.columns, size)
    bits = 4 if tensor.bits == 3 else tensor.bits
    codes = np.zeros((tensor.rows, blocks * size), np.uint8)
    codes[:, : tensor.columns] = tensor.codes
    if tensor.bits == 3 and tensor.symmetric:
        codes += np.uint8(4)
    group_of_block = np.arange(blocks) * size // tensor.group_size
    packed = _pack(codes.reshape(tensor.rows, blocks, size), bits)
    scales = np.ascontiguousarray(tensor.scale[:, group_of_block])
    zeros = None if tensor.zero is None else _pack(tensor.zero[:, group_of_block], bits)
    return packed, scales, zeros, {"K": tensor.columns, "N": tensor.rows, "bits": bits, "block_size": size}


def _block_size(tensor: QuantizedTensor) -> int:
    """The largest power of two that divides a group, up to 128; with one group per row, whatever covers it."""
    size = _LEAST_BLOCK
    if tensor.groups <= 1:
        while size < min(_GREATEST_BLOCK, tensor.columns):
            size *= 2
        return size
    if tensor.group_size % _LEAST_BLOCK:
        raise LayoutError(
            f"MatMulNBits has blocks of at least {_LEAST_BLOCK} columns; groups of {tensor.group_size} do not divide"
            " into them"
        )
    while size < _GREATEST_BLOCK and tensor.group_size % (2 * size) == 0:
        size *= 2
    return size


def _pack(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Packs the last dimension into bytes, low bits first, the last byte filled with zeros."""
    per_byte = 8 // bits
    rest = -values.shape[-1] % per_byte
    padded = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, rest)]) if rest else values
    fields = padded.reshape(*values.shape[:-1], -1, per_byte)
    packed = np.zeros(fields.shape[:-1], np.uint8)
    for place in range(per_byte):
        packed |= fields[..., place] << np.uint8(bits * place)
    return packed
