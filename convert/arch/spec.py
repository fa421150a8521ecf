"""What a model family is: one table of tensors, and how its config.json becomes hyperparameters.

GGUF names, the torch decoder, quantizer targets, adapter targets and the checks before any weight is read all follow
from these rows. A new family is a new table; a third `if family ==` anywhere is a missing column here.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from quantpress.convert.arch.hyper import Experts, Hyperparameters, Latent, Rope

__all__ = ["GGUF_FACTORS", "ArchSpec", "Experts", "Hyperparameters", "Latent", "Layout", "Role", "Rope", "TensorSpec"]

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
    ROUTER = "router"  # chooses experts: small, and never quantized


class Layout(enum.Enum):
    """How the Hugging Face rows differ from the decoder's own form, (N, K) with q, k, v one after another."""

    PLAIN = "plain"
    TRANSPOSED = "transposed"  # (K, N), as transformers' Conv1D
    HEADS_QKV = "heads_qkv"  # rows are (heads, 3, head_dim) instead of (3, heads, head_dim)
    GROUPED_QKV = "grouped_qkv"  # rows are (kv_heads, heads / kv_heads + 2, head_dim): a group's q, its k, its v
    STACKED = "stacked"  # (experts, N, K): all experts in one tensor
    STACKED_TRANSPOSED = "stacked_transposed"  # (experts, K, N)
    UNIT_ROWS = "unit_rows"  # each row is divided by its length (Baichuan 2's head)


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
        part: which rows of the stored tensor this one is: "q", "k" or "v" of a fused projection (all q before all k
            before all v once its `layout` is undone), "gate" or "up" of a fused one ("gate_even" and "up_odd" where
            they alternate), "plain" or "value" where each head has its rows of the key and then those of the value
            (`Latent`). `shape` stays that of the stored tensor. Empty: all rows.
        layers: "experts" or "dense" for rows that only layers with or without experts have (`Experts.layers`);
            "encoder" or "decoder" for those of one of the two stacks of an encoder-decoder.
        expert: number of the expert, of rows that `ArchSpec.rows` has made from one that stands for all.
        gguf_heads: GGUF has a matrix for each head: "rows" those of (N, K) one head after the other, (heads, N / heads,
            K); "columns" each of them transposed, (heads, K, N / heads). Empty: one matrix.
        gguf_scale: hyperparameter by which values are multiplied in GGUF, where llama.cpp's graph has no such
            factor: T5's norm before the head takes the factor on logits.
        place: name by which the decoder asks for it, where GGUF calls it by another tensor's name (gpt-oss).
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
    part: str = ""
    layers: str = ""
    expert: int = -1
    gguf_heads: str = ""
    gguf_scale: str = ""
    place: str = ""

    @property
    def per_expert(self) -> bool:
        """Whether there is one for each expert: stored one by one (`{expert}` in its name) or as a stack."""
        return "{expert}" in self.hf or self.layout in (Layout.STACKED, Layout.STACKED_TRANSPOSED)

    @property
    def per_head(self) -> bool:
        """Whether it stands for one tensor per head (`{head}` in its name) that are rows of one; see `head_rows`."""
        return "{head}" in self.hf

    @property
    def per_layer(self) -> bool:
        """Whether there is one in each layer."""
        return "{layer}" in self.hf

    @property
    def slot(self) -> str:
        """Name without the layer, as the decoder asks for it: `ffn_up.weight`, `ffn_up_exps.3.weight`."""
        name = self.place or self.gguf.removeprefix("blk.{layer}.")
        if self.expert < 0:
            return name
        stem, _, kind = name.rpartition(".")
        return f"{stem}.{self.expert}.{kind}"

    def in_layer(self, hyper: Hyperparameters, layer: int) -> bool:
        """Whether a layer has it."""
        if self.layers == "encoder":
            return layer < hyper.layers
        if self.layers == "decoder":
            return hyper.seq2seq is not None and layer < hyper.seq2seq.layers
        return not self.layers or (self.layers == "experts") == hyper.has_experts(layer)

    def only(self, layers: str) -> TensorSpec:
        """Gives the same row for layers with ("experts") or without ("dense") experts alone."""
        return replace(self, layers=layers)

    def of_expert(self, expert: int) -> TensorSpec:
        """Gives the row of one expert; its name is complete but for the layer."""
        return replace(self, hf=self.hf.replace("{expert}", str(expert)), expert=expert)


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
        gguf_rope: "norm" or "neox", the order of rotary pairs that llama.cpp uses for this architecture; "" if none.
        tensors: the table.
        ignored: names (with `{layer}`) that old checkpoints carry and nothing needs.
        read_config: config.json -> hyperparameters. Raises InputError naming the key.
        gguf_metadata: hyperparameters, config -> `{key without "<arch>.": (GGUF type, value)}` in the file's order;
            keys that begin with "tokenizer." are whole.
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
        gguf_runs: llama.cpp computes this architecture at all; where not, `gguf_check` refuses every model.
        gguf_opens: a GGUF file of it can be opened as a checkpoint.
        other_prefixes: what stands in place of `prefix` in checkpoints of a larger model.
        head_prefixes: what may stand before the names that lack `prefix`.
        foreign: starts of names that belong to other parts of a larger model (vision tower, projector).
        gguf_key: key that GGUF files of this family have and others of the same `gguf` lack, or have as 0; "" if those
            without any such key are this family's.
        other_rows: rows for checkpoints that store some tensors otherwise, e.g. all experts in one: each stands in the
            place of the row of `tensors` with the same `gguf`, where that one's name is missing and its own is there.
        old_names: pairs of an end of a name and what old checkpoints have there (`LayerNorm.gamma`).
        kind: what the model is run as: "decoder" continues a text, "encoder" makes vectors of one (and may have a head
            that fills in masked tokens), "encoder_decoder" continues a second text while it looks at a first one.
        own_head: whether the head is tied is not for config.json to say: a checkpoint that holds one uses it (T5 since
            transformers 5).
    """

    family: str
    classes: tuple[str, ...]
    model_types: tuple[str, ...]
    gguf: str
    prefix: str
    norm: str
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
    gguf_runs: bool = True
    gguf_opens: bool = True
    other_prefixes: tuple[str, ...] = ()
    head_prefixes: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    gguf_key: str = ""
    other_rows: tuple[TensorSpec, ...] = ()
    old_names: tuple[tuple[str, str], ...] = ()
    kind: str = "decoder"
    own_head: bool = False

    def rows(self, hyper: Hyperparameters) -> list[tuple[TensorSpec, int]]:
        """Rows that a checkpoint with these hyperparameters must hold, layer by layer; layer is -1 outside layers."""
        before = [(spec, -1) for spec in self.present(hyper) if not spec.per_layer]
        layers, decoder = range(hyper.deepest), hyper.seq2seq.layers if hyper.seq2seq is not None else 0
        kind_of = [(hyper.has_experts(one), one < hyper.layers, one < decoder) for one in layers]
        first = {kind: layer for layer, kind in reversed(list(enumerate(kind_of)))}
        kinds = {kind: self.layer_rows(hyper, layer) for kind, layer in first.items()}
        return before + [(spec, layer) for layer in layers for spec in kinds[kind_of[layer]]]

    def present(self, hyper: Hyperparameters) -> list[TensorSpec]:
        """Rows whose flags these hyperparameters have."""
        return [spec for spec in self.tensors if not spec.flag or spec.flag in hyper.flags]

    def learned(self, hyper: Hyperparameters) -> bool:
        """Whether positions are rows of a table of the model."""
        return any(spec.slot == "position_embd.weight" for spec in self.present(hyper))

    def layer_rows(self, hyper: Hyperparameters, layer: int) -> list[TensorSpec]:
        """Rows of one layer, those of experts once for each."""
        rows: list[TensorSpec] = []
        for spec in self.present(hyper):
            if not spec.per_layer or not spec.in_layer(hyper, layer):
                continue
            if spec.per_expert and hyper.experts is not None:
                rows += [spec.of_expert(expert) for expert in range(hyper.experts.count)]
            else:
                rows.append(spec)
        return rows

    def others(self, row: TensorSpec) -> tuple[TensorSpec, ...]:
        """Gives the rows of `other_rows` that may stand in the place of one, of the same expert."""
        same = tuple(other for other in self.other_rows if other.gguf == row.gguf)
        return same if row.expert < 0 else tuple(other.of_expert(row.expert) for other in same)

    def heads_of(self, row: TensorSpec, hyper: Hyperparameters) -> list[TensorSpec]:
        """Gives a row for each head of one that stands for all; else the row."""
        if not row.per_head:
            return [row]
        heads = range(hyper.dims[row.shape[0]])
        return [replace(row, hf=row.hf.replace("{head}", str(head)), shape=row.shape[1:]) for head in heads]

    def names(self, row: TensorSpec, layer: int) -> tuple[str, ...]:
        """Names under which a checkpoint may hold a row, the usual one first; `layer` is ignored outside layers."""
        name = row.hf.format(layer=layer, head=0)
        old = [name.removesuffix(end) + before for end, before in self.old_names if name.endswith(end)]
        return tuple(spelling for each in (name, *old) for spelling in self._spellings(each))

    def ignored_names(self, layers: int) -> frozenset[str]:
        """Every spelling of every name in `ignored`, for a model of so many layers."""
        plain = (text.format(layer=layer) for text in self.ignored for layer in range(layers))
        return frozenset(spelling for name in plain for spelling in self._spellings(name))

    def _spellings(self, name: str) -> tuple[str, ...]:
        if not name.startswith(self.prefix):
            return (name, *(prefix + name for prefix in self.head_prefixes))
        rest = name.removeprefix(self.prefix)
        return (name, *(prefix + rest for prefix in self.other_prefixes), rest)
