"""Makes tiny random checkpoints of every family, with a small real tokenizer, through transformers' own classes."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VOCABULARY = 320  # 256 bytes, one special token, and merges
END = "<|endoftext|>"
_TEXT = (
    "The press takes a model and gives a file. The file is read, run and compared with the model. "
    "What was written in the morning is read in the evening; what differs is thrown away. "
    "Numbers such as 12, 345 and 6.789 stay numbers, and names like gate, up and down stay names. "
)
_SIZES: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_LONG = [1.0 + 0.5 * step for step in range(8)]
_SHORT = [1.0 + 0.1 * step for step in range(8)]
_GPT2_SIZES: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_BASE: Mapping[str, Mapping[str, Any]] = {
    "llama": _SIZES,
    "mistral": {**_SIZES, "sliding_window": None},
    "qwen2": _SIZES,
    "qwen3": {**_SIZES, "head_dim": 16},
    "gemma": {**_SIZES, "head_dim": 32},
    "gemma2": {**_SIZES, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3": {**_SIZES, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16, "sliding_window_pattern": 2},
    "phi3": _SIZES,
    "gpt2": _GPT2_SIZES,
    "gptneox": {key: value for key, value in _SIZES.items() if key != "num_key_value_heads"},
}
_MODEL_TYPES = {"gemma3": "gemma3_text", "gptneox": "gpt_neox"}
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gptneox": "GPTNeoXForCausalLM",
}


@dataclass(frozen=True)
class Tiny:
    """A family with one set of options.

    Attributes:
        id: name for a test's parameter.
        family: as `ArchSpec.family`.
        options: keys of config.json that differ from the tiny base; `bare` names tensors without the usual prefix,
            `vision` puts Gemma 3 inside an image-reading model.
        gguf: whether llama.cpp can compute it.
    """

    id: str
    family: str
    options: Mapping[str, Any] = field(default_factory=dict)
    gguf: bool = True

    def __str__(self) -> str:
        return self.id


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


_YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
_LONGROPE = {"short_factor": _SHORT, "long_factor": _LONG, "original_max_position_embeddings": 16}
_PHI_LONG = {"original_max_position_embeddings": 16}

FAMILIES: tuple[Tiny, ...] = (
    Tiny("llama", "llama"),
    Tiny("llama-bias", "llama", {"attention_bias": True, "mlp_bias": True}),
    Tiny("llama-head_dim", "llama", {"head_dim": 32}),
    Tiny("llama-tied", "llama", {"tie_word_embeddings": True}),
    Tiny("llama-mha", "llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-3}),
    Tiny("llama-mqa", "llama", {"num_key_value_heads": 1}),
    Tiny("llama-theta", "llama", _rope("default", rope_theta=500.0)),
    Tiny("llama-linear", "llama", _rope("linear", factor=4.0)),
    Tiny("llama-dynamic", "llama", {**_rope("dynamic", factor=2.0), "max_position_embeddings": 32}),
    Tiny("llama-llama3", "llama", {**_rope("llama3", **_LLAMA3), "head_dim": 32}),
    Tiny("llama-llama3-small", "llama", _rope("llama3", **_LLAMA3)),
    Tiny("llama-yarn", "llama", _rope("yarn", **_YARN)),
    Tiny("llama-yarn-factor", "llama", _rope("yarn", **_YARN, attention_factor=0.8)),
    Tiny("llama-yarn-mscale", "llama", _rope("yarn", **_YARN, mscale=0.7, mscale_all_dim=1.3)),
    Tiny("llama-yarn-betas", "llama", _rope("yarn", **_YARN, beta_fast=4.0, beta_slow=0.5, truncate=False), gguf=False),
    Tiny("llama-longrope", "llama", _rope("longrope", **_LONGROPE)),
    Tiny("llama-longrope-factor", "llama", _rope("longrope", **_LONGROPE, factor=2.0, attention_factor=1.2)),
    Tiny("llama-gelu", "llama", {"hidden_act": "gelu"}, gguf=False),
    Tiny("llama-relu", "llama", {"hidden_act": "relu"}, gguf=False),
    Tiny("llama-bare", "llama", {"bare": True, "tie_word_embeddings": True}),
    Tiny("mistral", "mistral"),
    Tiny("mistral-window", "mistral", {"sliding_window": 8}),
    Tiny("mistral-head_dim", "mistral", {"sliding_window": 5, "head_dim": 24, **_rope("default", rope_theta=1e6)}),
    Tiny("qwen2", "qwen2"),
    Tiny("qwen2-tied", "qwen2", {"tie_word_embeddings": True}),
    Tiny("qwen2-window", "qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    Tiny("qwen2-yarn", "qwen2", _rope("yarn", **_YARN)),
    Tiny("qwen3", "qwen3"),
    Tiny("qwen3-head_dim", "qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    Tiny("qwen3-bias", "qwen3", {"attention_bias": True}, gguf=False),
    Tiny("qwen3-window", "qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
    Tiny("gemma", "gemma"),
    Tiny("gemma-gelu", "gemma", {"hidden_act": "gelu", "num_key_value_heads": 1}),
    Tiny("gemma-bias", "gemma", {"attention_bias": True}, gguf=False),
    Tiny("gemma-untied", "gemma", {"tie_word_embeddings": False}, gguf=False),
    Tiny("gemma2", "gemma2"),
    Tiny("gemma2-caps", "gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    Tiny("gemma2-nocaps", "gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}, gguf=False),
    Tiny("gemma2-scalar", "gemma2", {"query_pre_attn_scalar": 40}, gguf=False),
    Tiny("gemma2-layers", "gemma2", {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}),
    Tiny("gemma3", "gemma3"),
    Tiny("gemma3-six", "gemma3", {"num_hidden_layers": 6, "sliding_window_pattern": 6}),
    Tiny("gemma3-cap", "gemma3", {"final_logit_softcapping": 3.0}),
    Tiny("gemma3-full", "gemma3", {"layer_types": ["full_attention"] * 3}),
    Tiny("gemma3-untied", "gemma3", {"tie_word_embeddings": False}),
    Tiny(
        "gemma3-linear",
        "gemma3",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
            }
        },
    ),
    Tiny("gemma3-vision", "gemma3", {"vision": True}),
    Tiny("phi3", "phi3"),
    Tiny("phi3-window", "phi3", {"sliding_window": 8}),
    Tiny("phi3-partial", "phi3", _rope("default", partial_rotary_factor=0.75)),
    Tiny("phi3-longrope", "phi3", {**_rope("longrope", short_factor=_SHORT, long_factor=_LONG), **_PHI_LONG}),
    Tiny(
        "phi3-mini4",
        "phi3",
        {
            **_rope("longrope", short_factor=_SHORT[:6], long_factor=_LONG[:6], partial_rotary_factor=0.75),
            **_PHI_LONG,
            "tie_word_embeddings": True,
            "sliding_window": 40,
        },
    ),
    Tiny("gpt2", "gpt2"),
    Tiny("gpt2-inner", "gpt2", {"n_inner": 160}),
    Tiny("gpt2-untied", "gpt2", {"tie_word_embeddings": False}),
    Tiny("gpt2-bare", "gpt2", {"bare": True}),
    Tiny("gpt2-erf", "gpt2", {"activation_function": "gelu"}),
    Tiny("gpt2-relu", "gpt2", {"activation_function": "relu"}, gguf=False),
    Tiny(
        "gpt2-inverse", "gpt2", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}, gguf=False
    ),
    Tiny("gpt2-unscaled", "gpt2", {"scale_attn_weights": False}, gguf=False),
    Tiny("gptneox", "gptneox"),
    Tiny("gptneox-sequential", "gptneox", {"use_parallel_residual": False}),
    Tiny("gptneox-nobias", "gptneox", {"attention_bias": False}),
    Tiny("gptneox-whole", "gptneox", {**_rope("default", partial_rotary_factor=1.0, rope_theta=3000.0)}),
    Tiny("gptneox-linear", "gptneox", _rope("linear", factor=2.0, partial_rotary_factor=0.5)),
    Tiny("gptneox-tied", "gptneox", {"tie_word_embeddings": True}),
)


def tiny_case(name: str) -> Tiny:
    """Gives a case of `FAMILIES` by its id."""
    return next(case for case in FAMILIES if case.id == name)


def tiny_config(family: str, **options: Any) -> dict[str, Any]:
    """Gives a config.json without transformers: the base that `tiny_checkpoint` starts from, with these options."""
    model_type = _MODEL_TYPES.get(family, family)
    return {"architectures": [_CLASSES[family]], "model_type": model_type, **_BASE[family], **options}


def tiny_checkpoint(folder: Path, family: str, *, seed: int = 0, dtype: str = "float32", **options: Any) -> Path:
    """Writes config.json, model.safetensors and a tokenizer.

    Args:
        folder: where to; made if missing.
        family: as `ArchSpec.family`.
        seed: of the random weights.
        dtype: of the tensors in the file: torch's name.
        options: as `Tiny.options`.

    Returns:
        The folder.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    bare, vision = options.pop("bare", False), options.pop("vision", False)
    settings = {**_BASE[family], **json.loads(json.dumps(options))}
    if vision:
        model = _vision_model(settings)
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(_MODEL_TYPES.get(family, family), **settings))
    randomize(model, seed, zero_centred=family.startswith("gemma"))
    (model.base_model if bare else model).to(getattr(torch, dtype)).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Writes a byte-level BPE tokenizer with `VOCABULARY` tokens, GPT-2's splitting and one special token, id 0."""
    folder.joinpath("tokenizer.json").write_text(_tokenizer_json(), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 64,
    }
    folder.joinpath("tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


@functools.cache
def _tokenizer_json() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    return str(tokenizer.to_str(pretty=True))


def _vision_model(settings: Mapping[str, Any]) -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    special = {"boi_token_index": 1, "eoi_token_index": 2, "image_token_index": 3, "mm_tokens_per_image": 4}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=dict(settings), vision_config=vision, **special))


def randomize(model: Any, seed: int, *, zero_centred: bool) -> None:
    """Fills every parameter so that each one matters: as training starts, most of them have no effect."""
    import torch

    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=random)
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.copy_(0.2 * noise + (0.0 if zero_centred else 1.0))
            elif parameter.ndim == 1:
                parameter.copy_(0.2 * noise)
            elif any(part in name for part in ("embed", "wte", "wpe", "lm_head")):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
