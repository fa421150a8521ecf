"""One decoder layer in torch, put together from what the family's table has and what config.json says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F

from quantpress.convert.arch.spec import Hyperparameters
from quantpress.convert.attention import Store, attend, attend_next
from quantpress.convert.rope import turn
from quantpress.convert.traits import Traits, steps_of, traits_of

__all__ = [
    "DOWN",
    "OUTPUT",
    "QKV",
    "STEPS",
    "UP",
    "Adapt",
    "Layer",
    "Linear",
    "Observe",
    "State",
    "Traits",
    "Turns",
    "activate",
    "normalize",
    "steps_of",
    "traits_of",
]

Observe = Callable[[str, torch.Tensor], "torch.Tensor | None"]
"""Called with a linear's slot (`attn_q.weight`) and its input, (B, T, K), before each linear runs; a tensor that it
returns takes the input's place."""

Turns = tuple[torch.Tensor, torch.Tensor]

State = Mapping[str, torch.Tensor]
"""What a layer carries from step to step: `hidden`, the residual; `inner`, the input of an output projection;
`attended`, the attention's output where it joins the residual together with the MLP's."""

QKV, OUTPUT, UP, DOWN = STEPS = range(4)  # groups of linears that read the same input, in the order they run


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


def normalize(
    values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, kind: str, eps: float
) -> torch.Tensor:
    """Normalizes the last dimension in float32: "rms" by its root mean square, "layer" by mean and deviation too."""
    if kind == "layer":
        return F.layer_norm(values.float(), weight.shape, weight, bias, eps).to(values.dtype)
    wide = values.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * scaled).to(values.dtype)


