"""What a config.json may say: refused values, defaults of transformers, and no key that is passed over."""

from __future__ import annotations

import json
from typing import Any

import pytest

from quantpress.convert.arch.registry import find_arch
from quantpress.convert.arch.spec import Hyperparameters
from quantpress.quant.errors import InputError
from tests.tiny import tiny_config

FAMILY_NAMES = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "gpt2", "gptneox"]


def read(config: dict[str, Any]) -> Hyperparameters:
    return find_arch(config).read_config(config)


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_scaling": {"rope_type": kind, **parameters}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"hidden_size": None}, "'hidden_size' is missing"),
    ("llama", {"hidden_size": 0}, "'hidden_size' is 0, wanted 1 to"),
    ("llama", {"num_hidden_layers": -3}, "'num_hidden_layers' is -3"),
    ("llama", {"vocab_size": 10**9}, "'vocab_size' is 1000000000"),
    ("llama", {"vocab_size": 1 << 22}, "'vocab_size' is 4194304, wanted 1 to 2097152"),
    ("gemma3", {"num_hidden_layers": 10_000_000}, "'num_hidden_layers' is 10000000, wanted 1 to 10000"),
    ("llama", {"head_dim": 1 << 20}, "'head_dim' is 1048576, wanted 1 to 65536"),
    ("llama", {"vocab_size": 10**4000}, r"'vocab_size' is 1000.*\.\.\."),
    ("llama", {"intermediate_size": 96.0}, r"'intermediate_size' is 96\.0, wanted a whole number"),
    ("llama", {"num_attention_heads": True}, "'num_attention_heads' is True"),
    ("llama", {"num_attention_heads": "4"}, "'num_attention_heads' is '4'"),
    ("llama", {"num_key_value_heads": 3}, "'num_attention_heads' is 4, wanted a multiple of 'num_key_value_heads'"),
    ("llama", {"num_attention_heads": 5, "num_key_value_heads": 5}, "hidden size 64 is not divisible"),
    ("llama", {"head_dim": 15}, "turn 15 of 15 values per head, wanted an even"),
    ("llama", {"rms_norm_eps": 0}, "'rms_norm_eps' is 0"),
    ("llama", {"rms_norm_eps": float("nan")}, "'rms_norm_eps' is nan"),
    ("llama", {"rms_norm_eps": float("inf")}, "'rms_norm_eps' is inf"),
    ("llama", {"rope_theta": -1.0}, r"'rope_theta' is -1\.0"),
    ("llama", {"attention_bias": "yes"}, "'attention_bias' is 'yes', wanted true or false"),
    ("llama", {"hidden_act": "mish"}, "'hidden_act' is 'mish', an activation not implemented"),
    ("llama", {"hidden_act": 3}, "'hidden_act' is 3, wanted a string"),
    ("llama", {"partial_rotary_factor": 0.5}, "'partial_rotary_factor' turns 8 of 16"),
    ("llama", {"sliding_window": 8}, "'sliding_window' is 8, which is not implemented"),
    ("llama", {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}, "'layer_types' mixes"),
    ("llama", {"layer_types": ["full_attention"]}, "'layer_types' is .* wanted a list of 3"),
    ("llama", {"num_local_experts": 8}, "'num_local_experts' is 8"),
    ("llama", {"embedding_multiplier": 12}, "'embedding_multiplier' is 12"),
    ("llama", {"is_causal": False}, "'is_causal' is False"),
    ("llama", {"rope_interleaved": True}, "'rope_interleaved' is True"),
    ("llama", {"rope_scaling": "linear"}, "'rope_scaling' is 'linear', wanted a mapping"),
    ("llama", {"rope_parameters": {"full_attention": {}}}, "rope key 'full_attention'"),
    ("llama", rope("ntk"), "rope_type is 'ntk', not implemented; known: default, linear"),
    ("llama", rope("mrope", mrope_section=[1, 2, 3]), "rope key 'mrope_section'"),
    ("llama", rope("linear"), r"'rope_parameters\.factor' is missing"),
    ("llama", rope("linear", factor=0), r"'rope_parameters\.factor' is 0"),
    ("llama", rope("linear", factor=2.0, alpha=1000), "rope key 'alpha' is 1000"),
    ("llama", rope("llama3", **{**LLAMA3, "high_freq_factor": 1.0}), "'high_freq_factor' is 1, wanted above"),
    ("llama", rope("llama3", factor=8.0), "low_freq_factor' is missing"),
    ("llama", rope("yarn", factor=4.0, attn_factor=1.0), "'attn_factor' is not implemented"),
    ("llama", rope("yarn", factor=4.0, truncate="no"), "'truncate' is 'no'"),
    ("llama", rope("yarn", factor=4.0, beta_fast=-1), "beta_fast' is -1"),
    ("llama", {**rope("yarn", factor=4.0, original_max_position_embeddings=8), "original_max_position_embeddings": 16},
     "'original_max_position_embeddings' is 16 and in the rope settings 8"),
    ("llama", rope("longrope", **{**LONG, "short_factor": [1.0] * 7}), "'short_factor' has 7 values, wanted a list"),
    ("llama", rope("longrope", short_factor=[1.0] * 8), "'long_factor' has None values"),
    ("llama", rope("longrope", **{**LONG, "long_factor": [0.0] * 8}), "'long_factor' is 0"),
    ("mistral", {"sliding_window": 0}, "'sliding_window' is 0"),
    ("mistral", {"sliding_window": "4096"}, "'sliding_window' is '4096'"),
    ("mistral", {"attention_bias": True}, "'attention_bias' is True"),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": -1}, "'max_window_layers' is -1"),
    ("qwen2", {"use_sliding_window": True, "layer_types": ["chunked_attention"] * 3}, "'chunked_attention'"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "'use_sliding_window' is not true"),
    ("qwen2", {"use_mrope": True}, "'use_mrope' is True"),
    ("gemma", {"hidden_activation": "relu"}, "'hidden_activation' is 'relu'"),
    ("gemma2", {"query_pre_attn_scalar": 0}, "'query_pre_attn_scalar' is 0"),
    ("gemma2", {"attn_logit_softcapping": -1}, "'attn_logit_softcapping' is -1"),
    ("gemma2", {"sliding_window": None}, "'sliding_window' is null"),
    ("gemma2", {"use_bidirectional_attention": True}, "'use_bidirectional_attention' is True"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "'attn_logit_softcapping' is 50"),
    ("gemma3", {"text_config": [1]}, r"'text_config' is \[1\]"),
    ("gemma3", {"rope_parameters": {"rope_type": "default"}}, "wanted one set per layer type"),
    ("gemma3", {"rope_parameters": {"full_attention": "linear"}}, "'full_attention' are no mapping"),
    ("gemma3", rope("su", factor=2.0), "rope_type is 'su'"),
    ("phi3", rope("linear", factor=2.0), "rope_type is 'linear'; Phi-3 knows default and longrope"),
    ("phi3", {"partial_rotary_factor": 0.05}, "turn 0 of 16"),
    ("phi3", {"partial_rotary_factor": 1.5}, r"'partial_rotary_factor' is 1\.5"),
    ("phi3", {"attention_bias": True}, "'attention_bias' is True"),
    ("gpt2", {"n_head": 7}, "hidden size 64 is not divisible by 'n_head', which is 7"),
    ("gpt2", {"add_cross_attention": True}, "'add_cross_attention' is True"),
    ("gpt2", {"activation_function": "tanh"}, "'activation_function' is 'tanh'"),
    ("gpt2", {"n_inner": 0}, "'n_inner' is 0"),
    ("gptneox", {"rotary_pct": 0.0}, r"'rotary_pct' is 0\.0"),
    ("gptneox", {"use_parallel_residual": 1}, "'use_parallel_residual' is 1, wanted true or false"),
    ("gptneox", {"rope_theta": 500.0}, r"'rope_theta' is 500\.0"),
    ("gptneox", {"partial_rotary_factor": 0.5}, r"'partial_rotary_factor' is 0\.5"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "change", "message"), REFUSED)
