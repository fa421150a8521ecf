"""MPT and the models of its code (StoryWriter, Replit, SEA-LION).

Sources: transformers' modeling_mpt.py for what most checkpoints use. It ignores several keys of the configuration; what
those mean is in the code that the models were published with, llm-foundry's modeling_mpt.py and attention.py: learned
positions where there is no ALiBi, biases, norms of whole q and k, grouped heads, a scale of logits, another greatest
slope. llama.cpp's src/models/mpt.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpress.convert.arch import fields
from quantpress.convert.arch.alibi import alibi_slopes
from quantpress.convert.arch.biased_rows import linear_rows, norm_rows
from quantpress.convert.arch.gguf_fields import general_config, real, size_metadata, whole
from quantpress.convert.arch.gguf_rotary import Entries
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Role, TensorSpec
from quantpress.quant.errors import InputError

_LAYER = "transformer.blocks.{layer}."
_BLOCK = "blk.{layer}."
_EMBEDDING = "transformer.wte.weight"


def _head_norms() -> tuple[TensorSpec, ...]:
    rows = []
    for part, width in (("q", "q"), ("k", "kv")):
        name, slot = f"{_LAYER}attn.{part}_ln", f"{_BLOCK}attn_{part}_norm"
        rows.append(TensorSpec(f"{name}.weight", f"{slot}.weight", (width,), Role.NORM, flag="qk_ln"))
        rows.append(TensorSpec(f"{name}.bias", f"{slot}.bias", (width,), Role.NORM, flag="qk_ln_bias"))
    return tuple(rows)


_TABLE = (
    TensorSpec(_EMBEDDING, "token_embd.weight", ("vocab", "hidden"), Role.EMBEDDING),
    TensorSpec(
        "transformer.wpe.weight", "position_embd.weight", ("context", "hidden"), Role.POSITION, flag="learned_positions"
    ),
    *norm_rows("transformer.norm_f", "output_norm", bias="bias"),
    TensorSpec("lm_head.weight", "output.weight", ("vocab", "hidden"), Role.HEAD, tied_to=_EMBEDDING),
    *norm_rows(f"{_LAYER}norm_1", f"{_BLOCK}attn_norm", bias="bias"),
    *linear_rows(f"{_LAYER}attn.Wqkv", f"{_BLOCK}attn_qkv", ("qkv", "hidden"), bias="bias"),
    *_head_norms(),
    *linear_rows(f"{_LAYER}attn.out_proj", f"{_BLOCK}attn_output", ("hidden", "q"), bias="bias"),
    *norm_rows(f"{_LAYER}norm_2", f"{_BLOCK}ffn_norm", bias="bias"),
    *linear_rows(f"{_LAYER}ffn.up_proj", f"{_BLOCK}ffn_up", ("ffn", "hidden"), bias="bias"),
    *linear_rows(f"{_LAYER}ffn.down_proj", f"{_BLOCK}ffn_down", ("hidden", "ffn"), bias="bias"),
)

_NORMS = (
    "low_precision_layernorm", "layernorm", "low_precision_layer_norm", "layer_norm",
)  # fmt: skip
_ATTENTION: Mapping[str, tuple[Any, ...]] = {
    "attn_uses_sequence_id": (False, None),
    "prefix_lm": (False, None),
    "qk_gn": (False, None),
    "rope": (False, None),
    "sliding_window_size": (-1, None),
    "attn_logit_softcapping": (None,),
}
_MODEL: Mapping[str, tuple[Any, ...]] = {
    "ffn_type": ("mptmlp", None),
    "block_overrides": (None,),
    "final_logit_softcapping": (None,),
    "norm_eps": (1e-5, None),
}


def read_mpt(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` mpt, as transformers (MptConfig) or llm-foundry writes it."""
    fields.refuse_others(config, "logit_scale")
    fields.refuse(config, _MODEL)
    attention = _section(config, "attn_config")
    fields.refuse(attention, {key: values for key, values in _ATTENTION.items() if key in attention})
    fields.refuse(_section(config, "ffn_config"), {"ffn_type": ("mptmlp", None), "ffn_act_fn": (None,)})
    norm = fields.text(config, "norm_type", _NORMS[0]).lower()
    if norm not in _NORMS:
        raise InputError(f"config.json: 'norm_type' is {fields.short(norm)}, not implemented; wanted {_NORMS[0]}")
    hidden, heads = fields.size(config, "d_model"), fields.size(config, "n_heads")
    head_dim = fields.head_size(hidden, heads, "n_heads")
    alibi = fields.flag(attention, "alibi", True)
    scale = fields.optional_number(attention, "softmax_scale")
    return Hyperparameters(
        layers=fields.size(config, "n_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=_kv_heads(attention, heads),
        head_dim=head_dim,
        intermediate=int(fields.number(config, "expansion_ratio", 4) * hidden),
        vocab=fields.size(config, "vocab_size"),
        context=fields.size(config, "max_seq_len", 2048),
        norm_eps=fields.number(config, "layer_norm_epsilon", 1e-5, high=1.0),
        activation="gelu",
        attention_scale=head_dim**-0.5 if scale is None else scale,
        alibi=alibi_slopes(heads, fields.number(attention, "alibi_bias_max", 8.0, high=64.0)) if alibi else (),
        clip_qkv=fields.number(attention, "clip_qkv") if attention.get("clip_qkv") else None,
        logit_scale=_logit_scale(config, hidden),
        tied=fields.flag(config, "tie_word_embeddings", True),
        flags=_flags(config, attention, alibi),
    )


def _section(config: fields.Config, key: str) -> fields.Config:
    found = config.get(key)
    if found is not None and not isinstance(found, Mapping):
        raise InputError(f"config.json: {key!r} is {fields.short(found)}, wanted a mapping")
    return found or {}


def _kv_heads(attention: fields.Config, heads: int) -> int:
    kind = fields.text(attention, "attn_type", "multihead_attention")
    if kind == "multihead_attention":
        return heads
    if kind == "multiquery_attention":
        return 1
    if kind != "grouped_query_attention":
        raise InputError(f"config.json: 'attn_type' is {fields.short(kind)}, which is not implemented")
    kv_heads = fields.size(attention, "kv_n_heads")
    if heads % kv_heads:
        raise InputError(f"config.json: 'n_heads' is {heads}, wanted a multiple of 'kv_n_heads', which is {kv_heads}")
    return kv_heads


def _logit_scale(config: fields.Config, hidden: int) -> float:
    given = config.get("logit_scale")
    if given == "inv_sqrt_d_model":
        return float(hidden**-0.5)
    return 1.0 if given is None else fields.number(config, "logit_scale")


def _flags(config: fields.Config, attention: fields.Config, alibi: bool) -> frozenset[str]:
    flags = set() if fields.flag(config, "no_bias", True) else {"bias"}
    if fields.flag(config, "learned_pos_emb", True) and not alibi:
        flags.add("learned_positions")
    if fields.flag(attention, "qk_ln", False):
        if attention.get("clip_qkv"):
            raise InputError("config.json: 'qk_ln' and 'clip_qkv' at once are not implemented")
        flags |= {"qk_ln", "qk_ln_bias"} if "bias" in flags else {"qk_ln"}
    return frozenset(flags)


def _gguf_metadata(hyper: Hyperparameters, config: fields.Config) -> Entries:
    entries = size_metadata(hyper, norm="layer")
    if hyper.clip_qkv is not None:
        entries["attention.clamp_kqv"] = ("float32", hyper.clip_qkv)
    largest = fields.number(_section(config, "attn_config"), "alibi_bias_max", 8.0) if hyper.alibi else 0.0
    entries["attention.max_alibi_bias"] = ("float32", largest)
    return entries


def _gguf_check(hyper: Hyperparameters, config: fields.Config) -> None:
    del config
    if hyper.attention_scale != hyper.head_dim**-0.5:
        raise InputError("config.json: 'softmax_scale' is set; llama.cpp always scales by the size of a head for MPT")
    if hyper.logit_scale != 1.0:
        raise InputError("config.json: 'logit_scale' is set; llama.cpp does not scale the logits of MPT")
    if "qk_ln" in hyper.flags:
        # it reshapes a view of the fused projection (ggml_reshape_2d in mpt.cpp), an assertion of ggml
        raise InputError("config.json: 'qk_ln' is true; llama.cpp ends the program when it norms q and k of MPT")


def _config_from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    del factors
    hidden, heads = whole(metadata, "mpt.embedding_length"), whole(metadata, "mpt.attention.head_count")
    kv_heads = whole(metadata, "mpt.attention.head_count_kv", heads)
    largest, clamp = (metadata.get(f"mpt.attention.{key}") or 0.0 for key in ("max_alibi_bias", "clamp_kqv"))
    attention: dict[str, Any] = {
        "attn_type": "multihead_attention" if kv_heads == heads else "grouped_query_attention",
        "alibi": largest > 0,
        "alibi_bias_max": fields.plain_float(largest) if largest > 0 else 8,
        "clip_qkv": fields.plain_float(clamp) if clamp > 0 else None,
        "qk_ln": "blk.0.attn_q_norm.weight" in names,
    }
    if kv_heads != heads:
        attention["kv_n_heads"] = kv_heads
    return {
        **general_config(metadata, names, "MPTForCausalLM", "mpt"),
        "d_model": hidden,
        "n_heads": heads,
        "n_layers": whole(metadata, "mpt.block_count"),
        "expansion_ratio": _ratio(whole(metadata, "mpt.feed_forward_length"), hidden),
        "max_seq_len": whole(metadata, "mpt.context_length"),
        "layer_norm_epsilon": real(metadata, "mpt.attention.layer_norm_epsilon"),
        "learned_pos_emb": "position_embd.weight" in names,
        "no_bias": "blk.0.attn_qkv.bias" not in names,
        "attn_config": attention,
    }


def _ratio(intermediate: int, hidden: int) -> float:
    return intermediate // hidden if intermediate % hidden == 0 else intermediate / hidden


MPT = ArchSpec(
    family="mpt",
    classes=("MPTForCausalLM", "MptForCausalLM", "MPTModel", "MptModel"),
    model_types=("mpt",),
    gguf="mpt",
    prefix="transformer.",
    norm="layer",
    gguf_rope="",
    tensors=_TABLE,
    read_config=read_mpt,
    gguf_metadata=_gguf_metadata,
    gguf_tensors=lambda _hyper: {},
    config_from_gguf=_config_from_gguf,
    gguf_check=_gguf_check,
)