def activate(values: torch.Tensor, kind: str) -> torch.Tensor:
    """Applies an activation by its name in `Hyperparameters.activation`."""
    if kind == "silu":
        return F.silu(values)
    if kind == "gelu":
        return F.gelu(values)
    if kind == "gelu_tanh":
        return F.gelu(values, approximate="tanh")
    return F.relu(values)


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer with its weights.

    Attributes:
        index: number of the layer, from 0.
        traits: kind of the layer.
        hyper: sizes and scales.
        weights: slot -> weight; norms and their biases in float32. Linears whose weights are of a narrower type than
            the hidden states compute in that type.
        observe: told the input of every linear; see `Observe`.
        adapt: changes the output of linears.
        attention_type: type to compute softmax(q k^T) v in, where it is not that of the hidden states.
        linears: slot -> what stands in the place of a weight.
    """

    index: int
    traits: Traits
    hyper: Hyperparameters
    weights: Mapping[str, torch.Tensor]
    observe: Observe | None = None
    adapt: Adapt | None = None
    attention_type: torch.dtype | None = None
    linears: Mapping[str, Linear] = field(default_factory=dict)

    def run(self, hidden: torch.Tensor, turns: Turns | None, cache: Store | None) -> torch.Tensor:
        """Computes the layer.

        Args:
            hidden: (B, T, hidden).
            turns: cosine and sine of the tokens' positions; None where positions are learned.
            cache: earlier tokens' keys and values, extended by this call.

        Returns:
            (B, T, hidden).
        """
        state: State = {"hidden": hidden}
        for step in STEPS:
            state = self.finish(step, state, self.begin(step, state), turns, cache)
        return state["hidden"]

    def begin(self, step: int, state: State) -> torch.Tensor:
        """Gives the input of a step's linears, (B, T, K).

        Args:
            step: one of `STEPS`.
            state: what the steps before have left; `hidden` alone before the first one.
        """
        if step in (OUTPUT, DOWN):
            return state["inner"]
        return self._norm("attn_norm" if step == QKV else "ffn_norm", state["hidden"])

    def finish(
        self, step: int, state: State, values: torch.Tensor, turns: Turns | None = None, cache: Store | None = None
    ) -> State:
        """Runs a step's linears and what follows them, up to the input of the next step.

        Only the first step looks at more than one token at a time.

        Args:
            step: one of `STEPS`.
            state: as for `begin`.
            values: what `begin` gave.
            turns: as for `run`; only the first step turns.
            cache: as for `run`; only the first step extends it.

        Returns:
            The state before the next step; `hidden` alone after the last one.
        """
        if step == QKV:
            return {**state, "inner": self._attention(values, turns, cache)}
        if step == UP:
            return {**state, "inner": self._activated(values)}
        hidden, parallel = state["hidden"], self.hyper.parallel_residual
        if step == OUTPUT:
            attended = self._linear("attn_output", values)
            if self.traits.post_norms:
                attended = self._norm("post_attention_norm", attended)
            return {"hidden": hidden, "attended": attended} if parallel else {"hidden": hidden + attended}
        passed = self._linear("ffn_down", values)
        if parallel:
            return {"hidden": passed + state["attended"] + hidden}
        if self.traits.post_norms:
            passed = self._norm("post_ffw_norm", passed)
        return {"hidden": hidden + passed}

    def _norm(self, name: str, values: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        return normalize(values, weight, bias, kind=self.traits.norm, eps=self.hyper.norm_eps)

    def _linear(self, name: str, values: torch.Tensor) -> torch.Tensor:
        if self.observe is not None and (seen := self.observe(f"{name}.weight", values)) is not None:
            values = seen
        slot, bias = f"{name}.weight", self.weights.get(f"{name}.bias")
        packed = self.linears.get(slot)
        if packed is not None:
            result = packed.run(values, bias)
        else:
            weight = self.weights[slot]
            result = F.linear(values.to(weight.dtype), weight, bias if bias is None else bias.to(weight.dtype))
        if self.adapt is None:
            return result
        dense = self.weights[slot] if packed is None else packed.dense()
        return self.adapt.linear((slot, self.index), values, result, dense, bias)

    def _attention(self, values: torch.Tensor, turns: Turns | None, cache: Store | None) -> torch.Tensor:
        hyper = self.hyper
        query, key, value = (self._heads(part) for part in self._qkv(values))
        if self.traits.head_norms:
            query, key = self._norm("attn_q_norm", query), self._norm("attn_k_norm", key)
        if turns is not None:
            query, key = turn(query, *turns), turn(key, *turns)
        bias = None
        if cache is not None:
            key, value, bias = cache.extend(self.index, key, value)
        kind = self.attention_type or query.dtype
        query, key, value = query.to(kind), key.to(kind), value.to(kind)
        scale = hyper.attention_scale / (self.index + 1 if hyper.inverse_layer_scale else 1)
        if bias is not None:
            attended = attend_next(query, key, value, bias, scale=scale, softcap=hyper.attention_softcap)
        else:
            slides = bool(hyper.sliding_layers) and hyper.sliding_layers[self.index]
            window = hyper.sliding_window if slides else None
            attended = attend(query, key, value, scale=scale, window=window, softcap=hyper.attention_softcap)
        return attended.transpose(1, 2).flatten(2).to(values.dtype)

    def _qkv(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if not self.traits.fused_qkv:
            return tuple(self._linear(f"attn_{part}", values) for part in ("q", "k", "v"))
        sizes = self.hyper.dims
        return torch.split(self._linear("attn_qkv", values), [sizes["q"], sizes["kv"], sizes["kv"]], dim=-1)

    def _heads(self, values: torch.Tensor) -> torch.Tensor:
        return values.view(*values.shape[:-1], -1, self.hyper.head_dim).transpose(1, 2)

    def _activated(self, values: torch.Tensor) -> torch.Tensor:
        up = self._linear("ffn_up", values)
        if self.traits.gate == "separate":
            return activate(self._linear("ffn_gate", values), self.hyper.activation) * up
        if self.traits.gate == "fused":
            gate, up = up.chunk(2, dim=-1)
            return up * activate(gate, self.hyper.activation)
        return activate(up, self.hyper.activation)