def test_what_is_absurd_or_not_implemented_is_refused_by_name(
    family: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        read(tiny_config(family, **change))
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 300


# Keys of transformers' classes that change nothing in what a decoder computes from given weights: training, caches,
# names of tokens, heads for other tasks. `pretraining_tp` and `reorder_and_upcast_attn` only order the same sums.
HARMLESS = frozenset(
    {"initializer_range", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "attention_dropout"}
    | {"pretraining_tp", "resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout", "classifier_dropout"}
    | {"summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"}
    | {"reorder_and_upcast_attn", "is_decoder"}
)
CLASSES = {
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "gemma": "GemmaConfig",
    "gemma2": "Gemma2Config",
    "gemma3": "Gemma3TextConfig",
    "phi3": "Phi3Config",
    "gpt2": "GPT2Config",
    "gptneox": "GPTNeoXConfig",
}


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_no_key_of_transformers_class_is_passed_over(family: str) -> None:
    """Nonsense in any key that the reference implementation of the family has must be noticed."""
    import transformers

    options: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 8} if family.startswith("qwen") else {}
    if family == "phi3":
        options = rope("longrope", **LONG)
    own = {
        name
        for base in getattr(transformers, CLASSES[family]).__mro__
        if base.__module__.startswith("transformers.models.")
        for name in vars(base).get("__annotations__", {})
        if not name.startswith("_") and name not in ("model_type", "default_theta", "base_model_tp_plan")
    }
    assert len(own) > 15, "the class's fields were not found"
    config = tiny_config(family, **options)
    read(config)
    for key in sorted(own - HARMLESS):
        changed = {name: value for name, value in config.items() if key != "rope_parameters" or name != "rope_scaling"}
        with pytest.raises(InputError, match=key.split("_")[0]):
            read({**changed, key: "nonsense"})


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_defaults_are_those_of_transformers(family: str) -> None:
    """Keys other than sizes are left out, then given with the default of transformers' class: both mean the same."""
    import transformers

    # heads that every family's default number of key-value heads divides
    sizes = {"hidden_size": 4096, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 32}
    sizes = {"n_embd": 64, "n_layer": 3, "n_head": 4} if family == "gpt2" else sizes
    full = json.loads(json.dumps(getattr(transformers, CLASSES[family])(vocab_size=99, **sizes).to_dict()))
    classes = {"architectures": tiny_config(family)["architectures"]}
    assert read({**full, **classes}) == read({"vocab_size": 99, **sizes, **classes})


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}),
        ("gemma2", {}),
        ("gemma3", {"num_hidden_layers": 14, "sliding_window_pattern": 6}),
    ],
)
def test_layers_slide_as_in_transformers_where_no_key_lists_them(family: str, options: dict[str, Any]) -> None:
    import transformers

    config = tiny_config(family, **options)
    kept = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
    kinds = getattr(transformers, CLASSES[family])(**kept).layer_types
    assert "layer_types" not in config
    assert read(config).sliding_layers == tuple(kind == "sliding_attention" for kind in kinds)


