"""Inputs rounded to int8 while a model runs, as compressed-tensors rounds them: symmetric, one scale per token."""

from __future__ import annotations

import torch

__all__ = ["round_inputs"]

_HALF_RANGE = 127.5  # (127 - -128) / 2: the library spreads the greatest magnitude over the whole range of int8


def round_inputs(x: torch.Tensor) -> torch.Tensor:
    """Rounds the inputs of a linear layer whose form has `input_bits` 8.

    With `greatest = max|x|` of a token, `scale = greatest / 127.5`, the result is
    `round(clamp(x / scale, -128, 127)) * scale`; every step in the type of `x`, halves to even. A token of zeros has
    the type's epsilon as its scale. Sources in compressed-tensors: quantization/utils/helpers.py
    (compute_dynamic_scales_and_zp, calculate_qparams), quantization/lifecycle/forward_helpers.py
    (_quantize_dequantize). For inputs (batch, tokens, K) this is bit for bit what it computes; of inputs without a
    batch it takes one scale for all, which is not imitated. vLLM's int8 kernels divide by 127 instead.

    Args:
        x: (..., K) float32, float16 or bfloat16, finite.

    Returns:
        A new tensor of the same shape and type.
    """
    if x.numel() == 0:
        return x.clone()
    greatest = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True))
    scale = greatest / _HALF_RANGE
    scale.masked_fill_(scale == 0, torch.finfo(x.dtype).eps)
    steps = (x / scale).clamp_(-128, 127).round_()
    return steps.mul_(scale)
