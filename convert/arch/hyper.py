"""What a config.json says of a model, in one vocabulary for all families."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

__all__ = ["Experts", "Hyperparameters", "Latent", "Rope", "Seq2Seq"]


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding of one kind of layer.

    Attributes:
        theta: base of the frequencies.
        dim: values per head that are turned; the rest pass through.
        kind: "default", "linear", "dynamic", "llama3", "yarn" or "longrope", as `rope_type` in config.json.
        parameters: the other keys of config.json's `rope_scaling` / `rope_parameters`, with
            `original_max_position_embeddings` filled in where the kind needs it.
        interleaved: neighbouring values are turned together, (0, 1), (2, 3), ...; else values half of `dim` apart.
    """

    theta: float
    dim: int
    kind: str = "default"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    interleaved: bool = False

    def with_parameters(self, parameters: Mapping[str, Any]) -> Rope:
        """Gives the same with other parameters."""
        return replace(self, parameters=parameters)


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts in the place of a layer's MLP.

    Attributes:
        count: experts of a layer.
        used: experts that a token goes to.
        intermediate: inner values of one expert.
        layers: per layer, whether it has experts instead of one MLP.
        gating: what turns the router's outputs into weights: "softmax" over all experts, then the greatest are chosen;
            "softmax_chosen": the greatest are chosen, then softmax over these; "sigmoid" of each.
        normalized: the weights of the chosen experts are divided by their sum.
        scale: factor on the weights at the end.
        shared: inner values of the MLP that every token goes to beside its experts; 0 if there is none.
        shared_gate: its output is multiplied by the sigmoid of a projection of the input (Qwen2-MoE).
        groups, groups_used: experts lie in so many groups, of which only so many are looked at (DeepSeek); 1 and 1.
        group_top: how many of a group's scores make its own: 1, or 2 (DeepSeek-V3).
        limit: the gate is cut off above this, what goes up beyond plus and minus this, and then one is added to it
            (gpt-oss); None: nothing of this.
    """

    count: int
    used: int
    intermediate: int
    layers: tuple[bool, ...]
    gating: str = "softmax"
    normalized: bool = False
    scale: float = 1.0
    shared: int = 0
    shared_gate: bool = False
    groups: int = 1
    groups_used: int = 1
    group_top: int = 1
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class Latent:
    """Attention whose keys and values are made from a few values per token (DeepSeek-V2, arXiv 2405.04434, 2.1).

    A head has `plain` values that no position turns, and after them `turned` ones; the key's turned values are the same
    in all heads. `Hyperparameters.head_dim` is the sum of both.

    Attributes:
        rank: values per token that keys and values are made from.
        query_rank: the same of queries; 0 where they are projected at once.
        plain: values of a head that are not turned.
        turned: values of a head that are.
        value: values of a head of the result.
    """

    rank: int
    query_rank: int
    plain: int
    turned: int
    value: int


@dataclass(frozen=True, slots=True)
class Seq2Seq:
    """What an encoder-decoder has besides its encoder (T5, arXiv 1910.10683, section 2.1).

    Attributes:
        layers: of the decoder.
        buckets: distances between tokens that attention tells apart, each with one number per head.
        distance: tokens from which on all distances are one.
        start: id of the token that the decoder begins with.
    """

    layers: int
    buckets: int
    distance: int
    start: int


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """What a config.json says, in one vocabulary for all families.

    Attributes:
        layers, hidden, heads, kv_heads, head_dim, intermediate, vocab, context: sizes. `vocab` counts embedding rows.
        norm_eps: epsilon of the norms.
        activation: "silu", "gelu" (erf), "gelu_tanh", "gelu_quick" (x * sigmoid(1.702 x)), "relu",
            "relu2" (its square).
        rope: rotary positions of full-attention layers; None where positions are learned.
        rope_local: those of sliding-window layers where they differ (Gemma 3).
        sliding_window: tokens a sliding layer sees, itself included; None if every layer sees all.
        sliding_layers: per layer, whether it uses the window.
        attention_scale: factor on q·k before the softmax.
        inverse_layer_scale: that factor is divided by the layer's number, counted from 1 (a GPT-2 option).
        attention_softcap, logit_softcap: `cap * tanh(x / cap)` on attention scores and on logits; None if absent.
        embedding_scale: factor on token embeddings.
        parallel_residual: attention and MLP both read the layer's input (GPT-NeoX).
        tied: config says the head shares the embedding's values.
        flags: names that switch optional rows of the table: "attention_bias", "mlp_bias", ...
        residual_scale: factor on what attention and MLP add to the residual (Granite, MiniCPM).
        logit_scale: factor on logits, before their cap.
        clip_qkv: q, k and v are clamped to plus and minus this; None: they are not.
        rope_layers: per layer, whether positions turn q and k; empty: in all layers, if `rope` is not None.
        alibi: what a head's scores lose per token of distance, one number per head, in the unit of scores that were
            scaled; empty: nothing (arXiv 2108.12409).
        position_offset: learned positions begin at this row of their table (OPT: 2).
        embedding_width: values of a token embedding where they are not `hidden` (OPT-350m); 0: `hidden`.
        token_types: rows of the embedding of token types (BERT); 0 if there is none.
        causal: a token sees only those before it and itself.
        pooling: what makes one vector of a text: "" for none, "mean", "cls", "last".
        experts: None where every layer has one MLP.
        seq2seq: None but for an encoder-decoder, whose encoder `layers` counts.
        latent: None where keys and values are projected at once.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    context: int
    norm_eps: float
    activation: str
    attention_scale: float
    rope: Rope | None = None
    rope_local: Rope | None = None
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    parallel_residual: bool = False
    inverse_layer_scale: bool = False
    tied: bool = False
    flags: frozenset[str] = frozenset()
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    clip_qkv: float | None = None
    rope_layers: tuple[bool, ...] = ()
    alibi: tuple[float, ...] = ()
    position_offset: int = 0
    embedding_width: int = 0
    token_types: int = 0
    causal: bool = True
    pooling: str = ""
    experts: Experts | None = None
    seq2seq: Seq2Seq | None = None
    latent: Latent | None = None

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts instead of one MLP."""
        return self.experts is not None and layer >= 0 and self.experts.layers[layer]

    @property
    def deepest(self) -> int:
        """Layers of the encoder or the decoder, whichever has more; all layers of other models."""
        return max(self.layers, self.seq2seq.layers if self.seq2seq is not None else 0)

    @property
    def dims(self) -> dict[str, int]:
        """Values of the symbolic dimensions in `TensorSpec.shape`."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        experts = {}
        if self.experts is not None:
            experts = {
                "experts": self.experts.count,
                "expert_ffn": self.experts.intermediate,
                "expert_ffn2": 2 * self.experts.intermediate,
                "shared_ffn": self.experts.shared,
                "shared_ffn2": 2 * self.experts.shared,
            }
        return {
            "vocab": self.vocab,
            "hidden": self.hidden,
            "context": self.context,
            "head_dim": self.head_dim,
            "q": q,
            "kv": kv,
            "qkv": q + 2 * kv,
            "ffn": self.intermediate,
            "ffn2": 2 * self.intermediate,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "positions": self.context + self.position_offset,
            "embedding": self.embedding_width or self.hidden,
            "token_types": self.token_types,
            "one": 1,
            "buckets": self.seq2seq.buckets if self.seq2seq is not None else 0,
            "attended": self.heads * (self.latent.value if self.latent else self.head_dim),
            **experts,
            **self._latent_dims(),
        }

    def _latent_dims(self) -> dict[str, int]:
        latent = self.latent
        if latent is None:
            return {}
        return {
            "query_rank": latent.query_rank,
            "rank": latent.rank,
            "rank_turned": latent.rank + latent.turned,
            "plain_rows": self.heads * latent.plain,
            "plain_and_value": self.heads * (latent.plain + latent.value),
        }
