"""What may stand in the place of a layer's weights, and beside them."""

from __future__ import annotations

from typing import Protocol

import torch

__all__ = ["Adapt", "Linear"]


class Linear(Protocol):
    """A linear whose weight is kept in a form of its own, such as codes."""

    def run(self, values: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Gives (..., N) in the type of `values`, (..., K); the bias is (N,)."""
        ...

    def dense(self) -> torch.Tensor:
        """Gives the weight itself, (N, K) in a floating-point type."""
        ...


class Adapt(Protocol):
    """What runs beside the weights: adapters that were not merged into them."""

    def linear(
        self,
        place: tuple[str, int],
        values: torch.Tensor,
        result: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """Changes the output of a linear.

        Args:
            place: its slot (`attn_q.weight`; the head is `output.weight` also where it is tied) and layer (-1: none).
            values: (..., K) its input.
            result: (..., N) its output.
            weight: (N, K) its weight, in any floating-point type.
            bias: (N,) or None.

        Returns:
            (..., N).
        """
        ...

    def rows(self, slot: str, index: torch.Tensor, result: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Changes rows that were taken from an embedding.

        Args:
            slot: `token_embd.weight` or `position_embd.weight`.
            index: (...) int64 numbers of the rows.
            result: (..., H) the rows.
            weight: (V, H) the embedding, in any floating-point type.

        Returns:
            (..., H).
        """
        ...
