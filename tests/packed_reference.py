"""Reads packed weights one field after the other, as the formats are documented, without anything of the product.

GPTQ: AutoGPTQ nn_modules/qlinear/qlinear_cuda.py; AWQ: AutoAWQ utils/packing_utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

_AWQ_PLACE = (0, 4, 1, 5, 2, 6, 3, 7)  # nibble of a word that holds column 0, 1, ... of eight


def fields(words: np.ndarray, bits: int) -> np.ndarray:
    """Cuts each row of 32-bit words into fields, low bits first: (M, words) -> (M, words * 32 // bits)."""
    stream = np.unpackbits(np.ascontiguousarray(words.astype("<i4")).view(np.uint8), axis=1, bitorder="little")
    return stream.reshape(words.shape[0], -1, bits) @ (1 << np.arange(bits))


def read_gptq(parts: Mapping[str, np.ndarray], bits: int, *, version: int) -> np.ndarray:
    """Gives the matrix (N, K) in float64 of `qweight`, `qzeros`, `scales` and `g_idx`."""
    codes = fields(parts["qweight"].T, bits)
    zeros = fields(parts["qzeros"], bits) + (version == 1)
    group = parts["g_idx"]
    return parts["scales"].astype(np.float64).T[:, group] * (codes - zeros.T[:, group])


def read_awq(parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """Gives the matrix (N, K) in float64 of `qweight`, `qzeros` and `scales`."""

    def columns(words: np.ndarray) -> np.ndarray:
        nibbles = fields(words, 4).reshape(words.shape[0], -1, 8)
        return nibbles[:, :, _AWQ_PLACE].reshape(words.shape[0], -1)

    codes, zeros = columns(parts["qweight"]), columns(parts["qzeros"])
    size = codes.shape[0] // zeros.shape[0]
    return ((codes - zeros.repeat(size, 0)) * parts["scales"].astype(np.float64).repeat(size, 0)).T
