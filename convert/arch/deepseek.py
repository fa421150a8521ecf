"""DeepSeek-V2 (Lite too) and V3: attention over a latent, many small experts, some that every token goes to.

Sources: transformers' modeling_deepseek_v2.py and modeling_deepseek_v3.py; llama.cpp's src/models/deepseek2.cpp and
conversion/deepseek.py. GGUF has the projection to keys and values as two tensors of heads, that of keys transposed, so
that llama.cpp can keep the latent alone in its cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from quantpress.convert.arch import fields
from quantpress.convert.arch.decoder_rows import gated_mlp, trunk
from quantpress.convert.arch.gguf_fields import size_metadata
from quantpress.convert.arch.gguf_rotary import Entries, check_rope
from quantpress.convert.arch.rotary import read_rope, rope_settings
from quantpress.convert.arch.spec import ArchSpec, Experts, Hyperparameters, Latent, Role, Rope, TensorSpec
from quantpress.quant.errors import InputError

_LAYER, _BLOCK = "model.layers.{layer}.", "blk.{layer}."
_ATTENTION = f"{_LAYER}self_attn."
# without a rank of queries llama.cpp knows a model of this architecture only by its number of layers
_LITE_LAYERS = (26, 27)


def _linear(hf: str, gguf: str, shape: tuple[str, str], **more: Any) -> TensorSpec:
    return TensorSpec(f"{hf}.weight", f"{_BLOCK}{gguf}.weight", shape, Role.LINEAR, **more)


def _norm(hf: str, gguf: str, size: str, **more: Any) -> TensorSpec:
    return TensorSpec(f"{hf}.weight", f"{_BLOCK}{gguf}.weight", (size,), Role.NORM, **more)


def _mlp(hf: str, kind: str, width: str, **more: Any) -> tuple[TensorSpec, ...]:
    shapes = {"gate": (width, "hidden"), "up": (width, "hidden"), "down": ("hidden", width)}
    return tuple(_linear(f"{hf}.{part}_proj", f"ffn_{part}{kind}", shape, **more) for part, shape in shapes.items())


_TABLE = (
    *trunk("model."),
    _norm(f"{_LAYER}input_layernorm", "attn_norm", "hidden"),
    _linear(f"{_ATTENTION}q_proj", "attn_q", ("q", "hidden"), flag="whole_query"),
    _linear(f"{_ATTENTION}q_a_proj", "attn_q_a", ("query_rank", "hidden"), flag="low_query"),
    _norm(f"{_ATTENTION}q_a_layernorm", "attn_q_a_norm", "query_rank", flag="low_query"),
    _linear(f"{_ATTENTION}q_b_proj", "attn_q_b", ("q", "query_rank"), flag="low_query"),
    _linear(f"{_ATTENTION}kv_a_proj_with_mqa", "attn_kv_a_mqa", ("rank_turned", "hidden")),
    _norm(f"{_ATTENTION}kv_a_layernorm", "attn_kv_a_norm", "rank"),
    _linear(f"{_ATTENTION}kv_b_proj", "attn_k_b", ("plain_and_value", "rank"), part="plain", gguf_heads="columns"),
    _linear(f"{_ATTENTION}kv_b_proj", "attn_v_b", ("plain_and_value", "rank"), part="value", gguf_heads="rows"),
    _linear(f"{_ATTENTION}o_proj", "attn_output", ("hidden", "attended")),
    *(row if row.role is Role.NORM else row.only("dense") for row in gated_mlp(_LAYER)),
    TensorSpec(f"{_LAYER}mlp.gate.weight", f"{_BLOCK}ffn_gate_inp.weight", ("experts", "hidden"), Role.ROUTER,
               layers="experts"),
    TensorSpec(f"{_LAYER}mlp.gate.e_score_correction_bias", f"{_BLOCK}exp_probs_b.bias", ("experts",), Role.NORM,
               layers="experts", flag="choosing_bias"),
    *_mlp(f"{_LAYER}mlp.experts.{{expert}}", "_exps", "expert_ffn", layers="experts"),
    *_mlp(f"{_LAYER}mlp.shared_experts", "_shexp", "shared_ffn", layers="experts", flag="shared_experts"),
)  # fmt: skip


def _experts(config: fields.Config, layers: int, *, sigmoid: bool) -> Experts:
    dense = fields.get(config, "first_k_dense_replace", 0)
    if isinstance(dense, bool) or not isinstance(dense, int) or not 0 <= dense <= layers:
        raise InputError(f"config.json: 'first_k_dense_replace' is {fields.short(dense)}, wanted 0 to {layers}")
    fields.refuse(config, {"moe_layer_freq": (1, None)})
    method = config.get("topk_method") or ("noaux_tc" if sigmoid else "greedy")
    wanted = ("noaux_tc",) if sigmoid else ("greedy", "group_limited_greedy")
    if method not in wanted:
        raise InputError(f"config.json: 'topk_method' is {fields.short(method)}, which is not implemented")
    grouped = method != "greedy"
    width = fields.size(config, "moe_intermediate_size")
    shared = config.get("n_shared_experts") or 0
    return Experts(
        count=fields.size(config, "n_routed_experts"),
        used=fields.size(config, "num_experts_per_tok"),
        intermediate=width,
        layers=tuple(layer >= dense for layer in range(layers)),
        gating="sigmoid" if sigmoid else "softmax",
        normalized=fields.flag(config, "norm_topk_prob", sigmoid),
        scale=fields.number(config, "routed_scaling_factor", 1.0),
        shared=width * (fields.size(config, "n_shared_experts") if shared else 0),
        groups=fields.size(config, "n_group", 1) if grouped else 1,
        groups_used=fields.size(config, "topk_group", 1) if grouped else 1,
        group_top=2 if sigmoid else 1,
    )


def _latent(config: fields.Config) -> Latent:
    given = config.get("q_lora_rank")
    return Latent(
        rank=fields.size(config, "kv_lora_rank", 512),
        query_rank=0 if given is None else fields.size(config, "q_lora_rank"),
        plain=fields.size(config, "qk_nope_head_dim", 128),
        turned=fields.size(config, "qk_rope_head_dim", 64),
        value=fields.size(config, "v_head_dim", 128),
    )


def _read(config: fields.Config, *, sigmoid: bool) -> Hyperparameters:
    fields.refuse_others(config, "n_shared_experts", "num_experts", "num_local_experts")
    fields.refuse(config, {"attention_bias": (False, None), "mlp_bias": (False, None),
                           "rope_interleave": (True, None), "num_nextn_predict_layers": (0, None, 1),
                           "scoring_func": ("sigmoid" if sigmoid else "softmax", None)})  # fmt: skip
    layers, heads = fields.size(config, "num_hidden_layers"), fields.size(config, "num_attention_heads")
    fields.refuse(config, {"num_key_value_heads": (heads, None)})
    latent, context = _latent(config), fields.size(config, "max_position_embeddings", 2048)
    experts = _experts(config, layers, sigmoid=sigmoid)
    if experts.normalized and not sigmoid:
        raise InputError("config.json: 'norm_topk_prob' is true, which transformers does not compute for this family")
    rope = _rope(config, latent, context)
    head_dim = latent.plain + latent.turned
    names = {"low_query" if latent.query_rank else "whole_query"}
    names |= {"shared_experts"} if experts.shared else set()
    return Hyperparameters(
        layers=layers,
        hidden=fields.size(config, "hidden_size"),
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        intermediate=fields.size(config, "intermediate_size"),
        vocab=fields.size(config, "vocab_size"),
        context=context,
        norm_eps=fields.number(config, "rms_norm_eps", 1e-6, high=1.0),
        activation=fields.activation(config, "hidden_act", "silu"),
        attention_scale=head_dim**-0.5 * _magnitude(rope) ** 2,
        rope=rope,
        tied=fields.flag(config, "tie_word_embeddings", False),
        flags=frozenset(names | ({"choosing_bias"} if sigmoid else set())),
        experts=experts,
        latent=latent,
    )


def _rope(config: fields.Config, latent: Latent, context: int) -> Rope:
    theta = fields.number(config, "rope_theta", 10000.0, low=1.0)
    read = read_rope(rope_settings(config), config, head_dim=latent.turned, context=context, theta=theta)
    if read.dim != latent.turned:
        raise InputError(f"config.json: 'partial_rotary_factor' turns {read.dim} of {latent.turned}, not implemented")
    return Rope(read.theta, read.dim, read.kind, read.parameters, interleaved=True)


def _magnitude(rope: Rope) -> float:
    """Gives what scores are multiplied by twice where positions are scaled (transformers: yarn_apply_mscale)."""
    share = rope.parameters.get("mscale_all_dim") or 0
    factor = rope.parameters.get("factor") or 1.0
    if rope.kind == "default" or not share or factor <= 1:
        return 1.0
    return 0.1 * float(share) * math.log(factor) + 1.0


def read_deepseek2(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` deepseek_v2."""
    return _read(config, sigmoid=False)


