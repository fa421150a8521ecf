"""Llama 1, 2 and 3, Mistral, and the many models of their shape (SmolLM2, TinyLlama, stories260K).

Sources: transformers' modeling_llama.py and modeling_mistral.py; llama.cpp's src/models/llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpress.convert.arch import fields
from quantpress.convert.arch.decoder_rows import gated_mlp, separate_attention, trunk
from quantpress.convert.arch.gguf_fields import (
    capped_context,
    capped_note,
    decoder_sizes,
    general_config,
    size_metadata,
)
from quantpress.convert.arch.gguf_rotary import SCALABLE, Entries, check_rope, rope_config, rope_notes, rope_tensors
from quantpress.convert.arch.rotary import whole_rope
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters
from quantpress.quant.errors import InputError

_TABLE = (
    *trunk("model."),
    *separate_attention("model.layers.{layer}.", bias="attention_bias", output_bias="attention_bias", rotary=True),
    *gated_mlp("model.layers.{layer}.", bias="mlp_bias"),
)
_IGNORED = ("model.layers.{layer}.self_attn.rotary_emb.inv_freq",)


def read_sizes(config: fields.Config) -> dict[str, Any]:
    """Reads what Llama, Mistral, Qwen and Gemma call alike: sizes, heads, norm epsilon, the tied head.

    Returns:
        Keyword arguments of `Hyperparameters`; `attention_scale` is that of plain attention.
    """
    hidden, heads = fields.size(config, "hidden_size"), fields.size(config, "num_attention_heads")
    kv_heads = fields.size(config, "num_key_value_heads", heads)
    fields.grouped_heads(heads, kv_heads)
    given = config.get("head_dim")
    head_dim = fields.head_size(hidden, heads) if given is None else fields.size(config, "head_dim")
    return {
        "layers": fields.size(config, "num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate": fields.size(config, "intermediate_size"),
        "vocab": fields.size(config, "vocab_size"),
        "norm_eps": fields.number(config, "rms_norm_eps", 1e-6, high=1.0),
        "attention_scale": head_dim**-0.5,
    }


def flags(config: fields.Config, *names: str) -> frozenset[str]:
    """Gives those of these keys that are true."""
    return frozenset(name for name in names if fields.flag(config, name, False))


def _read(config: fields.Config, context_default: int) -> dict[str, Any]:
    fields.refuse(config, fields.NEUTRAL)
    sizes = read_sizes(config)
    context = fields.size(config, "max_position_embeddings", context_default)
    if any(fields.layer_kinds(config, sizes["layers"]) or ()):
        raise InputError("config.json: 'layer_types' mixes sliding layers in, which is not implemented for this family")
    return {
        **sizes,
        "context": context,
        "activation": fields.activation(config, "hidden_act", "silu"),
        "rope": whole_rope(config, head_dim=sizes["head_dim"], context=context),
        "tied": fields.flag(config, "tie_word_embeddings", False),
    }


def read_llama(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` llama (transformers: LlamaConfig)."""
    fields.refuse(config, {"sliding_window": (None,), "use_sliding_window": (False, None)})
    return Hyperparameters(**_read(config, 2048), flags=flags(config, "attention_bias", "mlp_bias"))


def read_mistral(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` mistral; every layer slides unless `sliding_window` is null."""
    fields.refuse(config, {"attention_bias": (False, None), "mlp_bias": (False, None)})
    read = _read({"num_key_value_heads": 8, **config}, 4096 * 32)
    window = config.get("sliding_window", 4096)  # null means none, absent means the default
    if window is not None:
        window = fields.size({"sliding_window": window}, "sliding_window")
        read.update(sliding_window=window, sliding_layers=(True,) * read["layers"])
    return Hyperparameters(**read)


def _gguf_metadata(hyper: Hyperparameters, config: fields.Config) -> Entries:
    del config
    return size_metadata(hyper, norm="rms", context=capped_context(hyper))


def _gguf_check(hyper: Hyperparameters, config: fields.Config) -> None:
    del config
    assert hyper.rope is not None  # every config of this family has one
    check_rope(hyper.rope, "Llama", (*SCALABLE, "llama3", "longrope"))
    require_activation(hyper, "silu", "Llama")


def require_activation(hyper: Hyperparameters, wanted: str, family: str) -> None:
    """Refuses an activation that llama.cpp's graph does not have.

    Raises:
        InputError: naming the activation.
    """
    if hyper.activation != wanted:
        raise InputError(
            f"config.json: the activation is {hyper.activation!r}; llama.cpp computes {wanted!r} for {family}, "
            "so a GGUF file would be another model"
        )


def _gguf_notes(hyper: Hyperparameters, config: fields.Config) -> tuple[str, ...]:
    del config
    return (*capped_note(hyper, "the llama architecture"), *rope_notes(hyper.rope, hyper.context))


def _config_from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    if metadata.get("llama.expert_count"):
        raise InputError(f"GGUF: 'llama.expert_count' is {metadata['llama.expert_count']}; experts are not implemented")
    return {
        **general_config(metadata, names, "LlamaForCausalLM", "llama"),
        **decoder_sizes(metadata, "llama"),
        **rope_config(metadata, "llama", factors),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_output.bias" in names,
        "mlp_bias": "blk.0.ffn_up.bias" in names,
    }


LLAMA = ArchSpec(
    family="llama",
    classes=("LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel"),
    model_types=("llama",),
    gguf="llama",
    prefix="model.",
    norm="rms",
    gguf_rope="norm",
    tensors=_TABLE,
    ignored=_IGNORED,
    read_config=read_llama,
    gguf_metadata=_gguf_metadata,
    gguf_tensors=rope_tensors,
    config_from_gguf=_config_from_gguf,
    gguf_check=_gguf_check,
    gguf_notes=_gguf_notes,
)

MISTRAL = ArchSpec(
    family="mistral",
    classes=("MistralForCausalLM", "MistralModel"),
    model_types=("mistral",),
    gguf="llama",
    prefix="model.",
    norm="rms",
    gguf_rope="norm",
    tensors=_TABLE,
    ignored=_IGNORED,
    read_config=read_mistral,
    gguf_metadata=_gguf_metadata,
    gguf_tensors=rope_tensors,
    config_from_gguf=_config_from_gguf,
    gguf_check=_gguf_check,
    gguf_notes=_gguf_notes,
)
