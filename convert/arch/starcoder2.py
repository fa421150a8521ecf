"""StarCoder2.

Sources: transformers' modeling_starcoder2.py; llama.cpp's src/models/starcoder2.cpp, which has no sliding window and
wants biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpress.convert.arch import fields
from quantpress.convert.arch.biased_rows import linear_rows, norm_rows
from quantpress.convert.arch.gguf_fields import (
    capped_context,
    capped_note,
    general_config,
    real,
    size_metadata,
    whole,
)
from quantpress.convert.arch.gguf_rotary import Entries, check_rope, rope_config, rope_notes
from quantpress.convert.arch.rotary import whole_rope
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Role, TensorSpec
from quantpress.quant.errors import InputError

_LAYER = "model.layers.{layer}."
_ATTENTION = f"{_LAYER}self_attn."
_BLOCK = "blk.{layer}."
_EMBEDDING = "model.embed_tokens.weight"

_TABLE = (
    TensorSpec(_EMBEDDING, "token_embd.weight", ("vocab", "hidden"), Role.EMBEDDING),
    *norm_rows("model.norm", "output_norm"),
    TensorSpec("lm_head.weight", "output.weight", ("vocab", "hidden"), Role.HEAD, tied_to=_EMBEDDING),
    *norm_rows(f"{_LAYER}input_layernorm", f"{_BLOCK}attn_norm"),
    *linear_rows(f"{_ATTENTION}q_proj", f"{_BLOCK}attn_q", ("q", "hidden"), bias="use_bias"),
    *linear_rows(f"{_ATTENTION}k_proj", f"{_BLOCK}attn_k", ("kv", "hidden"), bias="use_bias"),
    *linear_rows(f"{_ATTENTION}v_proj", f"{_BLOCK}attn_v", ("kv", "hidden"), bias="use_bias"),
    *linear_rows(f"{_ATTENTION}o_proj", f"{_BLOCK}attn_output", ("hidden", "q"), bias="use_bias"),
    *norm_rows(f"{_LAYER}post_attention_layernorm", f"{_BLOCK}ffn_norm"),
    *linear_rows(f"{_LAYER}mlp.c_fc", f"{_BLOCK}ffn_up", ("ffn", "hidden"), bias="use_bias"),
    *linear_rows(f"{_LAYER}mlp.c_proj", f"{_BLOCK}ffn_down", ("hidden", "ffn"), bias="use_bias"),
)


def read_starcoder2(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` starcoder2; every layer slides where `sliding_window` is given."""
    fields.refuse_others(config)
    fields.refuse(config, {"norm_type": ("layer_norm", None), "mlp_type": ("default", None)})
    hidden, heads = fields.size(config, "hidden_size"), fields.size(config, "num_attention_heads")
    kv_heads = fields.size(config, "num_key_value_heads", 2)
    fields.grouped_heads(heads, kv_heads)
    head_dim = fields.head_size(hidden, heads) if config.get("head_dim") is None else fields.size(config, "head_dim")
    context, layers = fields.size(config, "max_position_embeddings", 4096), fields.size(config, "num_hidden_layers")
    if any(fields.layer_kinds(config, layers) or ()):
        raise InputError("config.json: 'layer_types' mixes sliding layers in, which is not implemented for this family")
    window = config.get("sliding_window")
    window = None if window is None else fields.size(config, "sliding_window")
    return Hyperparameters(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=fields.size(config, "intermediate_size"),
        vocab=fields.size(config, "vocab_size"),
        context=context,
        norm_eps=fields.number(config, "norm_epsilon", 1e-5, high=1.0),
        activation=fields.activation(config, "hidden_act", "gelu_pytorch_tanh"),
        attention_scale=head_dim**-0.5,
        rope=whole_rope(config, head_dim=head_dim, context=context),
        sliding_window=window,
        sliding_layers=() if window is None else (True,) * layers,
        tied=fields.flag(config, "tie_word_embeddings", True),
        flags=frozenset({"use_bias"} if fields.flag(config, "use_bias", True) else ()),
    )


def _gguf_metadata(hyper: Hyperparameters, config: fields.Config) -> Entries:
    del config
    return size_metadata(hyper, norm="layer", context=capped_context(hyper))


def _gguf_tensors(hyper: Hyperparameters) -> dict[str, tuple[float, ...]]:
    """Zeros where the model has no biases, since llama.cpp loads none without them."""
    if "use_bias" in hyper.flags:
        return {}
    sizes = {"attn_output": hyper.hidden, "ffn_up": hyper.intermediate, "ffn_down": hyper.hidden}
    return {
        f"blk.{layer}.{slot}.bias": (0.0,) * width for layer in range(hyper.layers) for slot, width in sizes.items()
    }


def _gguf_check(hyper: Hyperparameters, config: fields.Config) -> None:
    del config
    if hyper.head_dim * hyper.heads != hyper.hidden:
        raise InputError(f"config.json: 'head_dim' is {hyper.head_dim}; llama.cpp divides the hidden size by the heads")
    assert hyper.rope is not None  # every config of this family has one
    check_rope(hyper.rope, "StarCoder2")
    if hyper.activation not in ("gelu", "gelu_tanh"):
        raise InputError(f"config.json: 'hidden_act' is {hyper.activation!r}; llama.cpp computes gelu for StarCoder2")


def _gguf_notes(hyper: Hyperparameters, config: fields.Config) -> tuple[str, ...]:
    del config
    return (*capped_note(hyper, "StarCoder2"), *rope_notes(hyper.rope, hyper.context))


def _config_from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    heads = whole(metadata, "starcoder2.attention.head_count")
    return {
        **general_config(metadata, names, "Starcoder2ForCausalLM", "starcoder2"),
        **rope_config(metadata, "starcoder2", factors),
        "hidden_size": whole(metadata, "starcoder2.embedding_length"),
        "intermediate_size": whole(metadata, "starcoder2.feed_forward_length"),
        "num_hidden_layers": whole(metadata, "starcoder2.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": whole(metadata, "starcoder2.attention.head_count_kv", heads),
        "max_position_embeddings": whole(metadata, "starcoder2.context_length"),
        "norm_epsilon": real(metadata, "starcoder2.attention.layer_norm_epsilon"),
        "hidden_act": "gelu_pytorch_tanh",
        "sliding_window": None,
        "use_bias": "blk.0.attn_q.bias" in names,
    }


STARCODER2 = ArchSpec(
    family="starcoder2",
    classes=("Starcoder2ForCausalLM", "Starcoder2Model"),
    model_types=("starcoder2",),
    gguf="starcoder2",
    prefix="model.",
    norm="layer",
    gguf_rope="neox",
    tensors=_TABLE,
    read_config=read_starcoder2,
    gguf_metadata=_gguf_metadata,
    gguf_tensors=_gguf_tensors,
    config_from_gguf=_config_from_gguf,
    gguf_check=_gguf_check,
    gguf_notes=_gguf_notes,
)
