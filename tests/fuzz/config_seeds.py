"""A config.json of every family, without a model: what the families' cases say, and the rest written out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from quantpress.convert.arch.registry import ARCHITECTURES
from tests.tiny import FAMILIES, VOCABULARY, tiny_config

__all__ = ["config_seeds"]

# tiny.py's and the cases' sizes, under the names that other years and other people gave them
_COMMON: Mapping[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
_GPT2: Mapping[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
_T5: Mapping[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 2,
    "num_heads": 4, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16,
    "feed_forward_proj": "gated-gelu", "is_encoder_decoder": True, "pad_token_id": 0, "eos_token_id": 1,
    "decoder_start_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
_WRITTEN: Mapping[str, Mapping[str, Any]] = {
    "baichuan": {
        **{key: value for key, value in _COMMON.items() if key != "max_position_embeddings"},
        "hidden_act": "silu", "model_max_length": 64, "num_hidden_layers": 40, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    "bert": {**_COMMON, "hidden_act": "gelu", "type_vocab_size": 2, "pad_token_id": 0},
    "chatglm": {
        "_name_or_path": "THUDM/chatglm3-6b", "add_bias_linear": False, "add_qkv_bias": True,
        "apply_residual_connection_post_layernorm": False, "ffn_hidden_size": 96, "hidden_size": 64, "kv_channels": 16,
        "layernorm_epsilon": 1e-5, "multi_query_attention": True, "multi_query_group_num": 2, "num_attention_heads": 4,
        "num_layers": 2, "original_rope": True, "padded_vocab_size": VOCABULARY, "post_layer_norm": True,
        "rmsnorm": True, "seq_length": 64, "tie_word_embeddings": False, "vocab_size": VOCABULARY, "eos_token_id": 0,
    },
    "distilbert": {
        "vocab_size": VOCABULARY, "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "activation": "gelu",
        "max_position_embeddings": 64, "pad_token_id": 0,
    },
    "gptbigcode": {**_GPT2, "n_inner": 96, "multi_query": True, "activation_function": "gelu_pytorch_tanh"},
    "gptj": {**_GPT2, "rotary_dim": 8, "activation_function": "gelu_new", "tie_word_embeddings": False},
    "mt5": _T5,
    "qwen": {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 192, "kv_channels": 16, "no_bias": True,
        "num_attention_heads": 4, "num_hidden_layers": 2, "rotary_emb_base": 10000, "rotary_pct": 1.0,
        "seq_length": 64, "max_position_embeddings": 64, "layer_norm_epsilon": 1e-6, "tie_word_embeddings": False,
    },
    "roberta": {**_COMMON, "hidden_act": "gelu", "type_vocab_size": 1, "pad_token_id": 1},
    "t5": _T5,
    "umt5": _T5,
}  # fmt: skip


def config_seeds() -> dict[str, bytes]:
    """Gives name -> config.json: one of each family, and those of tests/tiny.py with every way to turn positions."""
    found = dict(_configs())
    missing = {spec.family for spec in ARCHITECTURES} - set(found)
    assert not missing, f"no config.json to begin with for {sorted(missing)}"
    return {name: json.dumps(config).encode() for name, config in found.items()}


def _configs() -> Iterator[tuple[str, dict[str, Any]]]:
    from tests.families.cases import SIZES
    from tests.families.registered import ALL

    specs = {spec.family: spec for spec in ARCHITECTURES}
    for case in FAMILIES:
        if "vision" not in case.options and "bare" not in case.options:
            yield case.id, tiny_config(case.family, **case.options)
    for family, config in _WRITTEN.items():
        yield family, {**_named(specs[family]), **config}
    for case in reversed(ALL):  # the first case of a family is the plainest, and is what stays
        if case.family not in _WRITTEN and case.family in specs:
            yield case.family, {**({} if case.bare else SIZES), **_named(specs[case.family]), **case.options}


def _named(spec: Any) -> dict[str, Any]:
    return {"model_type": spec.model_types[0], "architectures": [spec.classes[0]]}
