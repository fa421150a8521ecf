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

__all__ = ["matmul_nbits", "nbits_block_size", "pack_bits"]

_LEAST_BLOCK = 16
_GREATEST_BLOCK = 128  # CUDA's kernels go no further; a scale of 16 bits more per 128 weights is one eighth of a bit
# codes of a byte -> little-endian word with one code in each of its bytes, and how far it is moved onto itself
_WORDS = {1: ("u1", ()), 2: ("<u2", (4,)), 4: ("<u4", (6, 12, 18))}


def matmul_nbits(
    tensor: QuantizedTensor, *, greatest_block: int = _GREATEST_BLOCK
) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[np.uint8] | None, dict[str, int]]:
    """Gives the inputs and attributes of the operator; nothing is rounded.

    Groups that are no power of two, or larger than `greatest_block`, become several blocks with the same scale. Codes
    of 3 bits are stored in 4; those without zeros are moved up by 4, so that their zero is the operator's own.

    Args:
        tensor: N rows of K columns; the last group may be shorter.
        greatest_block: columns of a block, at most; onnxruntime's CPU kernels take up to 256.

    Returns:
        B (N, blocks, block_size * bits / 8) uint8, low bits first; scales (N, blocks) in the type the matrix has them
        in, which must be that of A (a wider type holds them exactly); zero points (N, ceil(blocks * bits / 8)) uint8,
        None if symmetric; and the attributes K, N, bits and block_size.

    Raises:
        LayoutError: columns in an order of their own, or groups that do not divide into blocks of 16.
    """
    if tensor.g_idx is not None:
        raise LayoutError("MatMulNBits needs columns in the order of their groups; these have an order of their own")
    size = nbits_block_size(tensor.group_size, tensor.columns, greatest_block)
    blocks = group_count(tensor.columns, size)
    bits = 4 if tensor.bits == 3 else tensor.bits
    codes = tensor.codes
    if tensor.columns < blocks * size:
        codes = np.zeros((tensor.rows, blocks * size), np.uint8)
        codes[:, : tensor.columns] = tensor.codes
    if tensor.bits == 3 and tensor.symmetric:
        codes = codes + np.uint8(4)
    group_of_block = np.arange(blocks) * size // tensor.group_size
    packed = pack_bits(codes.reshape(tensor.rows, blocks, size), bits)
    scales = np.ascontiguousarray(tensor.scale[:, group_of_block])
    zeros = None if tensor.zero is None else pack_bits(tensor.zero[:, group_of_block], bits)
    return packed, scales, zeros, {"K": tensor.columns, "N": tensor.rows, "bits": bits, "block_size": size}


def nbits_block_size(group_size: int, columns: int, greatest_block: int = _GREATEST_BLOCK) -> int:
    """Gives the columns of a block: the largest power of two that divides a group, up to `greatest_block`.

    With one group per row it is whatever covers the row.

    Raises:
        LayoutError: groups that do not divide into blocks of 16.
    """
    size = _LEAST_BLOCK
    if group_size >= columns:
        while size < min(greatest_block, columns):
            size *= 2
        return size
    if group_size % _LEAST_BLOCK:
        raise LayoutError(
            f"MatMulNBits has blocks of at least {_LEAST_BLOCK} columns, groups of {group_size} do not divide into"
            " them; --standard-ops keeps these codes, --precision fp16 and bf16 the numbers they stand for"
        )
    while size < greatest_block and group_size % (2 * size) == 0:
        size *= 2
    return size


def pack_bits(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Packs the last dimension into bytes, low bits first, the last byte filled with zeros.

    All codes of a byte are one word that is moved onto itself: the lowest byte of a + 256 b, moved down by 4, is b
    sixteen times, so that no strided array is read.
    """
    per_byte = 8 // bits
    rest = -values.shape[-1] % per_byte
    padded = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, rest)]) if rest else values
    word, moves = _WORDS[per_byte]
    words = np.ascontiguousarray(padded).view(word)
    packed = words.astype(np.uint8)
    for move in moves:
        packed |= (words >> words.dtype.type(move)).astype(np.uint8)
    return packed
