"""InternLM2 and InternLM2.5, whose q, k and v lie group by group in one matrix; Llama in all else.

Sources: modeling_internlm2.py of these checkpoints (never run); llama.cpp's src/models/internlm2.cpp, which has no bias
after attention. A GGUF file has q, k and v apart and is opened as Llama.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpress.convert.arch import fields
from quantpress.convert.arch.gguf_fields import decoder_sizes, general_config, size_metadata
from quantpress.convert.arch.gguf_limits import require_activation, require_plain_heads
from quantpress.convert.arch.gguf_rotary import SCALABLE, Entries, check_rope, rope_config, rope_notes, rope_tensors
from quantpress.convert.arch.llama import read_sizes
from quantpress.convert.arch.rotary import whole_rope
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Layout, Role, TensorSpec
from quantpress.quant.errors import InputError

_LAYER = "model.layers.{layer}."
_BLOCK = "blk.{layer}."
_EMBEDDING = "model.tok_embeddings.weight"


def _fused() -> tuple[TensorSpec, ...]:
    """q, k and v of `wqkv`: for each key head its query heads, itself, and its values."""
    rows = []
    for part, turned in (("q", "heads"), ("k", "kv_heads"), ("v", "")):
        for kind, shape, role in (("weight", ("qkv", "hidden"), Role.LINEAR), ("bias", ("qkv",), Role.BIAS)):
            row = TensorSpec(
                f"{_LAYER}attention.wqkv.{kind}",
                f"{_BLOCK}attn_{part}.{kind}",
                shape,
                role,
                layout=Layout.GROUPED_QKV,
                rotary=turned,
                flag="attention_bias" if kind == "bias" else "",
                part=part,
            )
            rows.append(row)
    return tuple(rows)


def _linear(hf: str, gguf: str, shape: tuple[str, str]) -> TensorSpec:
    return TensorSpec(f"{_LAYER}{hf}.weight", f"{_BLOCK}{gguf}.weight", shape, Role.LINEAR)


_TABLE = (
    TensorSpec(_EMBEDDING, "token_embd.weight", ("vocab", "hidden"), Role.EMBEDDING),
    TensorSpec("model.norm.weight", "output_norm.weight", ("hidden",), Role.NORM),
    TensorSpec("output.weight", "output.weight", ("vocab", "hidden"), Role.HEAD, tied_to=_EMBEDDING),
    TensorSpec(f"{_LAYER}attention_norm.weight", f"{_BLOCK}attn_norm.weight", ("hidden",), Role.NORM),
    *_fused(),
    _linear("attention.wo", "attn_output", ("hidden", "q")),
    TensorSpec(
        f"{_LAYER}attention.wo.bias", f"{_BLOCK}attn_output.bias", ("hidden",), Role.BIAS, flag="attention_bias"
    ),
    TensorSpec(f"{_LAYER}ffn_norm.weight", f"{_BLOCK}ffn_norm.weight", ("hidden",), Role.NORM),
    _linear("feed_forward.w1", "ffn_gate", ("ffn", "hidden")),
    _linear("feed_forward.w3", "ffn_up", ("ffn", "hidden")),
    _linear("feed_forward.w2", "ffn_down", ("hidden", "ffn")),
)


def read_internlm2(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` internlm2 (configuration_internlm2.py beside the weights)."""
    fields.refuse(config, fields.NEUTRAL)
    sizes = read_sizes(config)
    context = fields.size(config, "max_position_embeddings", 2048)
    return Hyperparameters(
        **sizes,
        context=context,
        activation=fields.activation(config, "hidden_act", "silu"),
        rope=whole_rope(config, head_dim=sizes["head_dim"], context=context),
        tied=fields.flag(config, "tie_word_embeddings", False),
        # the class's own default is true
        flags=frozenset({"attention_bias"} if fields.flag(config, "bias", True) else ()),
    )


def _gguf_metadata(hyper: Hyperparameters, config: fields.Config) -> Entries:
    del config
    return size_metadata(hyper, norm="rms")


def _gguf_check(hyper: Hyperparameters, config: fields.Config) -> None:
    del config
    assert hyper.rope is not None  # every config of this family has one
    check_rope(hyper.rope, "InternLM2", SCALABLE)
    require_activation(hyper, "silu", "InternLM2")
    if "attention_bias" in hyper.flags:
        raise InputError("config.json: 'bias' is true; llama.cpp has no bias after attention for InternLM2")
    require_plain_heads(hyper, "InternLM2")


def _gguf_notes(hyper: Hyperparameters, config: fields.Config) -> tuple[str, ...]:
    del config
    return rope_notes(hyper.rope, hyper.context)


def _config_from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    return {
        **general_config(metadata, names, "LlamaForCausalLM", "llama"),
        **decoder_sizes(metadata, "internlm2"),
        **rope_config(metadata, "internlm2", factors),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }


INTERNLM2 = ArchSpec(
    family="internlm2",
    classes=("InternLM2ForCausalLM", "InternLM2Model"),
    model_types=("internlm2",),
    gguf="internlm2",
    prefix="model.",
    norm="rms",
    gguf_rope="norm",
    tensors=_TABLE,
    ignored=(f"{_LAYER}attention.rotary_emb.inv_freq",),
    read_config=read_internlm2,
    gguf_metadata=_gguf_metadata,
    gguf_tensors=rope_tensors,
    config_from_gguf=_config_from_gguf,
    gguf_check=_gguf_check,
    gguf_notes=_gguf_notes,
    gguf_head="required",
)
