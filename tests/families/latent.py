"""DeepSeek: attention over a latent, shared experts, layers without experts."""

from __future__ import annotations

from dataclasses import replace

from tests.families.cases import Case

_SIZES = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "topk_method": "greedy",
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
_YARN |= {"mscale": 0.7, "mscale_all_dim": 0.7}
_LITE = {**_SIZES, "q_lora_rank": None, "num_hidden_layers": 27, "hidden_size": 32}
_V3 = {**_SIZES, "topk_method": "noaux_tc", "n_group": 2, "topk_group": 1, "norm_topk_prob": True}
_GROUPS = {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1}

_CASES = (
    Case("deepseek2", "deepseek2", _SIZES, model_type="deepseek_v2"),
    Case("deepseek2-lite", "deepseek2", _LITE, model_type="deepseek_v2", long=True),
    Case("deepseek2-short", "deepseek2", {**_SIZES, "q_lora_rank": None}, "deepseek_v2", gguf="26 or 27", long=True),
    Case("deepseek2-yarn", "deepseek2", {**_SIZES, "rope_parameters": _YARN}, "deepseek_v2", long=True),
    Case("deepseek2-scale", "deepseek2", {**_SIZES, "routed_scaling_factor": 2.5}, "deepseek_v2", long=True),
    Case("deepseek2-groups", "deepseek2", {**_SIZES, **_GROUPS}, "deepseek_v2", gguf="group_limited", long=True),
    Case("deepseek3", "deepseek3", {**_V3, "routed_scaling_factor": 2.5}, "deepseek_v3"),
)
CASES = tuple(replace(case, reopened="" if case.gguf else "over a latent") for case in _CASES)
