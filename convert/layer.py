"""One decoder layer in torch, put together from what the family's table has and what config.json says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from quantpress.convert import experts
from quantpress.convert.arch.spec import Hyperparameters
from quantpress.convert.attention import Scores, Store, attend, attend_next
from quantpress.convert.latent import latent_heads
from quantpress.convert.linear import Adapt, Linear
from quantpress.convert.norms import activate, normalize
from quantpress.convert.rope import turn
from quantpress.convert.traits import Traits, steps_of, traits_of

__all__ = [
    "DOWN",
    "OUTPUT",
    "QKV",
    "SLOPES",
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

SLOPES = "attn_slopes"
"""Among a layer's weights: `Hyperparameters.alibi` as a tensor, where they are not to be copied to a device anew."""

QKV, OUTPUT, UP, DOWN = STEPS = range(4)  # groups of linears that read the same input, in the order they run


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
        name = self.traits.attention_norm if step == QKV else self.traits.mlp_norm
        return self.norm(name, state["hidden"]) if name else state["hidden"]

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
            return {**state, **self._inner(values)}
        parallel = self.hyper.parallel_residual
        if step == OUTPUT:
            attended = self.linear("attn_output", values)
            if self.traits.post_norms:
                attended = self.norm("post_attention_norm", attended)
            attended = self._scaled(attended)
            if parallel:
                return {"hidden": state["hidden"], "attended": attended}
            return {"hidden": self._joined(state["hidden"], attended, "attn_output_norm")}
        passed = experts.down(self, values, state["routes"]) if self.traits.experts else self.linear("ffn_down", values)
        if self.traits.post_norms:
            passed = self.norm("post_ffw_norm", passed)
        passed = self._scaled(passed)
        if parallel:
            passed = passed + state["attended"]
        return {"hidden": self._joined(state["hidden"], passed, "layer_output_norm")}

    def _scaled(self, values: torch.Tensor) -> torch.Tensor:
        scale = self.hyper.residual_scale
        return values if scale == 1.0 else values * scale

    def _joined(self, hidden: torch.Tensor, added: torch.Tensor, norm: str) -> torch.Tensor:
        hidden = added + hidden
        return self.norm(norm, hidden) if self.traits.sum_norms else hidden

    def _inner(self, values: torch.Tensor) -> State:
        """Gives what the down projection reads, and where each token goes if there are experts."""
        if not self.traits.experts:
            return {"inner": self.activated(values)}
        inner, routes = experts.up(self, values)
        return {"inner": inner, "routes": routes}

    def norm(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Normalizes the last dimension by a norm of the layer: its slot without ".weight"."""
        weight, bias = self.weights.get(f"{name}.weight"), self.weights.get(f"{name}.bias")
        return normalize(values, weight, bias, kind=self.traits.norm, eps=self.hyper.norm_eps)

    def linear(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Multiplies (..., K) with a weight and adds its bias: (..., N).

        Args:
            name: its slot without ".weight".
            values: the input.
        """
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
        query, key, value = self._turned_heads(values, turns)
        bias = None
        if cache is not None:
            key, value, bias = cache.extend(self.index, key, value)
        kind = self.attention_type or query.dtype
        query, key, value = query.to(kind), key.to(kind), value.to(kind)
        scores = self._scores(query.device)
        attended = attend(query, key, value, scores) if bias is None else attend_next(query, key, value, bias, scores)
        return attended.transpose(1, 2).flatten(2).to(values.dtype)

    def _scores(self, device: torch.device) -> Scores:
        hyper = self.hyper
        slides = bool(hyper.sliding_layers) and hyper.sliding_layers[self.index]
        return Scores(
            scale=hyper.attention_scale / (self.index + 1 if hyper.inverse_layer_scale else 1),
            window=hyper.sliding_window if slides else None,
            softcap=hyper.attention_softcap,
            causal=hyper.causal,
            slopes=self._slopes(device),
            sinks=self.weights["attn_sinks.weight"].float() if self.traits.sinks else None,
        )

    def _slopes(self, device: torch.device) -> torch.Tensor | None:
        if not self.hyper.alibi:
            return None
        found = self.weights.get(SLOPES)
        return torch.tensor(self.hyper.alibi, dtype=torch.float32, device=device) if found is None else found

    def _turned_heads(self, values: torch.Tensor, turns: Turns | None) -> tuple[torch.Tensor, ...]:
        if self.traits.latent and turns is not None:
            return latent_heads(self, values, turns)
        query, key, value = self._normal_heads(*self._qkv(values))
        if turns is not None:
            interleaved = self.hyper.rope is not None and self.hyper.rope.interleaved
            query, key = (turn(each, *turns, interleaved=interleaved) for each in (query, key))
        return query, key, value

    def _normal_heads(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Gives (B, heads, T, head_dim) of each, normalized as the family does it."""
        kind = self.traits.head_norms
        if kind == "whole":
            query, key = self.norm("attn_q_norm", query), self.norm("attn_k_norm", key)
        if self.hyper.clip_qkv is not None:
            query, key, value = (each.clamp(-self.hyper.clip_qkv, self.hyper.clip_qkv) for each in (query, key, value))
        query, key, value = (self.heads(each, self.hyper.head_dim) for each in (query, key, value))
        if kind == "each":
            return self.norm("attn_q_norm", query), self.norm("attn_k_norm", key), value
        if kind == "own":
            query, key = (
                self.norm(f"attn_{part}_norm", each.transpose(1, 2)).transpose(1, 2)
                for part, each in (("q", query), ("k", key))
            )
        return query, key, value

    def _qkv(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if not self.traits.fused_qkv:
            return tuple(self.linear(f"attn_{part}", values) for part in ("q", "k", "v"))
        sizes = self.hyper.dims
        return torch.split(self.linear("attn_qkv", values), [sizes["q"], sizes["kv"], sizes["kv"]], dim=-1)

    def heads(self, values: torch.Tensor, size: int) -> torch.Tensor:
        """Gives (B, heads, T, size) from (B, T, heads * size)."""
        return values.view(*values.shape[:-1], -1, size).transpose(1, 2)

    def activated(self, values: torch.Tensor, kind: str = "", expert: str = "") -> torch.Tensor:
        """Gives what a down projection reads.

        Args:
            values: (..., hidden).
            kind: "_exps" or "_shexp" of a mixture, "" of a plain MLP.
            expert: "." and a number with "_exps".
        """
        up = self.linear(f"ffn_up{kind}{expert}", values)
        if self.traits.gate == "separate":
            gate = self.linear(f"ffn_gate{kind}{expert}", values)
        elif self.traits.gate == "fused":
            gate, up = up.chunk(2, dim=-1)
        else:
            return activate(up, self.hyper.activation)
        limit = self.hyper.experts.limit if kind == "_exps" and self.hyper.experts is not None else None
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit) + 1
        return activate(gate, self.hyper.activation) * up
