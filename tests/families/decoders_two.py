"""OLMo, Command-R, Granite, SmolLM3, MiniCPM, GLM: families with norms elsewhere, scales, and neighbours that turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from tests.families.cases import Case, transformers_logits, write_checkpoint
from tests.tiny import write_tokenizer

__all__ = ["CASES"]

_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
_NO_BIAS = "'attention_bias' is true"
_SLIDING: dict[str, Any] = {"sliding_window": 8, "num_hidden_layers": 4}


def _nested(full: dict[str, Any], local: dict[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": {"full_attention": full, "sliding_attention": local}}


_PLAIN = {"rope_type": "default", "rope_theta": 10000.0}

_OLMO = (
    Case("olmo", "olmo", {"clip_qkv": 0.8}),
    Case("olmo-unclipped", "olmo", {"num_key_value_heads": 4, "tie_word_embeddings": True}, long=True),
    Case("olmo-yarn", "olmo", {"rope_parameters": _YARN}, long=True),
    Case("olmo-bias", "olmo", {"attention_bias": True, "clip_qkv": 0.8}, gguf=_NO_BIAS, long=True),
    Case("olmo-head_dim", "olmo", {"head_dim": 32}, gguf="'head_dim' is 32", long=True),
    Case("olmo-gelu", "olmo", {"hidden_act": "gelu"}, gguf="activation is 'gelu'", long=True),
    Case("olmo2", "olmo2"),
    Case("olmo2-mha", "olmo2", {"num_key_value_heads": 4, "rms_norm_eps": 1e-3}, long=True),
    Case("olmo2-tied", "olmo2", {"tie_word_embeddings": True, "rope_parameters": _LINEAR}, long=True),
    Case("olmo2-bias", "olmo2", {"attention_bias": True}, gguf=_NO_BIAS, long=True),
    Case("olmo3", "olmo3", {**_SLIDING, **_nested(_YARN, _PLAIN)}),
    Case("olmo3-plain", "olmo3", _SLIDING, long=True),
    Case("olmo3-layers", "olmo3", {"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"] * 2,
                                   "num_hidden_layers": 4}, long=True),
    Case("olmo3-full", "olmo3", {"layer_types": ["full_attention"] * 3}, long=True),
    Case("olmo3-theta", "olmo3", {**_SLIDING, **_nested(_PLAIN, {**_PLAIN, "rope_theta": 500.0})},
         gguf="with base 500", long=True),
)  # fmt: skip

_ROPE = {"rope_type": "default", "rope_theta": 5000.0}
_COHERE = (
    Case("cohere", "cohere", {"logit_scale": 0.25, "rope_parameters": _ROPE}),
    Case("cohere-untied", "cohere", {"tie_word_embeddings": False}, gguf="'tie_word_embeddings' is false", long=True),
    Case("cohere-bias", "cohere", {"attention_bias": True}, gguf=_NO_BIAS, long=True),
    Case("cohere-yarn", "cohere", {"logit_scale": 1.5, "rope_parameters": _YARN}, long=True),
    Case("cohere-norms", "cohere", {"use_qk_norm": True}, gguf="'use_qk_norm' is true with 3 layers"),
    Case("cohere-plus", "cohere", {"use_qk_norm": True, "num_hidden_layers": 64, "intermediate_size": 32}, long=True),
    Case("cohere-deep", "cohere", {"num_hidden_layers": 64, "intermediate_size": 32},
         gguf="'use_qk_norm' is false with 64 layers", long=True),
    Case("cohere2", "cohere2", {**_SLIDING, "logit_scale": 0.25, "rope_parameters": _ROPE}),
    Case("cohere2-layers", "cohere2", {"layer_types": ["full_attention", "sliding_attention", "full_attention"],
                                       "sliding_window": 5, "layer_norm_eps": 1e-3}, long=True),
    Case("cohere2-full", "cohere2", {"layer_types": ["full_attention"] * 3}, gguf="has no sliding layer", long=True),
    Case("cohere2-untied", "cohere2", {"tie_word_embeddings": False}, gguf="'tie_word_embeddings' is false", long=True),
)  # fmt: skip

_FACTORS = {
    "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.22, "attention_multiplier": 0.125,
}  # fmt: skip
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
_GRANITE = (
    Case("granite", "granite", _FACTORS),
    Case("granite-plain", "granite", {"num_key_value_heads": 4, "tie_word_embeddings": True}, long=True),
    Case("granite-bias", "granite", {**_FACTORS, "attention_bias": True, "mlp_bias": True}, long=True),
    Case("granite-head_dim", "granite", {**_FACTORS, "head_dim": 32, "rope_parameters": _LLAMA3}, long=True),
    Case("granite-gelu", "granite", {"hidden_act": "gelu"}, gguf="activation is 'gelu'", long=True),
)


def _written_as_granite(folder: Path, **options: Any) -> None:
    """Writes MiniCPM's published layout: Granite's tensors under the same names, and other keys in config.json."""
    case = Case("granite", "granite", {**_FACTORS, **options})
    write_checkpoint(case, folder / "granite")
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((folder / "granite" / name).read_bytes())
    config = json.loads((folder / "granite" / "config.json").read_text())
    found = {key: config.pop(key) for key in _FACTORS}
    assert found["attention_multiplier"] == 0.25, "of plain attention: MiniCPM has no key for it"
    own = {
        "architectures": ["MiniCPMForCausalLM"],
        "model_type": "minicpm",
        "scale_emb": found["embedding_multiplier"],
        "scale_depth": found["residual_multiplier"] * config["num_hidden_layers"] ** 0.5,
        "dim_model_base": round(config["hidden_size"] / found["logits_scaling"]),
        "auto_map": {"AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps({**config, **own}))


def _logits_as_granite(folder: Path, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    return transformers_logits(folder / "granite", tokens)


def _minicpm(name: str, *, long: bool = False, **options: Any) -> Case:
    def make(folder: Path) -> None:
        _written_as_granite(folder, attention_multiplier=0.25, **options)

    return Case(name, "minicpm", make=make, logits=_logits_as_granite, long=long)


_LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0 + 0.1 * step for step in range(8)],
             "long_factor": [1.0 + 0.5 * step for step in range(8)],
             "original_max_position_embeddings": 4}  # fmt: skip
_MINICPM = (
    _minicpm("minicpm", tie_word_embeddings=True, residual_multiplier=1.4 / 3**0.5),
    _minicpm("minicpm-longrope", rope_parameters=_LONGROPE, long=True),
    _minicpm("minicpm-bias", attention_bias=True, long=True),
)

_SMOLLM3 = (
    Case("smollm3", "smollm3", {"num_hidden_layers": 4}),
    Case("smollm3-untied", "smollm3", {"num_hidden_layers": 4, "tie_word_embeddings": False, "head_dim": 32,
                                       "rope_parameters": _YARN}, long=True),
    Case("smollm3-layers", "smollm3", {"no_rope_layers": [0, 1, 1]}, gguf="'no_rope_layers' is not every", long=True),
    Case("smollm3-interval", "smollm3", {"no_rope_layer_interval": 2}, gguf="'no_rope_layers' is not every", long=True),
    Case("smollm3-window", "smollm3", {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 8},
         long=True),
    Case("smollm3-bias", "smollm3", {"attention_bias": True, "mlp_bias": True}, gguf=_NO_BIAS, long=True),
    Case("smollm3-mlp_bias", "smollm3", {"mlp_bias": True}, gguf="'mlp_bias' is true", long=True),
)  # fmt: skip

_HEADS = {"head_dim": 16}
_GLM = tuple(
    case
    for family in ("glm", "glm4")
    for case in (
        Case(family, family, _HEADS),
        Case(f"{family}-nobias", family, {**_HEADS, "attention_bias": False, "tie_word_embeddings": True}, long=True),
        Case(f"{family}-whole", family, {**_HEADS, "partial_rotary_factor": 1.0, "rms_norm_eps": 1e-3}, long=True),
        Case(f"{family}-yarn", family, {**_HEADS, "rope_parameters": {**_YARN, "partial_rotary_factor": 0.5}},
             long=True),
        Case(f"{family}-head_dim", family, {"head_dim": 24, "num_key_value_heads": 1}, long=True,
             gguf="'head_dim' is 24" if family == "glm" else ""),
    )
)  # fmt: skip

_EXAONE_NAMES = (
    ("model.embed_tokens", "transformer.wte"), ("model.layers.", "transformer.h."), ("model.norm", "transformer.ln_f"),
    ("input_layernorm", "ln_1"), ("post_attention_layernorm", "ln_2"), ("self_attn.o_proj", "attn.attention.out_proj"),
    ("self_attn.", "attn.attention."), ("gate_proj", "c_fc_0"), ("up_proj", "c_fc_1"), ("down_proj", "c_proj"),
)  # fmt: skip


def _renamed(name: str) -> str:
    for usual, own in _EXAONE_NAMES:
        name = name.replace(usual, own)
    return name


def _exaone(name: str, *, long: bool = False, **options: Any) -> Case:
    """A Llama under the names of EXAONE 3's published layout."""

    def make(folder: Path) -> None:
        write_checkpoint(Case("llama", "llama", options), folder / "llama")
        write_tokenizer(folder)
        tensors = load_file(folder / "llama" / "model.safetensors")
        save_file({_renamed(key): values for key, values in tensors.items()}, folder / "model.safetensors")
        config = json.loads((folder / "llama" / "config.json").read_text())
        own = {
            "architectures": ["ExaoneForCausalLM"],
            "model_type": "exaone",
            "num_layers": config.pop("num_hidden_layers"),
            "activation_function": config.pop("hidden_act"),
            "layer_norm_epsilon": config.pop("rms_norm_eps"),
        }
        (folder / "config.json").write_text(json.dumps({**config, **own}))

    def logits(folder: Path, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        return transformers_logits(folder / "llama", tokens)

    return Case(name, "exaone", make=make, logits=logits, long=long)


_NO_WINDOW: dict[str, Any] = {"sliding_window": None, "layer_types": ["full_attention"] * 3}
_MANY: dict[str, Any] = {"num_hidden_layers": 64, "intermediate_size": 32}
_OTHERS = (
    _exaone("exaone", rope_parameters=_LLAMA3),
    _exaone("exaone-tied", tie_word_embeddings=True, head_dim=32, rms_norm_eps=1e-3, long=True),
    Case("exaone4", "exaone4", {**_NO_WINDOW, "rope_parameters": _LLAMA3}),
    Case("exaone4-window", "exaone4", _SLIDING, gguf="has sliding layers among 4"),
    Case("exaone4-many", "exaone4", {**_MANY, "sliding_window": 8}, long=True),
    Case("exaone4-head_dim", "exaone4", {**_NO_WINDOW, "head_dim": 32}, gguf="'head_dim' is 32", long=True),
    Case("exaone4-unturned", "exaone4", {**_NO_WINDOW, "sliding_window": 8}, gguf="has no sliding layers", long=True),
    Case("seed_oss", "seed_oss", {"head_dim": 32}),
    Case("seed_oss-nobias", "seed_oss", {**_HEADS, "attention_bias": False, "tie_word_embeddings": True}, long=True),
    Case("seed_oss-biases", "seed_oss", {**_HEADS, "attention_out_bias": True, "mlp_bias": True},
         gguf="'attention_out_bias' is true", long=True),
    Case("ernie4_5", "ernie4_5", {"head_dim": 32}),
    Case("ernie4_5-untied", "ernie4_5", {**_HEADS, "tie_word_embeddings": False, "rope_parameters": _YARN}, long=True),
    Case("ernie4_5-bias", "ernie4_5", {**_HEADS, "use_bias": True}, gguf="'use_bias' is true", long=True),
    Case("arcee", "arcee"),
    Case("arcee-llama3", "arcee", {"rope_parameters": _LLAMA3, "tie_word_embeddings": True}, long=True),
    Case("arcee-biases", "arcee", {"attention_bias": True, "mlp_bias": True}, gguf=_NO_BIAS, long=True),
    Case("nemotron", "nemotron"),
    Case("nemotron-biases", "nemotron", {"attention_bias": True, "mlp_bias": True, "norm_eps": 1e-3}, long=True),
    Case("nemotron-whole", "nemotron", {"partial_rotary_factor": 1.0, "tie_word_embeddings": True}, long=True),
    Case("nemotron-silu", "nemotron", {"hidden_act": "silu"}, gguf="activation is 'silu'", long=True),
)  # fmt: skip

CASES: tuple[Case, ...] = (*_OLMO, *_COHERE, *_GRANITE, *_MINICPM, *_SMOLLM3, *_GLM, *_OTHERS)
