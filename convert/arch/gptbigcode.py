"""GPTBigCode: StarCoder, StarCoderBase, SantaCoder, StarChat.

Sources: transformers' modeling_gpt_bigcode.py (GPT-2 with linear layers instead of Conv1D and one head of keys and
values for all); llama.cpp's src/models/starcoder.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpress.convert.arch import fields
from quantpress.convert.arch.biased_rows import linear_rows, norm_rows
from quantpress.convert.arch.gguf_fields import general_config, real, size_metadata, whole
from quantpress.convert.arch.gguf_rotary import Entries
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Layout, Role, TensorSpec
from quantpress.quant.errors import InputError

_LAYER = "transformer.h.{layer}."
_BLOCK = "blk.{layer}."
_EMBEDDING = "transformer.wte.weight"

_TABLE = (
    TensorSpec(_EMBEDDING, "token_embd.weight", ("vocab", "hidden"), Role.EMBEDDING),
    TensorSpec("transformer.wpe.weight", "position_embd.weight", ("context", "hidden"), Role.POSITION),
    *norm_rows("transformer.ln_f", "output_norm"),
    TensorSpec("lm_head.weight", "output.weight", ("vocab", "hidden"), Role.HEAD, tied_to=_EMBEDDING),
    *norm_rows(f"{_LAYER}ln_1", f"{_BLOCK}attn_norm"),
    # with one key head all of q is before it; with as many as query heads, rows go head by head: one layout
    *linear_rows(f"{_LAYER}attn.c_attn", f"{_BLOCK}attn_qkv", ("qkv", "hidden"), layout=Layout.GROUPED_QKV),
    *linear_rows(f"{_LAYER}attn.c_proj", f"{_BLOCK}attn_output", ("hidden", "q")),
    *norm_rows(f"{_LAYER}ln_2", f"{_BLOCK}ffn_norm"),
    *linear_rows(f"{_LAYER}mlp.c_fc", f"{_BLOCK}ffn_up", ("ffn", "hidden")),
    *linear_rows(f"{_LAYER}mlp.c_proj", f"{_BLOCK}ffn_down", ("hidden", "ffn")),
)


def read_gptbigcode(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` gpt_bigcode (transformers: GPTBigCodeConfig)."""
    fields.refuse_others(config)
    hidden, heads = fields.size(config, "n_embd"), fields.size(config, "n_head")
    head_dim = fields.head_size(hidden, heads, "n_head")
    return Hyperparameters(
        layers=fields.size(config, "n_layer"),
        hidden=hidden,
        heads=heads,
        kv_heads=1 if fields.flag(config, "multi_query", True) else heads,
        head_dim=head_dim,
        intermediate=fields.size(config, "n_inner", 4 * hidden),
        vocab=fields.size(config, "vocab_size"),
        context=fields.size(config, "n_positions", 1024),
        norm_eps=fields.number(config, "layer_norm_epsilon", 1e-5, high=1.0),
        activation=fields.activation(config, "activation_function", "gelu_pytorch_tanh"),
        attention_scale=head_dim**-0.5 if fields.flag(config, "scale_attn_weights", True) else 1.0,
        tied=fields.flag(config, "tie_word_embeddings", True),
    )


def _gguf_metadata(hyper: Hyperparameters, config: fields.Config) -> Entries:
    del config
    return size_metadata(hyper, norm="layer")


def _gguf_check(hyper: Hyperparameters, config: fields.Config) -> None:
    del config
    if hyper.activation not in ("gelu", "gelu_tanh"):
        raise InputError(
            f"config.json: 'activation_function' is {hyper.activation!r}; llama.cpp computes gelu for StarCoder"
        )
    if hyper.attention_scale != hyper.head_dim**-0.5:
        raise InputError("config.json: 'scale_attn_weights' is false; llama.cpp always scales attention")


def _config_from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    del factors
    heads = whole(metadata, "starcoder.attention.head_count")
    kv_heads = whole(metadata, "starcoder.attention.head_count_kv", heads)
    if kv_heads not in (1, heads):
        raise InputError(f"GGUF: 'starcoder.attention.head_count_kv' is {kv_heads}, wanted 1 or {heads}")
    return {
        **general_config(metadata, names, "GPTBigCodeForCausalLM", "gpt_bigcode"),
        "n_embd": whole(metadata, "starcoder.embedding_length"),
        "n_inner": whole(metadata, "starcoder.feed_forward_length"),
        "n_layer": whole(metadata, "starcoder.block_count"),
        "n_head": heads,
        "multi_query": kv_heads == 1,
        "n_positions": whole(metadata, "starcoder.context_length"),
        "layer_norm_epsilon": real(metadata, "starcoder.attention.layer_norm_epsilon"),
        "activation_function": "gelu_pytorch_tanh",
    }


GPTBIGCODE = ArchSpec(
    family="gptbigcode",
    classes=("GPTBigCodeForCausalLM", "GPTBigCodeModel"),
    model_types=("gpt_bigcode",),
    gguf="starcoder",
    prefix="transformer.",
    norm="layer",
    gguf_rope="",
    tensors=_TABLE,
    ignored=("transformer.h.{layer}.attn.bias", "transformer.h.{layer}.attn.masked_bias"),
    read_config=read_gptbigcode,
    gguf_metadata=_gguf_metadata,
    gguf_tensors=lambda _hyper: {},
    config_from_gguf=_config_from_gguf,
    gguf_check=_gguf_check,
)
