"""gpt-oss: experts with biases and a clamped gate, heads with sinks, a window in every second layer.

Sources: transformers' modeling_gpt_oss.py; llama.cpp's src/models/openai-moe.cpp and conversion/gpt_oss.py. Experts lie
in stacks, gate and up alternate. Published checkpoints hold the experts in MXFP4, which is opened as the numbers it
stands for: they fit bfloat16 exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpress.convert.arch import fields
from quantpress.convert.arch.decoder_rows import separate_attention, trunk
from quantpress.convert.arch.gguf_fields import decoder_sizes, general_config, size_metadata, whole
from quantpress.convert.arch.gguf_rotary import Entries, check_rope, rope_config, rope_notes
from quantpress.convert.arch.llama import read_sizes
from quantpress.convert.arch.rotary import whole_rope
from quantpress.convert.arch.spec import ArchSpec, Experts, Hyperparameters, Layout, Role, TensorSpec
from quantpress.quant.errors import InputError

_LAYER, _BLOCK = "model.layers.{layer}.", "blk.{layer}."
_ALPHA = 1.702  # of the gate's sigmoid: llama.cpp knows no other
_RAMP = (
    "llama.cpp rounds the bounds of yarn's ramp to whole numbers, this model does not: positions turn slightly "
    "otherwise, the parity run says how much it matters"
)


def _experts(
    name: str, part: str, slot: str, shape: tuple[str, ...], biases: tuple[str, ...]
) -> tuple[TensorSpec, ...]:
    hf = f"{_LAYER}mlp.experts.{name}"
    return (
        TensorSpec(hf, f"{_BLOCK}{slot}.weight", shape, Role.LINEAR, Layout.STACKED_TRANSPOSED, part=part),
        TensorSpec(f"{hf}_bias", f"{_BLOCK}{slot}.bias", biases, Role.BIAS, Layout.STACKED, part=part),
    )


_BOTH, _BIASES = ("experts", "hidden", "expert_ffn2"), ("experts", "expert_ffn2")
_TABLE = (
    *trunk("model."),
    *separate_attention(_LAYER, bias="attention_bias", output_bias="attention_bias"),
    TensorSpec(f"{_LAYER}self_attn.sinks", f"{_BLOCK}attn_sinks.weight", ("heads",), Role.NORM),
    TensorSpec(f"{_LAYER}post_attention_layernorm.weight", f"{_BLOCK}post_attention_norm.weight", ("hidden",),
               Role.NORM, place="ffn_norm.weight"),
    TensorSpec(f"{_LAYER}mlp.router.weight", f"{_BLOCK}ffn_gate_inp.weight", ("experts", "hidden"), Role.ROUTER),
    TensorSpec(f"{_LAYER}mlp.router.bias", f"{_BLOCK}ffn_gate_inp.bias", ("experts",), Role.BIAS),
    *_experts("gate_up_proj", "gate_even", "ffn_gate_exps", _BOTH, _BIASES),
    *_experts("gate_up_proj", "up_odd", "ffn_up_exps", _BOTH, _BIASES),
    *_experts("down_proj", "", "ffn_down_exps", ("experts", "expert_ffn", "hidden"), ("experts", "hidden")),
)  # fmt: skip


def read_gpt_oss(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` gpt_oss."""
    fields.refuse_others(config, "num_experts", "num_local_experts")
    fields.refuse(config, {"hidden_act": ("silu", None), "swiglu_alpha": (_ALPHA, None)})
    sizes = read_sizes({"rms_norm_eps": 1e-5, "head_dim": 64, **config})
    layers, context = sizes["layers"], fields.size(config, "max_position_embeddings", 131072)
    window = None if config.get("sliding_window", 128) is None else fields.size(config, "sliding_window", 128)
    slides = fields.layer_kinds(config, layers) or tuple(layer % 2 == 0 for layer in range(layers))
    used = config.get("num_experts_per_tok", config.get("experts_per_token"))
    return Hyperparameters(
        **{**sizes, "activation": "gelu_quick"},
        context=context,
        rope=whole_rope({"rope_theta": 150000.0, **config}, head_dim=sizes["head_dim"], context=context),
        sliding_window=window if any(slides) else None,
        sliding_layers=slides if window else (),
        tied=fields.flag(config, "tie_word_embeddings", False),
        flags=frozenset({"attention_bias"} if fields.flag(config, "attention_bias", True) else ()),
        experts=Experts(
            count=fields.size(config, "num_local_experts", 128),
            used=fields.size({"num_experts_per_tok": used}, "num_experts_per_tok", 4),
            intermediate=sizes["intermediate"],
            layers=(True,) * layers,
            gating="softmax_chosen",
            limit=fields.number(config, "swiglu_limit", 7.0),
        ),
    )


