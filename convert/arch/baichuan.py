"""Baichuan 7B and 13B, Baichuan 2 7B and 13B.

Sources: modeling_baichuan.py of these checkpoints (never run): the 7B models have rotary positions and the 13B models
ALiBi under the same class, Baichuan 2 divides each row of its head by its length. llama.cpp's src/models/baichuan.cpp
tells the two kinds apart by the number of layers, and has no such head: the file holds rows of length 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpress.convert.arch import fields
from quantpress.convert.arch.alibi import alibi_slopes
from quantpress.convert.arch.decoder_rows import gated_mlp
from quantpress.convert.arch.gguf_fields import decoder_sizes, general_config, size_metadata
from quantpress.convert.arch.gguf_limits import require_activation, require_plain_heads
from quantpress.convert.arch.gguf_rotary import Entries, rope_config
from quantpress.convert.arch.llama import read_sizes
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Layout, Role, Rope, TensorSpec
from quantpress.quant.errors import InputError

_LAYER = "model.layers.{layer}."
_BLOCK = "blk.{layer}."
_EMBEDDING = "model.embed_tokens.weight"
_VOCABULARY_2 = 125_696  # rows of Baichuan 2; no key of its config.json speaks of the head
_ROTARY_LAYERS, _ALIBI_LAYERS = 32, 40  # by which llama.cpp knows the 7B and the 13B models
# keys of this program alone, for what is opened from GGUF files
_NORM_HEAD, _APART = "norm_head", "qkv_apart"
_PARTS = (("q", "heads"), ("k", "kv_heads"), ("v", ""))


def _head(layout: Layout, flag: str) -> TensorSpec:
    shape = ("vocab", "hidden")
    return TensorSpec("lm_head.weight", "output.weight", shape, Role.HEAD, layout, flag=flag, tied_to=_EMBEDDING)


def _fused(part: str, turned: str) -> TensorSpec:
    name, gguf = f"{_LAYER}self_attn.W_pack.weight", f"{_BLOCK}attn_{part}.weight"
    return TensorSpec(name, gguf, ("qkv", "hidden"), Role.LINEAR, rotary=turned, flag="fused", part=part)


def _apart(part: str, turned: str) -> TensorSpec:
    name, gguf = f"{_LAYER}self_attn.{part}_proj.weight", f"{_BLOCK}attn_{part}.weight"
    return TensorSpec(name, gguf, ("q" if part == "q" else "kv", "hidden"), Role.LINEAR, rotary=turned, flag="apart")


_TABLE = (
    TensorSpec(_EMBEDDING, "token_embd.weight", ("vocab", "hidden"), Role.EMBEDDING),
    TensorSpec("model.norm.weight", "output_norm.weight", ("hidden",), Role.NORM),
    _head(Layout.PLAIN, "plain_head"),
    _head(Layout.UNIT_ROWS, "unit_head"),
    TensorSpec(f"{_LAYER}input_layernorm.weight", f"{_BLOCK}attn_norm.weight", ("hidden",), Role.NORM),
    *(_fused(part, turned) for part, turned in _PARTS),
    *(_apart(part, turned) for part, turned in _PARTS),
    TensorSpec(f"{_LAYER}self_attn.o_proj.weight", f"{_BLOCK}attn_output.weight", ("hidden", "q"), Role.LINEAR),
    *gated_mlp(_LAYER),
)


def read_baichuan(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` baichuan (configuration_baichuan.py beside the weights).

    The 7B models' class has `max_position_embeddings`, the 13B models' class only `model_max_length`.
    """
    fields.refuse(config, {**fields.NEUTRAL, "rope_scaling": (None,), "num_key_value_heads": (None,)})
    sizes = read_sizes(config)
    rotary = config.get("max_position_embeddings") is not None
    context = fields.size(config, "max_position_embeddings" if rotary else "model_max_length")
    norm_head = "z_loss_weight" in config or sizes["vocab"] == _VOCABULARY_2
    return Hyperparameters(
        **sizes,
        context=context,
        activation=fields.activation(config, "hidden_act", "silu"),
        rope=Rope(theta=fields.number(config, "rope_theta", 10000.0, low=1.0), dim=sizes["head_dim"])
        if rotary
        else None,
        alibi=() if rotary else alibi_slopes(sizes["heads"]),
        tied=fields.flag(config, "tie_word_embeddings", False),
        flags=frozenset(
            {
                "unit_head" if fields.flag(config, _NORM_HEAD, norm_head) else "plain_head",
                "apart" if fields.flag(config, _APART, False) else "fused",
            }
        ),
    )


def _gguf_metadata(hyper: Hyperparameters, config: fields.Config) -> Entries:
    del config
    return size_metadata(hyper, norm="rms")


def _gguf_check(hyper: Hyperparameters, config: fields.Config) -> None:
    del config
    require_activation(hyper, "silu", "Baichuan")
    wanted, positions = (_ALIBI_LAYERS, "ALiBi") if hyper.rope is None else (_ROTARY_LAYERS, "rotary positions")
    if hyper.layers != wanted:
        raise InputError(
            f"config.json: 'num_hidden_layers' is {hyper.layers}; llama.cpp computes {positions} for Baichuan only "
            f"with {wanted} layers"
        )
    require_plain_heads(hyper, "Baichuan")


def _config_from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    """Gives Llama's config for the 7B models, which are Llama once q, k and v are apart."""
    sizes = decoder_sizes(metadata, "baichuan")
    if sizes["num_hidden_layers"] == _ROTARY_LAYERS:
        return {
            **general_config(metadata, names, "LlamaForCausalLM", "llama"),
            **sizes,
            **rope_config(metadata, "baichuan", factors),
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
        }
    return {
        **general_config(metadata, names, "BaichuanForCausalLM", "baichuan"),
        **sizes,
        "num_key_value_heads": None,
        "max_position_embeddings": None,
        "model_max_length": sizes["max_position_embeddings"],
        "hidden_act": "silu",
        _NORM_HEAD: False,  # the rows of the file are what the graph multiplies with
        _APART: True,
    }


BAICHUAN = ArchSpec(
    family="baichuan",
    classes=("BaichuanForCausalLM", "BaiChuanForCausalLM", "BaichuanModel"),
    model_types=("baichuan",),
    gguf="baichuan",
    prefix="model.",
    norm="rms",
    gguf_rope="norm",
    tensors=_TABLE,
    ignored=(f"{_LAYER}self_attn.rotary_emb.inv_freq", "model.future_mask", "model.alibi_mask"),
    read_config=read_baichuan,
    gguf_metadata=_gguf_metadata,
    gguf_tensors=lambda _hyper: {},
    config_from_gguf=_config_from_gguf,
    gguf_check=_gguf_check,
    gguf_head="required",
)
