"""A module that stands where an `nn.Linear` stood, with its weight in codes."""

from __future__ import annotations

import torch
from torch import nn

from quantpress.kernels.linear import linear
from quantpress.kernels.packed import PackedWeight, check_order

__all__ = ["QuantLinear"]


class QuantLinear(nn.Module):
    """x W^T + bias on a packed weight; inference only.

    The parts of the weight are buffers: `.to(device)` and `state_dict` take them along. `.half()` and `.to(dtype)`
    change the type of floating-point buffers, scales and bias, as torch does for any module; to change only where it
    lies give a device.
    """

    words: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    order: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(self, weight: PackedWeight, bias: torch.Tensor | None = None, *, deterministic: bool = False) -> None:
        """Keeps the tensors as they are.

        Args:
            weight: (N, K).
            bias: (N,); used in the type of the inputs.
            deterministic: see `quantpress.kernels.linear.linear`.

        Raises:
            ValueError: `order` names columns that do not exist; its values are read once, here.
        """
        super().__init__()
        check_order(weight)
        self.in_features, self.out_features = weight.columns, weight.rows
        self.bits, self.group_size, self.deterministic = weight.bits, weight.group_size, deterministic
        self.register_buffer("words", weight.words)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero", weight.zero)
        self.register_buffer("order", weight.order)
        self.register_buffer("bias", bias)

    @property
    def weight(self) -> PackedWeight:
        """The packed weight, made of the buffers."""
        return PackedWeight(self.words, self.scale, self.zero, self.order, self.in_features, self.bits, self.group_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Gives (..., N) for (..., K) in the type of `x`: float16, bfloat16 or float32."""
        bias = self.bias if self.bias is None else self.bias.to(x.dtype)
        return linear(x, self.weight, bias, deterministic=self.deterministic)

    def extra_repr(self) -> str:
        """What `print(model)` says."""
        kind = "symmetric" if self.zero is None else "asymmetric"
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, bits={self.bits}, group_size={self.group_size}, {kind}"