def test_null_and_absent_mean_what_they_mean_in_transformers() -> None:
    absent = tiny_config("mistral")
    del absent["sliding_window"]
    assert read(absent).sliding_window == 4096
    assert read(tiny_config("mistral", sliding_window=None)).sliding_window is None
    assert read(tiny_config("mistral", sliding_window=None)).sliding_layers == ()
    assert read(tiny_config("llama", num_key_value_heads=None)).kv_heads == 4
    assert read(tiny_config("gemma2", attn_logit_softcapping=None)).attention_softcap is None
    assert read(tiny_config("gpt2", n_inner=None)).intermediate == 256


@pytest.mark.parametrize("prefix", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_both_spellings_of_rotary_scaling_are_read(prefix: str, key: str) -> None:
    found = read(tiny_config("llama", **{prefix: {key: "linear", "factor": 3.0}, "rope_theta": 77.0})).rope
    assert found is not None
    assert (found.kind, found.theta, found.parameters["factor"]) == ("linear", 77.0, 3.0)


def test_published_gemma3_with_images_gives_its_text_model() -> None:
    """The text part of the 4B model's config.json, which leaves out what has its default value."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    hyper = read({"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text})
    assert (hyper.heads, hyper.kv_heads, hyper.head_dim, hyper.vocab, hyper.context) == (8, 4, 256, 262_208, 131_072)
    assert hyper.rope is not None
    assert hyper.rope_local is not None
    assert (hyper.rope.kind, hyper.rope.theta, hyper.rope_local.kind) == ("linear", 1e6, "default")
    assert hyper.rope_local.theta == 1e4
    assert [layer for layer, slides in enumerate(hyper.sliding_layers) if not slides] == [5, 11, 17, 23, 29]
    assert hyper.tied
    assert hyper.attention_scale == 256**-0.5
