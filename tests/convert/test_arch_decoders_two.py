"""OLMo, Command-R, Granite, MiniCPM, SmolLM3, GLM and more: what a config.json may say, what comes back from GGUF."""

from __future__ import annotations

import json
from typing import Any

import pytest

from quantpress.convert.arch.registry import find_arch, find_gguf_arch
from quantpress.convert.arch.spec import Hyperparameters, Role
from quantpress.quant.errors import InputError
from tests.families.cases import SIZES

CLASSES = {
    "olmo": "OlmoForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "cohere": "CohereForCausalLM",
    "cohere2": "Cohere2ForCausalLM",
    "granite": "GraniteForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "glm": "GlmForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "exaone4": "Exaone4ForCausalLM",
    "seed_oss": "SeedOssForCausalLM",
    "ernie4_5": "Ernie4_5ForCausalLM",
    "arcee": "ArceeForCausalLM",
    "nemotron": "NemotronForCausalLM",
}
FAMILIES = pytest.mark.parametrize("family", CLASSES)
# training, caches, names of tokens
HARMLESS = frozenset(
    {"initializer_range", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "attention_dropout"}
    | {"pretraining_tp", "residual_dropout"}
)


def config_class(family: str) -> Any:
    import transformers

    return getattr(transformers, CLASSES[family].replace("ForCausalLM", "Config"))


def small(family: str, **options: Any) -> dict[str, Any]:
    sizes = {**SIZES, "head_dim": 16} if family in ("glm", "glm4", "seed_oss", "ernie4_5") else dict(SIZES)
    return {"architectures": [CLASSES.get(family, "MiniCPMForCausalLM")], "model_type": family, **sizes, **options}


def read(config: dict[str, Any]) -> Hyperparameters:
    return find_arch(config).read_config(config)


@FAMILIES
def test_no_key_of_transformers_class_is_passed_over(family: str) -> None:
    own = {
        name
        for base in config_class(family).__mro__
        if base.__module__.startswith("transformers.models.")
        for name in vars(base).get("__annotations__", {})
        if not name.startswith("_") and name not in ("model_type", "default_theta", "base_model_tp_plan")
    }
    assert len(own) > 15, "the class's fields were not found"
    options = {"use_sliding_window": True, "sliding_window": 8, "num_hidden_layers": 4} if family == "smollm3" else {}
    config = small(family, **options)
    read(config)
    for key in sorted(own - HARMLESS):
        with pytest.raises(InputError, match=key.split("_")[0]):
            read({**config, key: "nonsense"})


@FAMILIES
def test_defaults_are_those_of_transformers(family: str) -> None:
    sizes = {"hidden_size": 4096, "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 32}
    full = json.loads(json.dumps(config_class(family)(vocab_size=99, **sizes).to_dict()))
    classes = {"architectures": [CLASSES[family]]}
    assert read({**full, **classes}) == read({"vocab_size": 99, **sizes, **classes})


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("olmo", {"clip_qkv": 0}, "'clip_qkv' is 0"),
    ("olmo", {"mlp_bias": True}, "'mlp_bias' is True"),
    ("olmo2", {"sliding_window": 8}, "'sliding_window' is 8"),
    ("olmo3", {"sliding_window": None}, "'sliding_window' is null, but layers slide"),
    ("olmo3", {"rope_parameters": {"rope_type": "default"}}, "wanted one set per layer type"),
    ("olmo3", {"rope_parameters": {"full_attention": "yarn"}}, "'full_attention' are no mapping"),
    ("olmo3", {"partial_rotary_factor": 0.5}, r"'partial_rotary_factor' is 0\.5"),
    ("cohere", {"logit_scale": 0.0}, "'logit_scale' is 0"),
    ("cohere", {"use_qk_norm": 1}, "'use_qk_norm' is 1, wanted true or false"),
    ("cohere2", {"rotary_pct": 0.5}, r"'rotary_pct' is 0\.5"),
    ("cohere2", {"sliding_window_pattern": 0}, "'sliding_window_pattern' is 0"),
    ("granite", {"logits_scaling": 0}, "'logits_scaling' is 0"),
    ("granite", {"num_local_experts": 8}, "'num_local_experts' is 8"),
    ("minicpm", {"sparse_config": {"kernel_size": 32}}, "'sparse_config' is"),
    ("minicpm", {"num_experts": 8}, "'num_experts' is 8"),
    ("minicpm", {"dim_model_base": 0}, "'dim_model_base' is 0"),
    ("smollm3", {"no_rope_layers": [1, 1]}, "wanted a 0 or 1 for 3 layers"),
    ("smollm3", {"no_rope_layers": [1, 2, 1]}, "wanted a 0 or 1 for 3 layers"),
    ("smollm3", {"layer_types": ["sliding_attention"] * 3}, "'layer_types' has sliding layers, but"),
    ("glm", {"partial_rotary_factor": 1.5}, r"'partial_rotary_factor' is 1\.5"),
    ("glm4", {"num_nextn_predict_layers": 1}, "'num_nextn_predict_layers' is 1"),
    ("exaone4", {"sliding_window_pattern": "LXG"}, "'sliding_window_pattern' is 'LXG'"),
    ("exaone4", {"sliding_window": None, "layer_types": ["sliding_attention"] * 3}, "'sliding_window' is null, but"),
    ("seed_oss", {"attention_out_bias": 1}, "'attention_out_bias' is 1"),
    ("ernie4_5", {"attention_bias": True}, "'attention_bias' is True"),
    ("arcee", {"hidden_act": "xielu"}, "'hidden_act' is 'xielu'"),
    ("nemotron", {"norm_eps": 0.0}, "'norm_eps' is 0"),
    ("glm4", {"rope_scaling": {"rope_type": "default", "mrope_section": [8, 12, 12]}}, "'mrope_section'"),
]


