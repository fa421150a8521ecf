"""gpt-oss: stacked experts with biases, sinks, windows."""

from __future__ import annotations

from tests.families.cases import Case

_SIZES = {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8, "attention_bias": True}
_SIZES |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
_FULL = ["full_attention"] * 3

CASES = (
    Case("gpt_oss", "gpt_oss", _SIZES),
    Case("gpt_oss-yarn", "gpt_oss", {**_SIZES, "rope_parameters": {**_YARN, "truncate": True}}, long=True),
    Case("gpt_oss-full", "gpt_oss", {**_SIZES, "layer_types": _FULL}, gguf="layer_types", long=True),
    Case("gpt_oss-limit", "gpt_oss", {**_SIZES, "swiglu_limit": 0.5}, gguf="swiglu_limit", long=True),
)
