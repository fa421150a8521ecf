"""BLOOM, Falcon, MPT, OPT, GPT-J, Phi, StableLM, StarCoder: decoders from before everything looked like Llama."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from tests.families import mpt_reference
from tests.families.cases import Case
from tests.tiny import VOCABULARY

__all__ = ["CASES"]


def _in_torch_attention(folder: Path, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """Gives what transformers computes with torch's attention: its own adds Falcon's ALiBi twice."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    with torch.no_grad():
        found: NDArray[np.float32] = model(torch.from_numpy(tokens[None])).logits[0].float().numpy()
    return found


_TWICE = "the proof of adapters asks transformers' own attention, which adds Falcon's ALiBi twice"
_GROUPED = {"new_decoder_architecture": True, "num_kv_heads": 2}
_RW = {"alibi": True, "parallel_attn": False, "multi_query": False, "bias": True}
_THETA = {"rope_theta": 500000.0}
_PARALLEL = {"use_parallel_residual": True, "qk_layernorm": True}
_NO_OPT = "llama.cpp has no OPT"
_OPT_350M = {"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False}
_GALACTICA = {"ffn_dim": 96, "enable_bias": False, "activation_function": "gelu", "tie_word_embeddings": False}
_MPT = {
    "architectures": ["MPTForCausalLM"], "model_type": "mpt", "d_model": 64, "n_heads": 4, "n_layers": 3,
    "expansion_ratio": 4, "max_seq_len": 64, "vocab_size": VOCABULARY, "norm_type": "low_precision_layernorm",
    "no_bias": True, "attn_config": {"alibi": True, "alibi_bias_max": 8},
}  # fmt: skip
_PLAIN_MPT = {key: value for key, value in _MPT.items() if key not in ("model_type", "architectures")}


def _mpt(name: str, attention: dict[str, Any], *, gguf: str = "", **options: Any) -> Case:
    """A case in the form of MPT's own code."""
    config = {**_MPT, "attn_config": {**_MPT["attn_config"], **attention}, **options}
    make = partial(mpt_reference.write, config=config)
    return Case(f"mpt-{name}", "mpt", make=make, logits=mpt_reference.logits, gguf=gguf, long=True)


CASES = (
    Case("bloom", "bloom"),
    Case("bloom-heads-no-power-of-two", "bloom", {"hidden_size": 96, "n_head": 6}, long=True),
    Case("bloom-own-head", "bloom", {"tie_word_embeddings": False}, long=True),
    Case("falcon-7b", "falcon", long=True),
    Case("falcon-40b", "falcon", _GROUPED),
    Case("falcon-11b", "falcon", {**_GROUPED, "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 96}, long=True),
    Case("falcon-rw", "falcon", _RW, gguf="'alibi' is true", logits=_in_torch_attention, lora=_TWICE, long=True),
    Case("falcon-heads", "falcon", {"multi_query": False}, long=True),
    Case("falcon-biases", "falcon", {"bias": True}, gguf="'bias' is true", long=True),
    Case("falcon-sequential", "falcon", {"parallel_attn": False}, gguf="'parallel_attn' is false", long=True),
    Case(
        "falcon-linear-rope", "falcon", {"rope_parameters": {**_THETA, "rope_type": "linear", "factor": 2.0}}, long=True
    ),
    Case("mpt", "mpt", _PLAIN_MPT, bare=True),
    Case("mpt-clipped", "mpt", {**_PLAIN_MPT, "attn_config": {"clip_qkv": 1.0}}, bare=True, long=True),
    _mpt("storywriter", {"alibi_bias_max": 16, "clip_qkv": 1.0}),
    _mpt("sea-lion", {"alibi": False, "qk_ln": True}, no_bias=False, gguf="'qk_ln' is true"),
    _mpt("learned-positions", {"alibi": False}),
    _mpt("biases", {}, no_bias=False),
    _mpt("grouped", {"attn_type": "grouped_query_attention", "kv_n_heads": 2}),
    _mpt("multiquery", {"attn_type": "multiquery_attention", "kv_n_heads": 1}),
    _mpt("logit-scale", {}, logit_scale="inv_sqrt_d_model", gguf="'logit_scale' is set"),
    _mpt("softmax-scale", {"softmax_scale": 0.5}, gguf="'softmax_scale' is set"),
    Case("opt", "opt", {"ffn_dim": 96}, gguf=_NO_OPT),
    Case("opt-350m", "opt", _OPT_350M, gguf=_NO_OPT, long=True),
    Case("opt-narrow-embedding", "opt", {"ffn_dim": 96, "word_embed_proj_dim": 32}, gguf=_NO_OPT, long=True),
    Case("galactica", "opt", _GALACTICA, gguf=_NO_OPT, long=True),
    Case("phi", "phi"),
    Case("phi-grouped", "phi", {"num_key_value_heads": 2, "partial_rotary_factor": 1.0}, long=True),
    Case("phi-qk-norm", "phi", {"qk_layernorm": True}, gguf="'qk_layernorm' is true", long=True),
    Case("phi-tied", "phi", {"tie_word_embeddings": True}, long=True),
    Case("gptj", "gptj", {"rotary_dim": 8}),
    Case("gptj-whole-heads", "gptj", {"rotary_dim": 16, "n_inner": 96}, long=True),
    Case("stablelm", "stablelm", {"partial_rotary_factor": 0.5}, long=True),
    Case("stablelm-2-12b", "stablelm", {**_PARALLEL, "partial_rotary_factor": 0.25}),
    Case("stablelm-qkv-bias", "stablelm", {"use_qkv_bias": True, "partial_rotary_factor": 0.25}, long=True),
    Case("stablelm-qk-norm-sequential", "stablelm", {"qk_layernorm": True, "num_key_value_heads": 4}, long=True),
    Case("starcoder2", "starcoder2"),
    Case("starcoder2-window", "starcoder2", {"sliding_window": 16}, long=True),
    Case("starcoder2-no-biases", "starcoder2", {"use_bias": False, "tie_word_embeddings": False}, long=True),
    Case("starcoder", "gptbigcode", model_type="gpt_bigcode"),
    Case("starcoder-heads", "gptbigcode", {"multi_query": False, "n_inner": 96}, model_type="gpt_bigcode", long=True),
)