@pytest.mark.parametrize(("family", "options", "message"), REFUSED)
def test_what_is_absurd_or_not_implemented_is_refused_by_name(
    family: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read(small(family, **options))


_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
KEPT: list[tuple[str, dict[str, Any]]] = [
    ("olmo", {"clip_qkv": 8.0, "rope_scaling": _YARN}),
    ("olmo2", {"rms_norm_eps": 1e-6, "rope_theta": 500000.0}),
    ("olmo3", {"rope_scaling": _YARN, "num_hidden_layers": 6, "sliding_window": 8}),
    ("olmo3", {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}),
    ("cohere", {"logit_scale": 0.8333333, "rope_theta": 75000000.0}),
    ("cohere", {"use_qk_norm": True, "num_hidden_layers": 64}),
    ("cohere2", {"num_hidden_layers": 6, "sliding_window": 8}),
    ("cohere2", {"sliding_window_pattern": 2}),
    ("granite", {"embedding_multiplier": 12.0, "logits_scaling": 16.0, "residual_multiplier": 0.22,
                 "attention_multiplier": 0.015625, "attention_bias": True}),
    ("smollm3", {"num_hidden_layers": 9, "tie_word_embeddings": False}),
    ("glm", {"rope_theta": 2000000.0, "attention_bias": False}),
    ("glm4", {"rope_scaling": _YARN, "partial_rotary_factor": 0.75}),
    ("exaone4", {"sliding_window": None, "sliding_window_pattern": "LLLG", "rope_theta": 1000000.0}),
    ("exaone4", {"sliding_window": 8, "sliding_window_pattern": "LLG", "num_hidden_layers": 64}),
    ("seed_oss", {"head_dim": 32, "attention_bias": False}),
    ("ernie4_5", {"tie_word_embeddings": False}),
    ("arcee", {"rope_scaling": _YARN}),
    ("nemotron", {"norm_eps": 1e-3, "attention_bias": True, "mlp_bias": True, "partial_rotary_factor": 0.75}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "options"), KEPT)
def test_a_gguf_file_says_what_its_config_said(family: str, options: dict[str, Any]) -> None:
    """The numbers are such that float32 keeps their shortest decimals."""
    config = small(family, **options)
    spec, hyper = find_arch(config), read(config)
    spec.gguf_check(hyper, config)
    metadata = {f"{spec.gguf}.{key}": value for key, (_, value) in spec.gguf_metadata(hyper, config).items()}
    names = {row.gguf.format(layer=layer) for row, layer in spec.rows(hyper)}
    if hyper.tied and spec.gguf_head != "required":
        names -= {row.gguf for row in spec.tensors if row.role is Role.HEAD}
    metadata["general.architecture"] = spec.gguf
    again = find_gguf_arch(spec.gguf, metadata).config_from_gguf(metadata, frozenset(names), {})
    assert find_arch(again) is spec
    assert read(again) == hyper


def test_minicpm_comes_back_from_gguf_as_a_granite_with_its_factors() -> None:
    config = small("minicpm", scale_emb=12, scale_depth=1.4, dim_model_base=16, num_hidden_layers=4)
    spec, hyper = find_arch(config), read(config)
    assert (hyper.embedding_scale, hyper.residual_scale, hyper.logit_scale) == (12.0, 0.7, 0.25)
    metadata = {f"minicpm.{key}": value for key, (_, value) in spec.gguf_metadata(hyper, config).items()}
    metadata["general.architecture"] = "minicpm"
    assert metadata["minicpm.logit_scale"] == 4.0  # llama.cpp divides by it
    names = frozenset(row.gguf for row in spec.tensors if row.role is not Role.HEAD)
    assert read(spec.config_from_gguf(metadata, names, {})) == hyper
    for key in ("embedding_scale", "residual_scale", "logit_scale"):
        del metadata[f"minicpm.{key}"]
    old = read(spec.config_from_gguf(metadata, names, {}))  # files from before these keys: MiniCPM-2B's factors
    assert (old.embedding_scale, old.residual_scale) == (12.0, 0.7)


# from the published config.json; sizes and what is not usual
PUBLISHED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (
        {"architectures": ["CohereForCausalLM"], "model_type": "cohere", "attention_bias": False, "hidden_act": "silu",
         "hidden_size": 12288, "intermediate_size": 33792, "layer_norm_eps": 1e-05, "logit_scale": 0.8333333333333334,
         "max_position_embeddings": 8192, "model_max_length": 131072, "num_attention_heads": 96,
         "num_hidden_layers": 64, "num_key_value_heads": 8, "rope_theta": 75000000.0, "use_qk_norm": True,
         "vocab_size": 256000, "tie_word_embeddings": True},
        {"context_length": 131072, "attention.head_count_kv": 8, "rope.freq_base": 75000000.0},
    ),
    (
        {"architectures": ["Cohere2ForCausalLM"], "model_type": "cohere2", "attention_bias": False, "head_dim": 128,
         "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "layer_norm_eps": 1e-05,
         "layer_switch": 4, "logit_scale": 0.25, "max_position_embeddings": 8192, "num_attention_heads": 32,
         "num_hidden_layers": 32, "num_key_value_heads": 8, "order_of_interleaved_layers": "local_attn_first",
         "position_embedding_type": "rope_gptj", "rope_scaling": None, "rope_theta": 50000, "rotary_pct": 1.0,
         "sliding_window": 4096, "sliding_window_pattern": 4, "use_embedding_sharing": True,
         "use_gated_activation": True, "use_parallel_block": True, "use_parallel_embedding": False,
         "use_qk_norm": False, "vocab_size": 256000},
        {"attention.sliding_window": 4096, "attention.sliding_window_pattern": [True, True, True, False] * 8},
    ),
    (
        {"architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "attention_bias": False, "hidden_act": "silu",
         "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 65536,
         "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-06,
         "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8, "sliding_window": 4096,
         "rope_scaling": {"attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
                          "original_max_position_embeddings": 8192, "rope_type": "yarn"},
         "rope_theta": 500000, "tie_word_embeddings": False, "vocab_size": 100278},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0, "rope.scaling.original_context_length": 8192},
    ),
    (
        {"architectures": ["GraniteForCausalLM"], "model_type": "granite", "attention_bias": False,
         "attention_multiplier": 0.0078125, "embedding_multiplier": 12.0, "hidden_act": "silu", "hidden_size": 4096,
         "intermediate_size": 12800, "logits_scaling": 16.0, "max_position_embeddings": 131072, "mlp_bias": False,
         "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8, "residual_multiplier": 0.22,
         "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000000.0, "tie_word_embeddings": True,
         "vocab_size": 49155},
        {"attention.scale": 0.0078125, "logit_scale": 16.0, "embedding_scale": 12.0, "residual_scale": 0.22},
    ),
    (
        {"architectures": ["Glm4ForCausalLM"], "model_type": "glm4", "attention_bias": False, "head_dim": 128,
         "hidden_act": "silu", "hidden_size": 6144, "intermediate_size": 23040, "max_position_embeddings": 32768,
         "num_attention_heads": 48, "num_hidden_layers": 61, "num_key_value_heads": 2, "rms_norm_eps": 1e-05,
         "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "tie_word_embeddings": False, "vocab_size": 151552},
        {"rope.dimension_count": 64, "attention.key_length": 128, "attention.head_count_kv": 2},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("config", "wanted"), PUBLISHED, ids=lambda each: each.get("model_type", ""))
def test_published_configurations_are_read(config: dict[str, Any], wanted: dict[str, Any]) -> None:
    spec, hyper = find_arch(config), read(config)
    spec.gguf_check(hyper, config)
    metadata = {key: value for key, (_, value) in spec.gguf_metadata(hyper, config).items()}
    assert {key: metadata.get(key) for key in wanted} == wanted
    if spec.family == "olmo3":  # YaRN's own magnitude is no further factor, and sliding layers have none of it
        assert metadata.get("rope.scaling.attn_factor", 1.0) == pytest.approx(1.0, rel=1e-7)
        assert hyper.rope_local is not None
        assert hyper.rope_local.kind == "default"


def test_scaled_positions_keep_the_length_that_the_cohere_config_states() -> None:
    config = small("cohere", model_max_length=4096, rope_scaling=_YARN)
    metadata = find_arch(config).gguf_metadata(read(config), config)
    assert metadata["context_length"] == ("uint32", 64)
