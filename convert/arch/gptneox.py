"""GPT-NeoX and Pythia.

Sources: transformers' modeling_gpt_neox.py (rows of the fused projection go head by head); llama.cpp's
src/models/gptneox.cpp, which always has attention biases and a head of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpress.convert.arch import fields
from quantpress.convert.arch.gguf_fields import general_config, real, size_metadata, turned_share, whole
from quantpress.convert.arch.gguf_rotary import Entries, check_rope, rope_config, rope_notes
from quantpress.convert.arch.rotary import read_rope, rope_settings
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Layout, Role, TensorSpec
from quantpress.quant.errors import InputError

_LAYER = "gpt_neox.layers.{layer}."
_BLOCK = "blk.{layer}."
_EMBEDDING = "gpt_neox.embed_in.weight"


def _norm(hf: str, gguf: str) -> tuple[TensorSpec, TensorSpec]:
    return (
        TensorSpec(f"{hf}.weight", f"{gguf}.weight", ("hidden",), Role.NORM),
        TensorSpec(f"{hf}.bias", f"{gguf}.bias", ("hidden",), Role.NORM),
    )


def _linear(
    hf: str, gguf: str, shape: tuple[str, str], layout: Layout = Layout.PLAIN, flag: str = ""
) -> tuple[TensorSpec, TensorSpec]:
    name, slot = f"{_LAYER}{hf}", f"{_BLOCK}{gguf}"
    return (
        TensorSpec(f"{name}.weight", f"{slot}.weight", shape, Role.LINEAR, layout=layout),
        TensorSpec(f"{name}.bias", f"{slot}.bias", shape[:1], Role.BIAS, layout=layout, flag=flag),
    )


_TABLE = (
    TensorSpec(_EMBEDDING, "token_embd.weight", ("vocab", "hidden"), Role.EMBEDDING),
    *_norm("gpt_neox.final_layer_norm", "output_norm"),
    TensorSpec("embed_out.weight", "output.weight", ("vocab", "hidden"), Role.HEAD, tied_to=_EMBEDDING),
    *_norm(f"{_LAYER}input_layernorm", f"{_BLOCK}attn_norm"),
    *_linear("attention.query_key_value", "attn_qkv", ("qkv", "hidden"), Layout.HEADS_QKV, "attention_bias"),
    *_linear("attention.dense", "attn_output", ("hidden", "q"), flag="attention_bias"),
    *_norm(f"{_LAYER}post_attention_layernorm", f"{_BLOCK}ffn_norm"),
    *_linear("mlp.dense_h_to_4h", "ffn_up", ("ffn", "hidden")),
    *_linear("mlp.dense_4h_to_h", "ffn_down", ("hidden", "ffn")),
)


def read_gptneox(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` gpt_neox (transformers: GPTNeoXConfig); a quarter of each head turns."""
    fields.refuse(config, fields.NEUTRAL)
    hidden, heads = fields.size(config, "hidden_size"), fields.size(config, "num_attention_heads")
    head_dim = fields.head_size(hidden, heads)
    context = fields.size(config, "max_position_embeddings", 2048)
    theta = fields.number(config, "rotary_emb_base", 10000.0, low=1.0)
    share = fields.number(config, "rotary_pct", 0.25, high=1.0)
    # other families' names of the same settings: transformers reads only its own
    fields.refuse(config, {"rope_theta": (None, theta), "partial_rotary_factor": (None, share)})
    return Hyperparameters(
        layers=fields.size(config, "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        intermediate=fields.size(config, "intermediate_size"),
        vocab=fields.size(config, "vocab_size"),
        context=context,
        norm_eps=fields.number(config, "layer_norm_eps", 1e-5, high=1.0),
        activation=fields.activation(config, "hidden_act", "gelu"),
        attention_scale=head_dim**-0.5,
        rope=read_rope(
            rope_settings(config),
            config,
            head_dim=head_dim,
            context=context,
            theta=theta,
            partial=share,
        ),
        parallel_residual=fields.flag(config, "use_parallel_residual", True),
        tied=fields.flag(config, "tie_word_embeddings", False),
        flags=frozenset({"attention_bias"} if fields.flag(config, "attention_bias", True) else ()),
    )


def _gguf_metadata(hyper: Hyperparameters, config: fields.Config) -> Entries:
    del config
    return {
        **size_metadata(hyper, norm="layer"),
        "use_parallel_residual": ("bool", hyper.parallel_residual),
    }


def _gguf_tensors(hyper: Hyperparameters) -> dict[str, tuple[float, ...]]:
    """Zeros where the model has no attention biases, since llama.cpp loads none without them."""
    if "attention_bias" in hyper.flags:
        return {}
    sizes = {"attn_qkv": hyper.dims["qkv"], "attn_output": hyper.hidden}
    return {
        f"blk.{layer}.{slot}.bias": (0.0,) * width for layer in range(hyper.layers) for slot, width in sizes.items()
    }


def _gguf_check(hyper: Hyperparameters, config: fields.Config) -> None:
    del config
    assert hyper.rope is not None  # every config of this family has one
    check_rope(hyper.rope, "GPT-NeoX")
    if hyper.activation not in ("gelu", "gelu_tanh"):
        raise InputError(f"config.json: 'hidden_act' is {hyper.activation!r}; llama.cpp computes gelu for GPT-NeoX")


def _gguf_notes(hyper: Hyperparameters, config: fields.Config) -> tuple[str, ...]:
    del config
    return rope_notes(hyper.rope, hyper.context)


def _config_from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    hidden, heads = whole(metadata, "gptneox.embedding_length"), whole(metadata, "gptneox.attention.head_count")
    ropes = rope_config(metadata, "gptneox", factors)
    turned = whole(metadata, "gptneox.rope.dimension_count", hidden // heads)
    return {
        **general_config(metadata, names, "GPTNeoXForCausalLM", "gpt_neox"),
        "hidden_size": hidden,
        "intermediate_size": whole(metadata, "gptneox.feed_forward_length"),
        "num_hidden_layers": whole(metadata, "gptneox.block_count"),
        "num_attention_heads": heads,
        "max_position_embeddings": whole(metadata, "gptneox.context_length"),
        "layer_norm_eps": real(metadata, "gptneox.attention.layer_norm_epsilon"),
        "hidden_act": "gelu",
        "rotary_pct": turned_share(turned, hidden // heads),
        "rotary_emb_base": ropes["rope_theta"],
        "rope_scaling": ropes["rope_scaling"],
        "use_parallel_residual": bool(metadata.get("gptneox.use_parallel_residual", True)),
        "attention_bias": "blk.0.attn_qkv.bias" in names,
    }


GPTNEOX = ArchSpec(
    family="gptneox",
    classes=("GPTNeoXForCausalLM", "GPTNeoXModel"),
    model_types=("gpt_neox",),
    gguf="gptneox",
    prefix="gpt_neox.",
    norm="layer",
    gguf_rope="neox",
    tensors=_TABLE,
    ignored=(
        "gpt_neox.layers.{layer}.attention.bias",
        "gpt_neox.layers.{layer}.attention.masked_bias",
        "gpt_neox.layers.{layer}.attention.rotary_emb.inv_freq",
    ),
    read_config=read_gptneox,
    gguf_metadata=_gguf_metadata,
    gguf_tensors=_gguf_tensors,
    config_from_gguf=_config_from_gguf,
    gguf_check=_gguf_check,
    gguf_notes=_gguf_notes,
    gguf_head="required",
)
