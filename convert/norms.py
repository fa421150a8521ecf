"""Norms and activations in torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["activate", "normalize"]


def normalize(
    values: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, *, kind: str, eps: float
) -> torch.Tensor:
    """Normalizes the last dimension in float32: "rms" by its root mean square, "layer" by mean and deviation too.

    Args:
        values: (..., n).
        weight: (n,), or what broadcasts with `values`; None for ones.
        bias: (n,) or None.
        kind: "rms" or "layer".
        eps: added to the variance.
    """
    wide = values.float()
    if kind == "layer":
        alike = weight is None or weight.ndim == 1
        scaled = F.layer_norm(wide, wide.shape[-1:], weight if alike else None, bias if alike else None, eps)
        return (scaled if weight is None or alike else scaled * weight).to(values.dtype)
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (scaled if weight is None else weight * scaled).to(values.dtype)


def activate(values: torch.Tensor, kind: str) -> torch.Tensor:
    """Applies an activation by its name in `Hyperparameters.activation`."""
    if kind == "silu":
        return F.silu(values)
    if kind == "gelu":
        return F.gelu(values)
    if kind == "gelu_tanh":
        return F.gelu(values, approximate="tanh")
    if kind == "gelu_quick":
        return values * torch.sigmoid(1.702 * values)
    return F.relu(values).square() if kind == "relu2" else F.relu(values)
