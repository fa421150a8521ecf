"""Products of int8 codes in plain torch: what the kernels compute, and what processors run.

Sums of products of codes are whole numbers and computed exactly; what is rounded is rounded in float32 in the order
that the kernels keep to. So the codes are the kernels' bit for bit, and so are products of W8A8.
"""

from __future__ import annotations

from functools import cache

import torch

__all__ = [
    "HALF_RANGE", "LONGEST", "OUTLIER", "int8_sums", "reference_int8_matmul", "reference_llm_int8",
    "reference_quantize_split", "reference_quantize_tokens", "reference_w8a8",
]  # fmt: skip

HALF_RANGE = 127.5  # (127 - -128) / 2: compressed-tensors spreads the greatest magnitude over the whole range of int8
LONGEST = (2**31 - 1) // 2**14  # columns: so many products of -128 and -128 fit an int32
OUTLIER = 6.0  # magnitude from which LLM.int8() keeps a column; transformers' default of llm_int8_threshold
_EXACT = 2**24 // 2**14  # columns whose products float32 adds without rounding
_BLOCK = 1 << 21  # weights widened to float32 at a time: 8 MiB


def reference_quantize_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds each row to int8 as compressed-tensors rounds a token's inputs, every step in the type of `x`.

    The scale is `max|x| / 127.5`, the type's epsilon for a row of zeros; codes are
    `round(clamp(x / scale, -128, 127))`, halves to even. Sources in compressed-tensors: quantization/utils/helpers.py
    (compute_dynamic_scales_and_zp, calculate_qparams), quantization/lifecycle/forward_helpers.py
    (_quantize_dequantize).

    Args:
        x: (M, K) float16, bfloat16 or float32; K may not be 0.

    Returns:
        (M, K) int8 and the scales (M,) float32; NaN for a row with a NaN or an infinity, whose codes are of no matter.
    """
    greatest = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True))
    # a tensor as the divisor: by a number, torch would multiply with its reciprocal on a GPU
    scale = greatest / torch.full_like(greatest, HALF_RANGE)
    scale = scale.masked_fill(scale == 0, torch.finfo(x.dtype).eps)
    codes = (x / scale).clamp_(-128, 127).round_().nan_to_num_(0.0).to(torch.int8)
    return codes, scale.float().masked_fill(~scale.isfinite(), torch.nan).view(-1)


def reference_quantize_split(
    x: torch.Tensor, threshold: float = OUTLIER
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rounds each row to int8 as LLM.int8() does, apart from columns with an outlier in any row.

    An outlier is a magnitude of `threshold` or more; it does not count for the scale of its row. Codes are
    `round(x * (1 / absmax * 127))` in float32, halves to even. Source: LLM.int8() (arXiv 2208.07339) section 3;
    bitsandbytes backends/default/ops.py (int8_vectorwise_quant), which gives absmax instead of absmax / 127.

    Args:
        x: (M, K) float16, bfloat16 or float32.
        threshold: in the type of `x`; 0 for no outliers, as in bitsandbytes.

    Returns:
        (M, K) int8, 0 in columns with an outlier; absmax / 127 of each row (M,) float32, NaN for a row with a NaN; and
        which columns have an outlier, (K,) bool.
    """
    limit = torch.tensor(threshold if threshold > 0 else torch.inf, dtype=x.dtype, device=x.device)
    outliers = (x.abs() >= limit) & (threshold > 0)
    columns = outliers.any(0)
    wide = x.float().masked_fill(outliers, 0.0)
    absmax = wide.abs().amax(1, keepdim=True)
    codes = torch.round(wide * (absmax.reciprocal() * 127.0)).nan_to_num_(0.0, 0.0, 0.0)
    scale = (absmax / torch.full_like(absmax, 127.0)).view(-1)
    return codes.masked_fill_(columns, 0.0).to(torch.int8), scale.masked_fill(~scale.isfinite(), torch.nan), columns


def int8_sums(codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Computes `codes @ weight.T` without any rounding.

    Args:
        codes: (M, K) int8.
        weight: (N, K) int8; K at most `LONGEST`.

    Returns:
        (M, N) int32.
    """
    if codes.device.type == "cpu" and codes.numel() and len(weight) and _int_mm_is_exact():
        return torch._int_mm(codes, weight.T)  # noqa: SLF001
    sums = torch.zeros((len(codes), len(weight)), dtype=torch.int32, device=codes.device)
    step = max(_BLOCK // _EXACT, 1)
    for start in range(0, codes.shape[1], _EXACT):
        part = codes[:, start : start + _EXACT].float()
        for first in range(0, len(weight), step):
            block = weight[first : first + step, start : start + _EXACT].float()
            sums[:, first : first + step] += (part @ block.T).to(torch.int32)
    return sums


@cache
def _int_mm_is_exact() -> bool:
    """Whether torch's product of int8 matrices keeps every bit on this processor: some add pairs in 16 bits."""
    weight = torch.full((64, 512), -128, dtype=torch.int8)
    weight[::3] = 127
    for rows in (1, 40):
        codes = torch.full((rows, 512), -128, dtype=torch.int8)
        codes[::2] = 127
        found = torch._int_mm(codes, weight.T)  # noqa: SLF001
        if not torch.equal(found, (codes.double() @ weight.double().T).int()):
            return False
    return True


def reference_int8_matmul(
    codes: torch.Tensor, token_scale: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor,
    bias: torch.Tensor | None, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """Computes `sums * token_scale * scale + bias` in float32 from left to right, rounded to `dtype` at the end.

    Args:
        codes: (M, K) int8.
        token_scale: (M,) float32.
        weight: (N, K) int8.
        scale: (N,) floating-point.
        bias: (N,) floating-point, or None.
        dtype: of the result.

    Returns:
        (M, N).
    """
    values = int8_sums(codes, weight).float().mul_(token_scale[:, None]).mul_(scale.float())
    return (values if bias is None else values.add_(bias.float())).to(dtype)


def reference_w8a8(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Computes x W^T + bias with int8 weights and inputs rounded to int8; (M, N) of the type of `x` (M, K)."""
    codes, token_scale = reference_quantize_tokens(x)
    return reference_int8_matmul(codes, token_scale, weight, scale, bias, x.dtype)


def reference_llm_int8(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None,
    threshold: float = OUTLIER,
) -> torch.Tensor:  # fmt: skip
    """Computes x W^T + bias as LLM.int8() does; (M, N) of the type of `x` (M, K).

    Columns with an outlier are multiplied as they are with the codes of the weight, in float32; the product of int8
    codes is added to that before the weight's scale is multiplied in. bitsandbytes rounds more often: the dequantized
    weight, and each of the two products, to the type of `x`.
    """
    codes, token_scale, columns = reference_quantize_split(x, threshold)
    values = int8_sums(codes, weight).float().mul_(token_scale[:, None])
    if columns.any():
        values += x[:, columns].float() @ weight[:, columns].float().T
    values *= scale.float()
    return (values if bias is None else values.add_(bias.float())).to(x.dtype)