def read_deepseek3(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` deepseek_v3."""
    return _read(config, sigmoid=True)


def _gguf_metadata(hyper: Hyperparameters, config: fields.Config) -> Entries:
    del config
    latent, experts, rope = hyper.latent, hyper.experts, hyper.rope
    if latent is None or experts is None or rope is None:
        raise TypeError("hyperparameters of another family")
    entries = size_metadata(hyper, norm="rms")
    entries.pop("rope.scaling.attn_factor", None)  # llama.cpp takes YaRN's own magnitude back for this architecture
    entries |= {
        "attention.head_count_kv": ("uint32", 1),
        "attention.key_length": ("uint32", latent.rank + latent.turned),
        "attention.value_length": ("uint32", latent.rank),
        "attention.key_length_mla": ("uint32", hyper.head_dim),
        "attention.value_length_mla": ("uint32", latent.value),
        "attention.kv_lora_rank": ("uint32", latent.rank),
        "leading_dense_block_count": ("uint32", experts.layers.count(False)),
        "expert_count": ("uint32", experts.count),
        "expert_used_count": ("uint32", experts.used),
        "expert_feed_forward_length": ("uint32", experts.intermediate),
        "expert_shared_count": ("uint32", experts.shared // experts.intermediate),
        "expert_weights_scale": ("float32", experts.scale),
        "expert_weights_norm": ("bool", experts.normalized),
        "expert_gating_func": ("uint32", 2 if experts.gating == "sigmoid" else 1),
    }
    if latent.query_rank:
        entries["attention.q_lora_rank"] = ("uint32", latent.query_rank)
    if experts.groups > 1:
        entries["expert_group_count"] = ("uint32", experts.groups)
        entries["expert_group_used_count"] = ("uint32", experts.groups_used)
    if rope.kind == "yarn" and rope.parameters.get("mscale_all_dim"):
        entries["rope.scaling.yarn_log_multiplier"] = ("float32", 0.1 * float(rope.parameters["mscale_all_dim"]))
    return entries


def _gguf_check(hyper: Hyperparameters, config: fields.Config) -> None:
    del config
    if hyper.latent is None or hyper.rope is None or hyper.experts is None:
        raise TypeError("hyperparameters of another family")
    check_rope(hyper.rope, "DeepSeek", ("default", "yarn"))
    known = hyper.rope.parameters
    if hyper.rope.kind == "yarn" and (known.get("mscale") or 0) != (known.get("mscale_all_dim") or 0):
        raise InputError("config.json: yarn's 'mscale' and 'mscale_all_dim' differ; llama.cpp takes them for equal")
    if hyper.activation != "silu":
        raise InputError(f"config.json: 'hidden_act' is {hyper.activation!r}; llama.cpp computes 'silu' for DeepSeek")
    lite = hyper.layers in _LITE_LAYERS
    if lite == bool(hyper.latent.query_rank):
        there = "has none with" if lite else "needs one but for"
        raise InputError(
            f"config.json: 'q_lora_rank' is {hyper.latent.query_rank or None} in a model of {hyper.layers} layers; "
            f"llama.cpp's deepseek2 {there} 26 or 27 layers"
        )
    if not hyper.experts.shared:
        raise InputError("config.json: 'n_shared_experts' is 0; llama.cpp's deepseek2 wants shared experts")
    if hyper.experts.groups > 1 and hyper.experts.group_top != 2:
        raise InputError("config.json: 'topk_method' is 'group_limited_greedy', which llama.cpp does not compute")


def _config_from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    del metadata, names, factors
    raise InputError("GGUF: keys and values over a latent are stored for llama.cpp alone; give the model's own folder")


def _family(number: int, read: Any) -> ArchSpec:
    return ArchSpec(
        family=f"deepseek{number}",
        classes=(f"DeepseekV{number}ForCausalLM", f"DeepseekV{number}Model"),
        model_types=(f"deepseek_v{number}",),
        gguf="deepseek2",
        prefix="model.",
        norm="rms",
        gguf_rope="norm",
        tensors=_TABLE,
        ignored=("model.layers.{layer}.self_attn.rotary_emb.inv_freq",),
        read_config=read,
        gguf_metadata=_gguf_metadata,
        gguf_tensors=lambda _hyper: {},
        config_from_gguf=_config_from_gguf,
        gguf_check=_gguf_check,
        gguf_opens=False,
    )


DEEPSEEK2 = _family(2, read_deepseek2)
DEEPSEEK3 = _family(3, read_deepseek3)