def _gguf_metadata(hyper: Hyperparameters, config: fields.Config) -> Entries:
    del config
    experts = hyper.experts
    assert experts is not None, "every config of this family has them"
    return {
        **size_metadata(hyper, norm="rms"),
        "attention.sliding_window": ("uint32", hyper.sliding_window or hyper.context),
        "expert_count": ("uint32", experts.count),
        "expert_used_count": ("uint32", experts.used),
        "expert_feed_forward_length": ("uint32", experts.intermediate),
    }


def _gguf_check(hyper: Hyperparameters, config: fields.Config) -> None:
    del config
    if hyper.rope is None or hyper.experts is None:
        raise TypeError("hyperparameters of another family")
    known = {key: value for key, value in hyper.rope.parameters.items() if key != "truncate"}
    check_rope(hyper.rope.with_parameters(known), "gpt-oss", ("default", "yarn"))
    if hyper.sliding_layers and hyper.sliding_layers != tuple(layer % 2 == 0 for layer in range(hyper.layers)):
        raise InputError(
            "config.json: 'layer_types' is not every second layer from the first; llama.cpp knows no other"
        )
    if hyper.experts.limit != 7.0:
        raise InputError(f"config.json: 'swiglu_limit' is {hyper.experts.limit:g}; llama.cpp clamps to 7")
    if "attention_bias" not in hyper.flags:
        raise InputError("config.json: 'attention_bias' is false; llama.cpp wants the biases of gpt-oss")


def _gguf_notes(hyper: Hyperparameters, config: fields.Config) -> tuple[str, ...]:
    del config
    notes = rope_notes(hyper.rope, hyper.context)
    if hyper.rope is not None and hyper.rope.kind == "yarn" and not hyper.rope.parameters.get("truncate", True):
        return (*notes, _RAMP)
    return notes


def _config_from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    config = {
        **general_config(metadata, names, "GptOssForCausalLM", "gpt_oss"),
        **decoder_sizes(metadata, "gpt-oss"),
        **rope_config(metadata, "gpt-oss", factors),
        "hidden_act": "silu",
        "attention_bias": True,
        "sliding_window": whole(metadata, "gpt-oss.attention.sliding_window"),
        "num_local_experts": whole(metadata, "gpt-oss.expert_count"),
        "num_experts_per_tok": whole(metadata, "gpt-oss.expert_used_count"),
        "swiglu_limit": 7.0,
    }
    return {**config, "intermediate_size": whole(metadata, "gpt-oss.expert_feed_forward_length")}


GPT_OSS = ArchSpec(
    family="gpt_oss",
    classes=("GptOssForCausalLM", "GptOssModel"),
    model_types=("gpt_oss",),
    gguf="gpt-oss",
    prefix="model.",
    norm="rms",
    gguf_rope="neox",
    tensors=_TABLE,
    read_config=read_gpt_oss,
    gguf_metadata=_gguf_metadata,
    gguf_tensors=lambda _hyper: {},
    config_from_gguf=_config_from_gguf,
    gguf_check=_gguf_check,
    gguf_notes=_gguf_notes,
    gguf_head="required",
)
