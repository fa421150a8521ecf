"""What a model family is: one table of tensors, and how its config.json becomes hyperparameters.

GGUF names, the torch decoder, quantizer targets, adapter targets and the checks before any weight is read all follow
from these rows. A new family is a new table; a third `if family ==` anywhere is a missing column here.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

# tensors that only GGUF files have: what the rotary frequencies are divided by
GGUF_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


class Role(enum.Enum):
    """What a tensor is for; decides its type in a quantized file."""

    EMBEDDING = "embedding"
    POSITION = "position"
    HEAD = "head"
    NORM = "norm"
    LINEAR = "linear"
    BIAS = "bias"


class Layout(enum.Enum):
    """How the Hugging Face rows differ from the decoder's own form, (N, K) with q, k, v one after another."""

    PLAIN = "plain"
    TRANSPOSED = "transposed"  # (K, N), as transformers' Conv1D
    HEADS_QKV = "heads_qkv"  # rows are (heads, 3, head_dim) instead of (3, heads, head_dim)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One row of a family's table.

    Attributes:
        hf: name in the checkpoint, with `{layer}` where the layer number stands.
        gguf: name in llama.cpp (gguf package, MODEL_TENSOR and TENSOR_NAMES). Without `blk.{layer}.` this is also
            the name the decoder asks for: `attn_q.weight`, `ffn_down.weight`.
        shape: symbolic dimensions in the checkpoint's order, keys of `Hyperparameters.dims`.
        role: what it is for.
        layout: how the checkpoint stores it.
        rotary: `"heads"` or `"kv_heads"` for rows that rotary positions turn; llama.cpp's NORM rope wants them
            interleaved, which the families with `gguf_rope="norm"` need in the file.
        flag: present exactly when this flag is in `Hyperparameters.flags`; empty: always present.
        offset: added to the values in GGUF and in the decoder (Gemma stores norm weights minus one).
        tied_to: name of the tensor that stands in when this one is absent and the embeddings are tied.
    """

    hf: str
    gguf: str
    shape: tuple[str, ...]
    role: Role
    layout: Layout = Layout.PLAIN
    rotary: str = ""
    flag: str = ""
    offset: float = 0.0
    tied_to: str = ""

    @property
    def per_layer(self) -> bool:
        """Whether there is one in each layer."""
        return "{layer}" in self.hf

    @property
    def slot(self) -> str:
        """Name without the layer, as the decoder asks for it."""
        return self.gguf.removeprefix("blk.{layer}.")


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding of one kind of layer.

    Attributes:
        theta: base of the frequencies.
        dim: values per head that are turned; the rest pass through.
        kind: "default", "linear", "dynamic", "llama3", "yarn" or "longrope", as `rope_type` in config.json.
        parameters: the other keys of config.json's `rope_scaling` / `rope_parameters`, with
            `original_max_position_embeddings` filled in where the kind needs it.
    """

    theta: float
    dim: int
    kind: str = "default"
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """What a config.json says, in one vocabulary for all families.

    Attributes:
        layers, hidden, heads, kv_heads, head_dim, intermediate, vocab, context: sizes. `vocab` counts embedding rows.
        norm_eps: epsilon of the norms.
        activation: "silu", "gelu" (erf), "gelu_tanh", "relu".
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

    @property
    def dims(self) -> dict[str, int]:
        """Values of the symbolic dimensions in `TensorSpec.shape`."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
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
        }


@dataclass(frozen=True, slots=True)
class ArchSpec:
    """A model family.

    Attributes:
        family: short name, for tables and messages.
        classes: names in config.json's `architectures`.
        model_types: values of config.json's `model_type`.
        gguf: `general.architecture` in GGUF.
        prefix: what every name but the head starts with; absent in checkpoints saved from the bare model.
        norm: "rms" or "layer".
        positions: "rotary" or "learned".
        gguf_rope: "norm" or "neox", the order of rotary pairs that llama.cpp uses for this architecture; "" if none.
        tensors: the table.
        ignored: names (with `{layer}`) that old checkpoints carry and nothing needs.
        read_config: config.json -> hyperparameters. Raises InputError naming the key.
        gguf_metadata: hyperparameters, config -> `{key without "<arch>.": (GGUF type, value)}` in the file's order.
        gguf_tensors: hyperparameters -> tensors that exist only in GGUF: name -> float32 values (rope_freqs.weight,
            rope_factors_long.weight), as tuples.
        config_from_gguf: GGUF metadata (plain values, full keys), tensor names, and the values of those of
            `GGUF_FACTORS` that the file holds -> config.json in Hugging Face's form.
        gguf_check: hyperparameters, config -> nothing. Raises InputError naming what llama.cpp's graph for this
            architecture cannot compute; called before a GGUF file is begun.
        gguf_notes: hyperparameters, config -> sentences a user should read about the GGUF file, e.g. that its context
            ends where llama.cpp would differ.
        gguf_head: "optional" (output.weight is written unless the head is tied), "required" (llama.cpp wants it even
            then) or "never" (it is refused: the embedding is always the head).
        other_prefixes: what stands in place of `prefix` in checkpoints of a larger model.
        head_prefixes: what may stand before the names that lack `prefix`.
        foreign: starts of names that belong to other parts of a larger model (vision tower, projector).
    """

    family: str
    classes: tuple[str, ...]
    model_types: tuple[str, ...]
    gguf: str
    prefix: str
    norm: str
    positions: str
    gguf_rope: str
    tensors: tuple[TensorSpec, ...]
    read_config: Callable[[Mapping[str, Any]], Hyperparameters]
    gguf_metadata: Callable[[Hyperparameters, Mapping[str, Any]], dict[str, tuple[str, Any]]]
    gguf_tensors: Callable[[Hyperparameters], dict[str, tuple[float, ...]]]
    config_from_gguf: Callable[[Mapping[str, Any], frozenset[str], Mapping[str, tuple[float, ...]]], dict[str, Any]]
    ignored: tuple[str, ...] = ()
    gguf_check: Callable[[Hyperparameters, Mapping[str, Any]], None] = lambda _hyper, _config: None
    gguf_notes: Callable[[Hyperparameters, Mapping[str, Any]], tuple[str, ...]] = lambda _hyper, _config: ()
    gguf_head: str = "optional"
    other_prefixes: tuple[str, ...] = ()
    head_prefixes: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()

    def rows(self, hyper: Hyperparameters) -> list[tuple[TensorSpec, int]]:
        """Rows that a checkpoint with these hyperparameters must hold, layer by layer; layer is -1 outside layers."""
        present = [spec for spec in self.tensors if not spec.flag or spec.flag in hyper.flags]
        before = [(spec, -1) for spec in present if not spec.per_layer]
        layers = [(spec, layer) for layer in range(hyper.layers) for spec in present if spec.per_layer]
        return before + layers

    def names(self, row: TensorSpec, layer: int) -> tuple[str, ...]:
        """Names under which a checkpoint may hold a row, the usual one first; `layer` is ignored outside layers."""
        return self._spellings(row.hf.format(layer=layer))

    def ignored_names(self, layers: int) -> frozenset[str]:
        """Every spelling of every name in `ignored`, for a model of so many layers."""
        plain = (text.format(layer=layer) for text in self.ignored for layer in range(layers))
        return frozenset(spelling for name in plain for spelling in self._spellings(name))

    def _spellings(self, name: str) -> tuple[str, ...]:
        if not name.startswith(self.prefix):
            return (name, *(prefix + name for prefix in self.head_prefixes))
        rest = name.removeprefix(self.prefix)
        return (name, *(prefix + rest for prefix in self.other_prefixes), rest)
