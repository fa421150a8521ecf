"""Encoder and decoder side by side in torch (T5): the one reads a text, the other continues a second one.

Layers differ from those of `convert.layer` in that distances between tokens enter the scores, and that the decoder
looks at the encoder's output too. Sources: arXiv 1910.10683, section 2.1; transformers' modeling_t5.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from quantpress.convert.arch.hyper import Seq2Seq
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Role
from quantpress.convert.distances import bucket_of
from quantpress.convert.linear import Adapt
from quantpress.convert.norms import activate, normalize
from quantpress.convert.weights import Weight
from quantpress.quant.errors import InputError

__all__ = ["EncoderDecoder"]

_ENCODER, _DECODER = "enc", "dec"


class EncoderDecoder:
    """An encoder-decoder of the tables. Streaming, it holds the weights of one layer; resident, it keeps them."""

    def __init__(
        self,
        weight: Weight,
        spec: ArchSpec,
        hyper: Hyperparameters,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        resident: bool = False,
        adapt: Adapt | None = None,
    ) -> None:
        """Reads nothing yet.

        Args:
            weight: gives a weight by slot (`enc.attn_q.weight`) and layer, e.g. `CheckpointWeights`.
            spec: the family.
            hyper: what config.json says.
            device: where to compute.
            dtype: what to compute in; norms in float32 always.
            resident: keep weights after their first use.
            adapt: adapters that run beside the weights.

        Raises:
            InputError: the model has no decoder.
        """
        if hyper.seq2seq is None:
            raise InputError(f"{spec.family} has no encoder with a decoder beside it")
        self.spec, self.hyper, self.stacks = spec, hyper, hyper.seq2seq
        self.device, self.dtype, self.resident = torch.device(device), dtype, resident
        self._weight, self._adapt = weight, adapt
        self._float32 = frozenset(row.slot for row in spec.tensors if row.role is Role.NORM)
        self._kept: dict[tuple[str, int], torch.Tensor | None] = {}

    def encode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Gives the encoder's output.

        Args:
            tokens: (B, S) int64 token ids.

        Returns:
            (B, S, hidden).

        Raises:
            InputError: a token has no embedding row, or a weight is missing.
        """
        hidden = self._embed(tokens)
        for layer in range(self.hyper.layers):
            bias = self._distances(_ENCODER, layer, tokens.shape[1])
            hidden = self._attended(f"{_ENCODER}.attn", layer, hidden, None, bias)
            hidden = self._passed(_ENCODER, layer, hidden)
        return self._norm(f"{_ENCODER}.output_norm", -1, hidden)

    def decode(self, tokens: torch.Tensor, memory: torch.Tensor, *, first: int = 0) -> torch.Tensor:
        """Gives the logits after each token, (B, T - first, vocab) float32; see `states`."""
        return self.head(self.states(tokens, memory)[:, first:])

    def states(self, tokens: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """Gives what the decoder's last layer does.

        Args:
            tokens: (B, T) int64 token ids, the start token first.
            memory: (B, S, hidden), what `encode` gave.

        Returns:
            (B, T, hidden).

        Raises:
            InputError: a token has no embedding row, or a weight is missing.
        """
        hidden = self._embed(tokens)
        for layer in range(self.stacks.layers):
            bias = self._distances(_DECODER, layer, tokens.shape[1])
            hidden = self._attended(f"{_DECODER}.attn", layer, hidden, None, bias)
            hidden = self._attended(f"{_DECODER}.cross_attn", layer, hidden, memory, None)
            hidden = self._passed(_DECODER, layer, hidden)
        return hidden

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Gives logits (B, T, vocab) float32 of the last layer's output (B, T, hidden)."""
        hidden = self._norm(f"{_DECODER}.output_norm", -1, hidden)
        weight = self._need("token_embd.weight" if self.hyper.tied else "output.weight", -1)
        logits = F.linear(hidden, weight).float()
        if self._adapt is not None:
            logits = self._adapt.linear(("output.weight", -1), hidden, logits, weight, None)
        return logits if self.hyper.logit_scale == 1.0 else logits * self.hyper.logit_scale

    def generate(self, tokens: Sequence[int], count: int, *, stop: frozenset[int] = frozenset()) -> list[int]:
        """Answers a text with the most likely token each time; everything is computed anew for each.

        Args:
            tokens: ids of the text, at least one.
            count: tokens to give at most.
            stop: ids that end it; the one that did is the last in the result.
        """
        memory = self.encode(torch.tensor([list(tokens)]))
        found = [self.stacks.start]
        for _ in range(count):
            found.append(int(self.decode(torch.tensor([found]), memory, first=len(found) - 1).argmax()))
            if found[-1] in stop:
                break
        return found[1:]

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        low, high = (int(tokens.min()), int(tokens.max())) if tokens.numel() else (0, 0)
        if low < 0 or high >= self.hyper.vocab:
            raise InputError(f"token ids go from {low} to {high}, the model has {self.hyper.vocab} tokens")
        rows = self._weight("token_embd.weight", -1) if not self.resident else self._get("token_embd.weight", -1)
        if rows is None:
            raise InputError("the model has no token_embd.weight")
        found = rows[tokens.to(rows.device)].to(self.device, self.dtype)
        return found if self._adapt is None else self._adapt.rows("token_embd.weight", tokens, found, rows)

    def _distances(self, stack: str, layer: int, length: int) -> torch.Tensor:
        """Gives what distances add to scores, (heads, T, T), minus infinity for what a decoder does not see."""
        own = "own_distances" in self.hyper.flags
        table = self._need(f"{stack}.attn_rel_b.weight", layer if own else -1)
        places = torch.arange(length)
        apart = places[None, :] - places[:, None]
        found = table[_buckets(apart, self.stacks, both_ways=stack == _ENCODER).to(self.device)].permute(2, 0, 1)
        if stack == _ENCODER:
            return found
        return found.masked_fill((apart > 0).to(self.device), -torch.inf)

    def _attended(
        self, name: str, layer: int, hidden: torch.Tensor, memory: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Adds what attention finds, in the text itself or in `memory`, to the residual."""
        values = self._norm(f"{name}_norm", layer, hidden)
        others = values if memory is None else memory
        query, key, value = (
            self._heads(self._linear(f"{name}_{part}.weight", layer, each))
            for part, each in (("q", values), ("k", others), ("v", others))
        )
        scores = query @ key.transpose(2, 3)
        if bias is not None:
            scores = scores + bias
        found = torch.softmax(scores.float(), dim=-1).to(value.dtype) @ value
        return hidden + self._linear(f"{name}_o.weight", layer, found.transpose(1, 2).flatten(2))

    def _passed(self, stack: str, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        values = self._norm(f"{stack}.ffn_norm", layer, hidden)
        inner = self._linear(f"{stack}.ffn_up.weight", layer, values)
        if "gated_mlp" in self.hyper.flags:
            gate = self._linear(f"{stack}.ffn_gate.weight", layer, values)
            inner = activate(gate, self.hyper.activation) * inner
        else:
            inner = activate(inner, self.hyper.activation)
        return hidden + self._linear(f"{stack}.ffn_down.weight", layer, inner)

    def _heads(self, values: torch.Tensor) -> torch.Tensor:
        return values.view(*values.shape[:-1], -1, self.hyper.head_dim).transpose(1, 2)

    def _norm(self, name: str, layer: int, values: torch.Tensor) -> torch.Tensor:
        weight = self._need(f"{name}.weight", layer)
        return normalize(values, weight, None, kind=self.spec.norm, eps=self.hyper.norm_eps)

    def _linear(self, slot: str, layer: int, values: torch.Tensor) -> torch.Tensor:
        weight = self._need(slot, layer)
        result = F.linear(values, weight)
        return result if self._adapt is None else self._adapt.linear((slot, layer), values, result, weight, None)

    def _need(self, slot: str, layer: int) -> torch.Tensor:
        found = self._get(slot, layer)
        if found is None:
            raise InputError(f"the model has no {slot}")
        return found

    def _get(self, slot: str, layer: int) -> torch.Tensor | None:
        if (slot, layer) in self._kept:
            return self._kept[slot, layer]
        weight = self._weight(slot, layer)
        if weight is not None:
            weight = weight.to(self.device, torch.float32 if slot in self._float32 else self.dtype)
        if self.resident:
            self._kept[slot, layer] = weight
        return weight


def _buckets(apart: torch.Tensor, stacks: Seq2Seq, *, both_ways: bool) -> torch.Tensor:
    found = bucket_of(apart.numpy(), both_ways=both_ways, buckets=stacks.buckets, furthest=stacks.distance)
    return torch.from_numpy(found)
