"""Linear layers in int8 as operators of torch and as modules: W8A8 and LLM.int8().

`torch.ops.quantpress.w8a8_linear` and `torch.ops.quantpress.llm_int8_linear` know their outputs without running, so
`torch.compile` keeps each as one node and CUDA graphs capture them. On CUDA they run the kernels, on processors plain
torch with the same codes and exact sums.
"""

from __future__ import annotations

import torch
from torch import nn

from quantpress.kernels.int8.plain import LONGEST, OUTLIER, reference_llm_int8, reference_w8a8

__all__ = ["LlmInt8Linear", "W8A8Linear", "llm_int8_linear", "w8a8_linear"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@torch.library.custom_op(
    "quantpress::w8a8_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor",
)
def w8a8_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Computes x W^T + bias with int8 weights and inputs rounded to int8 token by token.

    Args:
        x: (..., K) float16, bfloat16 or float32; rounded as compressed-tensors does
            (`plain.reference_quantize_tokens`).
        weight: (N, K) int8; K at most `plain.LONGEST`.
        scale: (N,) floating-point; a weight is its code times this.
        bias: (N,) floating-point, or None.

    Returns:
        (..., N) of the type of `x`; the same bits on a processor and on a GPU.

    Raises:
        ValueError: shapes, types or devices that do not fit.
    """
    return reference_w8a8(_flat(x, weight, scale, bias), weight, scale, bias).view(*x.shape[:-1], len(weight))


@w8a8_linear.register_kernel("cuda")
def _w8a8_on_cuda(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    from quantpress.kernels.int8.w8a8 import w8a8

    return w8a8(_flat(x, weight, scale, bias), weight, scale, bias).view(*x.shape[:-1], len(weight))


@torch.library.custom_op(
    "quantpress::llm_int8_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor scale, Tensor? bias, float threshold) -> Tensor",
)
def llm_int8_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, threshold: float
) -> torch.Tensor:
    """Computes x W^T + bias as LLM.int8() does (`plain.reference_llm_int8`).

    Args:
        x: (..., K) float16, bfloat16 or float32; all tokens are one batch, as in bitsandbytes.
        weight: (N, K) int8; K at most `plain.LONGEST`.
        scale: (N,) floating-point; a weight is its code times this (SCB / 127).
        bias: (N,) floating-point, or None.
        threshold: magnitude from which an input keeps its column out of int8; 0 for none.

    Returns:
        (..., N) of the type of `x`; processor and GPU differ by the order in which kept columns are added.

    Raises:
        ValueError: shapes, types or devices that do not fit.
    """
    flat = _flat(x, weight, scale, bias)
    return reference_llm_int8(flat, weight, scale, bias, threshold).view(*x.shape[:-1], len(weight))


@llm_int8_linear.register_kernel("cuda")
def _llm_int8_on_cuda(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, threshold: float
) -> torch.Tensor:
    from quantpress.kernels.int8.llm_int8 import llm_int8

    flat = _flat(x, weight, scale, bias)
    return llm_int8(flat, weight, scale, bias, threshold=threshold).view(*x.shape[:-1], len(weight))


@w8a8_linear.register_fake
@llm_int8_linear.register_fake
def _fake(x: torch.Tensor, weight: torch.Tensor, *rest: object) -> torch.Tensor:
    del rest
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


class W8A8Linear(nn.Module):
    """Stands where an `nn.Linear` stood, with weights in int8 and inputs that are rounded to int8; inference only."""

    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Keeps the tensors as buffers.

        Args:
            weight: (N, K) int8.
            scale: (N,) floating-point, or (N, 1) as checkpoints have it.
            bias: (N,) floating-point, or None.

        Raises:
            ValueError: shapes or types that do not fit.
        """
        super().__init__()
        flat = scale.reshape(-1)
        _check_weight(weight, flat, bias)
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight.contiguous())
        self.register_buffer("scale", flat.contiguous())
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Gives (..., N) for (..., K) in the type of `x`: float16, bfloat16 or float32."""
        result: torch.Tensor = torch.ops.quantpress.w8a8_linear(x, self.weight, self.scale, self.bias)
        return result

    def extra_repr(self) -> str:
        """What `print(model)` says."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class LlmInt8Linear(W8A8Linear):
    """Stands where an `nn.Linear` stood, and computes as LLM.int8() does; inference only."""

    def __init__(
        self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None,
        *, threshold: float = OUTLIER, together: bool = True,
    ) -> None:  # fmt: skip
        """Keeps the tensors as buffers.

        Args:
            weight: (N, K) int8.
            scale: (N,) float32, a weight is its code times this: SCB / 127 of a checkpoint of bitsandbytes.
            bias: (N,) floating-point, or None.
            threshold: magnitude of an outlier; 0 for none.
            together: an outlier in one text of (B, T, K) keeps its column for all, as in bitsandbytes. Otherwise each
                text stands alone, and its outputs do not depend on the rest of the batch.

        Raises:
            ValueError: shapes or types that do not fit.
        """
        super().__init__(weight, scale, bias)
        self.threshold, self.together = threshold, together

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Gives (..., N) for (..., K) in the type of `x`: float16, bfloat16 or float32."""
        if self.together or x.dim() < 3:
            return self._product(x)
        texts = x.reshape(-1, *x.shape[-2:])
        if not len(texts):
            return self._product(x)
        return torch.stack([self._product(text) for text in texts]).view(*x.shape[:-1], self.out_features)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.quantpress.llm_int8_linear(
            x, self.weight, self.scale, self.bias, self.threshold
        )
        return result

    def extra_repr(self) -> str:
        """What `print(model)` says."""
        return f"{super().extra_repr()}, threshold={self.threshold:g}, together={self.together}"


def _flat(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    _check_weight(weight, scale, bias)
    columns = weight.shape[1]
    if x.dtype not in _FLOATS or x.dim() < 1 or x.shape[-1] != columns:
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}, wanted a float type and {columns} columns")
    for name, tensor in (("weight", weight), ("scale", scale), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x is on {x.device}")
    return x.reshape(-1, columns).contiguous()


def _check_weight(weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> None:
    if weight.dim() != 2 or weight.dtype != torch.int8 or not 1 <= weight.shape[1] <= LONGEST:
        wanted = f"int8 (N, K) with K from 1 to {LONGEST}"
        raise ValueError(f"weight is {weight.dtype} of shape {tuple(weight.shape)}, wanted {wanted}")
    for name, tensor in (("scale", scale), ("bias", bias)):
        if tensor is not None and (tensor.dtype not in _FLOATS or tensor.shape != weight.shape[:1]):
            found = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise ValueError(f"{name} is {found}, wanted a float type and shape ({len(weight)},)")
