"""Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE: each token goes to a few of a layer's MLPs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.families.cases import SIZES, Case
from tests.tiny import randomize, write_tokenizer

__all__ = ["CASES"]

_FOUR = {"num_local_experts": 4}
_SMALL = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_QWEN2 = {**_SMALL, "shared_expert_intermediate_size": 64}
_QWEN3 = {**_SMALL, "norm_topk_prob": True, "head_dim": 16}
_OLMOE = {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}
_FACTORS = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.2,
}
_GRANITE = {**_FOUR, **_FACTORS}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}


def _stacked(model_type: str, options: dict[str, Any]) -> Callable[[Path], None]:
    """Writes all experts of a layer in one tensor, as transformers 5 holds them."""

    def make(folder: Path) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        settings = {**SIZES, **json.loads(json.dumps(options))}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
        randomize(model, 0, zero_centred=False)
        model.float().save_pretrained(folder, save_original_format=False)
        write_tokenizer(folder)

    return make


CASES = (
    Case("granitemoe", "granitemoe", _GRANITE),
    Case("granitemoe-tied", "granitemoe", {**_FOUR, "attention_bias": True, "tie_word_embeddings": True}, long=True),
    Case("granitemoe-stacked", "granitemoe", make=_stacked("granitemoe", _GRANITE), long=True),
    Case(
        "granitemoe-shared",
        "granitemoe",
        {**_GRANITE, "shared_intermediate_size": 64},
        model_type="granitemoeshared",
        long=True,
    ),
    Case("mixtral", "mixtral", _FOUR),
    Case("mixtral-stacked", "mixtral", make=_stacked("mixtral", _FOUR), long=True),
    Case("mixtral-window", "mixtral", {**_FOUR, "sliding_window": 16, "head_dim": 32}, long=True),
    Case(
        "mixtral-eight",
        "mixtral",
        {"num_local_experts": 8, "num_experts_per_tok": 3, "tie_word_embeddings": True},
        long=True,
    ),
    Case("mixtral-gelu", "mixtral", {**_FOUR, "hidden_act": "gelu"}, gguf="the activation is 'gelu'", long=True),
    Case("qwen2_moe", "qwen2_moe", _QWEN2),
    Case("qwen2_moe-stacked", "qwen2_moe", make=_stacked("qwen2_moe", _QWEN2), long=True),
    Case(
        "qwen2_moe-dense-layers",
        "qwen2_moe",
        {**_QWEN2, "decoder_sparse_step": 2},
        gguf="leaves layers without experts",
        long=True,
    ),
    Case(
        "qwen2_moe-first-dense",
        "qwen2_moe",
        {**_QWEN2, "mlp_only_layers": [0]},
        gguf="leaves layers without experts",
        long=True,
    ),
    Case(
        "qwen2_moe-normalized",
        "qwen2_moe",
        {**_QWEN2, "norm_topk_prob": True},
        gguf="'norm_topk_prob' is true",
        long=True,
    ),
    Case("qwen2_moe-no-bias", "qwen2_moe", {**_QWEN2, "qkv_bias": False, "tie_word_embeddings": True}, long=True),
    Case("qwen2_moe-window", "qwen2_moe", {**_QWEN2, "use_sliding_window": True, "sliding_window": 16}, long=True),
    Case("qwen3_moe", "qwen3_moe", _QWEN3),
    Case("qwen3_moe-stacked", "qwen3_moe", make=_stacked("qwen3_moe", _QWEN3), long=True),
    Case(
        "qwen3_moe-tied",
        "qwen3_moe",
        {**_QWEN3, "head_dim": 32, "tie_word_embeddings": True, "rope_parameters": _YARN},
        long=True,
    ),
    Case(
        "qwen3_moe-dense-layers",
        "qwen3_moe",
        {**_QWEN3, "mlp_only_layers": [1]},
        gguf="leaves layers without experts",
        long=True,
    ),
    Case(
        "qwen3_moe-plain-weights",
        "qwen3_moe",
        {**_QWEN3, "norm_topk_prob": False},
        gguf="'norm_topk_prob' is false",
        long=True,
    ),
    Case("qwen3_moe-bias", "qwen3_moe", {**_QWEN3, "attention_bias": True}, gguf="'attention_bias' is true", long=True),
    Case("qwen3_moe-window", "qwen3_moe", {**_QWEN3, "use_sliding_window": True, "sliding_window": 16}, long=True),
    Case("olmoe", "olmoe", _OLMOE),
    Case("olmoe-stacked", "olmoe", make=_stacked("olmoe", _OLMOE), long=True),
    Case("olmoe-clipped", "olmoe", {**_OLMOE, "clip_qkv": 0.5}, gguf="'clip_qkv' is 0.5", long=True),
    Case("olmoe-grouped", "olmoe", {**_OLMOE, "num_key_value_heads": 2}, gguf="'num_key_value_heads' is 2", long=True),
    Case("olmoe-normalized", "olmoe", {**_OLMOE, "norm_topk_prob": True}, gguf="'norm_topk_prob' is true", long=True),
    Case("olmoe-bias", "olmoe", {**_OLMOE, "attention_bias": True}, gguf="'attention_bias' is true", long=True),
)
