"""The first Qwen (`QWenLMHeadModel`: Qwen-1.8B, 7B, 14B, 72B), in the layout of its own code, which is never run.

Sources: modeling_qwen.py of these checkpoints (the second of the MLP's matrices is the gate; beyond the training length
queries are scaled and frequencies change); llama.cpp's src/models/qwen.cpp, which has neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpress.convert.arch import fields
from quantpress.convert.arch.gguf_fields import decoder_sizes, general_config, size_metadata, turned_share, whole
from quantpress.convert.arch.gguf_rotary import Entries, check_rope, rope_config
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Role, Rope, TensorSpec
from quantpress.quant.errors import InputError

_LAYER = "transformer.h.{layer}."
_BLOCK = "blk.{layer}."
_EMBEDDING = "transformer.wte.weight"


def _linear(hf: str, gguf: str, shape: tuple[str, str], flag: str = "linear_bias") -> tuple[TensorSpec, TensorSpec]:
    name, slot = f"{_LAYER}{hf}", f"{_BLOCK}{gguf}"
    return (
        TensorSpec(f"{name}.weight", f"{slot}.weight", shape, Role.LINEAR),
        TensorSpec(f"{name}.bias", f"{slot}.bias", shape[:1], Role.BIAS, flag=flag),
    )


_TABLE = (
    TensorSpec(_EMBEDDING, "token_embd.weight", ("vocab", "hidden"), Role.EMBEDDING),
    TensorSpec("transformer.ln_f.weight", "output_norm.weight", ("hidden",), Role.NORM),
    TensorSpec("lm_head.weight", "output.weight", ("vocab", "hidden"), Role.HEAD, tied_to=_EMBEDDING),
    TensorSpec(f"{_LAYER}ln_1.weight", f"{_BLOCK}attn_norm.weight", ("hidden",), Role.NORM),
    *_linear("attn.c_attn", "attn_qkv", ("qkv", "hidden"), flag=""),
    *_linear("attn.c_proj", "attn_output", ("hidden", "q")),
    TensorSpec(f"{_LAYER}ln_2.weight", f"{_BLOCK}ffn_norm.weight", ("hidden",), Role.NORM),
    *_linear("mlp.w2", "ffn_gate", ("ffn", "hidden")),
    *_linear("mlp.w1", "ffn_up", ("ffn", "hidden")),
    *_linear("mlp.c_proj", "ffn_down", ("hidden", "ffn")),
)


def read_qwen1(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` qwen (configuration_qwen.py beside the weights).

    The context ends at `seq_length`, the training length, where the code begins to scale queries or frequencies.
    """
    fields.refuse(
        config, {**fields.NEUTRAL, "use_cache_quantization": (False, None), "scale_attn_weights": (True, None)}
    )
    hidden, heads = fields.size(config, "hidden_size"), fields.size(config, "num_attention_heads")
    head_dim = fields.size(config, "kv_channels", 128)
    inner = fields.size(config, "intermediate_size")
    if inner % 2:
        raise InputError(f"config.json: 'intermediate_size' is {inner}, wanted an even number: the MLP has half of it")
    context = fields.size(config, "max_position_embeddings", 8192)
    if _changes(config):
        context = min(context, fields.size(config, "seq_length"))
    turned = int(head_dim * fields.number(config, "rotary_pct", 1.0, high=1.0))
    if turned < 2 or turned % 2:
        raise InputError(
            f"config.json: 'rotary_pct' turns {turned} of {head_dim} values per head, wanted an even count"
        )
    return Hyperparameters(
        layers=fields.size(config, "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        intermediate=inner // 2,
        vocab=fields.size(config, "vocab_size"),
        context=context,
        norm_eps=fields.number(config, "layer_norm_epsilon", 1e-6, high=1.0),
        activation="silu",
        attention_scale=head_dim**-0.5,
        rope=Rope(theta=fields.number(config, "rotary_emb_base", 10000.0, low=1.0), dim=turned),
        tied=fields.flag(config, "tie_word_embeddings", False),
        flags=frozenset() if fields.flag(config, "no_bias", True) else frozenset({"linear_bias"}),
    )


def _changes(config: fields.Config) -> bool:
    """Whether anything is computed otherwise beyond the training length."""
    return any(fields.flag(config, key, True) for key in ("use_dynamic_ntk", "use_logn_attn"))


def _gguf_metadata(hyper: Hyperparameters, config: fields.Config) -> Entries:
    del config
    entries = size_metadata(hyper, norm="rms")
    entries["feed_forward_length"] = ("uint32", 2 * hyper.intermediate)  # llama.cpp halves it as the model's code does
    return entries


def _gguf_check(hyper: Hyperparameters, config: fields.Config) -> None:
    del config
    assert hyper.rope is not None  # every config of this family has one
    check_rope(hyper.rope, "Qwen")
    if "linear_bias" in hyper.flags:
        raise InputError("config.json: 'no_bias' is false; llama.cpp has biases for q, k and v only in Qwen")
    if hyper.heads * hyper.head_dim != hyper.hidden:
        raise InputError(
            f"config.json: 'kv_channels' is {hyper.head_dim}; llama.cpp wants {hyper.hidden // hyper.heads} for Qwen, "
            "the hidden size divided by the heads"
        )


def _gguf_notes(hyper: Hyperparameters, config: fields.Config) -> tuple[str, ...]:
    longest = fields.size(config, "max_position_embeddings", 8192)
    if hyper.context == longest:
        return ()
    note = (
        f"beyond {hyper.context} tokens the model's code scales queries and rotary frequencies, which is neither "
        f"implemented here nor in llama.cpp: context_length is {hyper.context} instead of {longest}"
    )
    return (note,)


def _config_from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    sizes = decoder_sizes(metadata, "qwen")
    turned = whole(metadata, "qwen.rope.dimension_count", sizes["head_dim"])
    return {
        **general_config(metadata, names, "QWenLMHeadModel", "qwen"),
        "hidden_size": sizes["hidden_size"],
        "intermediate_size": sizes["intermediate_size"],
        "num_hidden_layers": sizes["num_hidden_layers"],
        "num_attention_heads": sizes["num_attention_heads"],
        "kv_channels": sizes["head_dim"],
        "max_position_embeddings": sizes["max_position_embeddings"],
        "seq_length": sizes["max_position_embeddings"],
        "layer_norm_epsilon": sizes["rms_norm_eps"],
        "rotary_emb_base": rope_config(metadata, "qwen", factors)["rope_theta"],
        "rotary_pct": turned_share(turned, sizes["head_dim"]),
        "no_bias": True,
        "use_dynamic_ntk": False,
        "use_logn_attn": False,
    }


QWEN1 = ArchSpec(
    family="qwen",
    classes=("QWenLMHeadModel", "QWenModel"),
    model_types=("qwen",),
    gguf="qwen",
    prefix="transformer.",
    norm="rms",
    gguf_rope="neox",
    tensors=_TABLE,
    ignored=("transformer.rotary_emb.inv_freq", f"{_LAYER}attn.rotary_emb.inv_freq"),
    read_config=read_qwen1,
    gguf_metadata=_gguf_metadata,
    gguf_tensors=lambda _hyper: {},
    config_from_gguf=_config_from_gguf,
    gguf_check=_gguf_check,
    gguf_notes=_gguf_notes,
    gguf_head="required",
    foreign=("transformer.visual.",),
)
