"""What adapters add to a layer's output while it runs, in torch and without ever forming a merged weight.

Each class computes what the forward pass of PEFT computes (named with it). Shapes: x is (..., K), a result (..., N),
a weight (N, K) in the decoder's form; an embedding has V rows of H values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

__all__ = ["Branch", "Factors", "Khatri", "Kron", "Lookup", "LowRank"]

_BLOCK = 1 << 22  # values of a weight that are widened at a time for its norms


@dataclass(eq=False)
class Factors:
    """The small tensors of one adapted module, read when they are first needed and kept in float32.

    Attributes:
        read: part -> reads it.
        order: (N,) int64, the place in the adapter's output of each row of the decoder's; None: the same.
    """

    read: Mapping[str, Callable[[], torch.Tensor]]
    order: torch.Tensor | None = None
    _kept: dict[tuple[str, torch.device], torch.Tensor] = field(default_factory=dict)

    def __contains__(self, part: str) -> bool:
        return part in self.read

    def get(self, part: str, device: torch.device, *, ordered: bool = False) -> torch.Tensor:
        """Gives a tensor; `ordered` brings its rows into the decoder's order."""
        if (part, device) not in self._kept:
            values = self.read[part]().to(device, torch.float32)
            if ordered and self.order is not None:
                values = values[self.order.to(device)]
            self._kept[part, device] = values
        return self._kept[part, device]


class Branch(Protocol):
    """One adapter at one module."""

    def run(
        self, x: torch.Tensor, result: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Gives the output with this adapter, from the output so far."""
        ...


@dataclass(eq=False)
class LowRank:
    """LoRA, AdaLoRA and DoRA on a linear (tuners/lora/layer.py Linear.forward, dora.py, adalora/layer.py).

    Attributes:
        factors: "lora_A" (r, K), "lora_B" (N, r), and where there are: "lora_E" (r, 1), "lora_B.bias" (N,),
            "lora_magnitude_vector" (N,).
        scale: everything that B A is multiplied with.
    """

    factors: Factors
    scale: float
    _share: torch.Tensor | None = None

    def run(
        self, x: torch.Tensor, result: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Adds (x A^T) B^T; DoRA then stretches all but the bias: by m over the norms of W + B A."""
        a, b = self._factors(x.device)
        added = (x @ a.to(x.dtype).T) @ b.to(x.dtype).T * self.scale
        if "lora_B.bias" in self.factors:
            added = added + self.factors.get("lora_B.bias", x.device, ordered=True).to(x.dtype) * self.scale
        if "lora_magnitude_vector" not in self.factors:
            return result + added
        if self._share is None:
            magnitude = self.factors.get("lora_magnitude_vector", x.device, ordered=True)
            self._share = (magnitude.flatten() / _row_norms(weight, a, b, self.scale).to(x.device)).to(x.dtype)
        if bias is None:
            return self._share * (result + added)
        return self._share * (result - bias + added) + bias

    def _factors(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        a = self.factors.get("lora_A", device)
        if "lora_E" in self.factors:
            a = a * self.factors.get("lora_E", device).reshape(-1, 1)
        return a, self.factors.get("lora_B", device, ordered=True)


@dataclass(eq=False)
class Khatri:
    """LoHa (tuners/loha/layer.py): (W1a W1b) * (W2a W2b), which is a product of rank r * r, row by row.

    Attributes:
        factors: "hada_w1_a" (N, r), "hada_w1_b" (r, K), "hada_w2_a" (N, r), "hada_w2_b" (r, K).
        scale: what it is multiplied with.
    """

    factors: Factors
    scale: float

    def run(
        self, x: torch.Tensor, result: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Adds sum over i, j of w1a[:, i] w2a[:, j] (w1b[i] * w2b[j]) x, one i at a time."""
        del weight, bias
        get = self.factors.get
        first, second = (get(f"hada_w{n}_b", x.device).to(x.dtype) for n in (1, 2))
        left, right = (get(f"hada_w{n}_a", x.device, ordered=True).to(x.dtype) for n in (1, 2))
        for i in range(first.shape[0]):
            result = result + left[:, i] * ((x * first[i]) @ second.T @ right.T) * self.scale
        return result


@dataclass(eq=False)
class Kron:
    """LoKr (tuners/lokr/layer.py): the Kronecker product of W1 (p, q) and W2 (N/p, K/q) on x as a (q, K/q) matrix.

    Attributes:
        factors: "lokr_w1" or "lokr_w1_a" and "lokr_w1_b"; the same for w2.
        scale: what it is multiplied with.
    """

    factors: Factors
    scale: float

    def run(
        self, x: torch.Tensor, result: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Adds vec(W1 X W2^T)."""
        del weight, bias
        first, second = self._whole("lokr_w1", x.device).to(x.dtype), self._whole("lokr_w2", x.device).to(x.dtype)
        matrix = x.reshape(*x.shape[:-1], first.shape[1], second.shape[1])
        added = (first @ matrix @ second.T).flatten(-2) * self.scale
        return result + (added if self.factors.order is None else added[..., self.factors.order.to(x.device)])

    def _whole(self, part: str, device: torch.device) -> torch.Tensor:
        if part in self.factors:
            return self.factors.get(part, device)
        return self.factors.get(f"{part}_a", device) @ self.factors.get(f"{part}_b", device)


@dataclass(eq=False)
class Lookup:
    """LoRA and DoRA on an embedding (tuners/lora/layer.py Embedding.forward, dora.py DoraEmbeddingLayer).

    Attributes:
        factors: "lora_embedding_A" (r, V), "lora_embedding_B" (H, r), and for DoRA "lora_magnitude_vector" (H,).
        scale: what B A is multiplied with.
    """

    factors: Factors
    scale: float
    _share: torch.Tensor | None = None

    def look_up(self, index: torch.Tensor, result: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Adds the columns of A by number, times B; DoRA stretches each column of the embedding."""
        a = self.factors.get("lora_embedding_A", result.device)
        b = self.factors.get("lora_embedding_B", result.device)
        added = a.T[index.to(a.device)].to(result.dtype) @ b.T.to(result.dtype) * self.scale
        if "lora_magnitude_vector" not in self.factors:
            return result + added
        if self._share is None:
            norms = _column_norms(weight, a, b, self.scale).to(result.device)
            magnitude = self.factors.get("lora_magnitude_vector", result.device).flatten()
            self._share = (magnitude / norms).to(result.dtype)
        return self._share * (result + added)


def _blocks(weight: torch.Tensor) -> range:
    return range(0, weight.shape[0], max(1, _BLOCK // max(weight.shape[1], 1)))


def _row_norms(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """Gives ||W + scale B A|| of each row, (N,) float64."""
    step, wide = _blocks(weight).step, a.double()
    parts = [
        (weight[low : low + step].to(a.device).double() + b[low : low + step].double() @ wide * scale).norm(dim=1)
        for low in _blocks(weight)
    ]
    return torch.cat(parts)


def _column_norms(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """Gives ||W + scale (B A)^T|| of each column, (H,) float64."""
    step, wide = _blocks(weight).step, b.double().T
    total = torch.zeros(weight.shape[1], dtype=torch.float64, device=a.device)
    for low in _blocks(weight):
        rows = weight[low : low + step].to(a.device).double() + a[:, low : low + step].double().T @ wide * scale
        total += rows.square().sum(dim=0)
    return total.sqrt()
