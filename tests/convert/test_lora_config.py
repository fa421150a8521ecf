"""adapter_config.json: every rule of PEFT's against PEFT itself, over random configurations and paths."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, LoHaConfig, LoKrConfig, LoraConfig, TrainableTokensConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from quantpress.convert.lora.config import AdapterConfig
from quantpress.convert.lora.config_file import read_config
from quantpress.quant.errors import InputError

# warnings of PEFT about configurations are not the matter here
pytestmark = pytest.mark.filterwarnings("ignore:.*")

BASE = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


def parse(**values: Any) -> AdapterConfig:
    return read_config(json.dumps({**BASE, **values}).encode(), name="adapter_config.json")


def saved(config: Any, folder: Path) -> AdapterConfig:
    config.save_pretrained(folder)
    return read_config((folder / "adapter_config.json").read_bytes(), name="adapter_config.json")


SEGMENTS = ("model", "layers", "layer", "h", "0", "1", "12", "self_attn", "q_proj", "v_proj", "xq_proj", "lm_head", "a")
paths = st.lists(st.sampled_from(SEGMENTS), min_size=1, max_size=7).map(".".join)
ends = st.lists(st.sampled_from(SEGMENTS), min_size=1, max_size=3).map(".".join)
PATTERNS = (
    r"layers\.0\..*",
    r"^model\.layers.0.self_attn",
    r"q_proj|v_proj",
    r".*\.(q|v)_proj",
    r"[^.]*_proj",
    r"^(?!.*layers\.1).*proj",
    r"model\.layers\.(0|12)\.self_attn\.\w+",
    r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.self_attn\.q_proj)",
    r"layers\.\d+",
    r".*",
    r"q.proj",
)
keys = st.one_of(ends, st.sampled_from(PATTERNS))


@given(st.lists(keys, unique=True, max_size=6), paths)
@settings(max_examples=250, deadline=None)
def test_patterns_name_the_rank_and_alpha_that_peft_takes(patterns: list[str], path: str) -> None:
    values = {pattern: index + 1 for index, pattern in enumerate(patterns)}
    config = parse(rank_pattern=values, alpha_pattern=values, r=100, lora_alpha=200)
    key = get_pattern_key(values, path)
    assert config.rank_of(path) == values.get(key, 100)
    assert config.alpha_of(path) == values.get(key, 200)


@st.composite
def selections(draw: st.DrawFn) -> dict[str, Any]:
    names = st.lists(ends, max_size=4, unique=True)
    whole = st.lists(st.one_of(st.sampled_from(SEGMENTS), st.just("self_attn.q_proj")), max_size=2, unique=True)
    values: dict[str, Any] = {
        "target_modules": draw(st.one_of(names, st.sampled_from(PATTERNS))),
        "exclude_modules": draw(st.one_of(st.none(), names, st.sampled_from(PATTERNS))),
        "modules_to_save": draw(st.one_of(st.none(), whole)),
    }
    if isinstance(values["target_modules"], list):
        layers = st.one_of(st.integers(0, 12), st.lists(st.sampled_from([0, 1, 12]), max_size=2))
        values["layers_to_transform"] = draw(st.one_of(st.none(), layers))
        if values["layers_to_transform"] is not None:
            lists = st.sampled_from(["layers", "h", "layer"])
            values["layers_pattern"] = draw(st.one_of(st.none(), lists, st.lists(lists, max_size=2), st.just("")))
    return values


@given(selections(), paths)
@settings(max_examples=500, deadline=None)
def test_targets_are_the_modules_that_peft_would_adapt(values: dict[str, Any], path: str) -> None:
    theirs = LoraConfig(**values)
    assert parse(**values).targets(path) == bool(check_target_module_exists(theirs, path))


@given(selections(), paths)
@settings(max_examples=200, deadline=None)
def test_a_config_that_peft_saved_means_what_peft_meant(values: dict[str, Any], path: str) -> None:
    theirs = LoraConfig(**values, r=6, lora_alpha=3, use_rslora=True)
    text = json.dumps(
        {key: list(value) if isinstance(value, set) else value for key, value in theirs.to_dict().items()}
    )
    ours = read_config(text.encode(), name="c")
    assert ours.targets(path) == bool(check_target_module_exists(theirs, path))
    assert ours.scale_of(path) == pytest.approx(3 / 6**0.5, rel=1e-15)


def test_all_linear_leaves_the_choice_to_who_has_the_model() -> None:
    config = parse(target_modules="all-linear", exclude_modules=["v_proj"], modules_to_save=["lm_head"])
    assert config.all_linear
    assert config.targets("model.norm")
    assert not config.targets("model.layers.0.v_proj")
    assert not config.targets("lm_head")


def test_target_parameters_alone_target_no_module() -> None:
    config = parse(target_modules=None, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    assert not config.targets("model.layers.0.mlp.experts")
    assert config.parameters_of("model.layers.0.mlp.experts") == ("down_proj", "gate_up_proj")
    assert config.parameters_of("model.layers.0.xmlp.experts") == ()


@pytest.mark.parametrize("factory", [LoraConfig, LoHaConfig, LoKrConfig])
def test_defaults_are_those_of_peft(factory: Any, tmp_path: Path) -> None:
    theirs = factory()
    for ours in (
        saved(theirs, tmp_path),
        read_config(json.dumps({"peft_type": theirs.peft_type.value}).encode(), name="c"),
    ):
        assert ours.kind == theirs.peft_type.value
        assert ours.rank == theirs.r
        assert ours.alpha == getattr(theirs, "lora_alpha", None) or theirs.alpha
        assert ours.bias == getattr(theirs, "bias", "none")
        assert (ours.rslora, ours.dora, ours.lora_bias, ours.fan_in_fan_out) == (False,) * 4
        assert ours.target_modules is None


def test_adalora_starts_with_init_r_and_keeps_the_scale_when_directions_are_dropped(tmp_path: Path) -> None:
    theirs = AdaLoraConfig(init_r=6, lora_alpha=12, total_step=10, target_modules=["q_proj"])
    theirs.rank_pattern = {
        "model.layers.0.q_proj.lora_E": [True, False, True, False, False, False],
        "base_model.model.model.layers.1.q_proj.lora_E.default": [False] * 6,
    }
    ours = saved(theirs, tmp_path)
    assert ours.rank == 6
    assert ours.rank_of("model.layers.0.q_proj") == 2
    assert ours.rank_of("model.layers.1.q_proj") == 0
    assert ours.rank_of("model.layers.2.q_proj") == 6
    assert ours.scale_of("model.layers.0.q_proj") == pytest.approx(12 / (6 + 1e-5), rel=1e-15)
    unscaled = parse(peft_type="ADALORA", init_r=6, lora_alpha=0)
    assert unscaled.alpha_of("q_proj") == 6


def test_tokens_of_a_list_are_those_of_the_embedding_whatever_its_name(tmp_path: Path) -> None:
    assert parse(trainable_token_indices=[5, 3]).tokens_of("transformer.wte") == (5, 3)
    named = parse(trainable_token_indices={"embed_tokens": [5, 3]})
    assert named.tokens_of("model.embed_tokens") == (5, 3)
    assert named.tokens_of("lm_head") is None
    alone = saved(TrainableTokensConfig(token_indices=[7], target_modules=["embed_tokens"]), tmp_path)
    assert alone.kind == "TRAINABLE_TOKENS"
    assert alone.tokens_of("model.embed_tokens") == (7,)


def test_modules_to_save_are_ends_of_paths_without_a_dot() -> None:
    config = parse(modules_to_save=["head", "classifier"])
    assert config.saves("lm_head")  # PEFT: key.endswith("head")
    assert config.saves("model.classifier.dense")
    assert not config.saves("model.head_norm")
    assert parse(task_type="SEQ_CLS").saves("score")
    assert not parse(task_type="CAUSAL_LM").saves("score")


def test_a_configuration_of_the_first_peft_versions_is_read() -> None:
    old = {
        "base_model_name_or_path": "decapoda-research/llama-7b-hf",
        "bias": "none",
        "enable_lora": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "merge_weights": False,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 8,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    config = read_config(json.dumps(old).encode(), name="c")
    assert config.scale_of("model.layers.0.self_attn.q_proj") == 2
    assert config.modules_to_save == ()


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal", "mica", "MiCA"])
def test_starts_that_leave_the_base_alone_pass(start: Any) -> None:
    assert parse(init_lora_weights=start).rank == 4


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga", "newest"])
def test_starts_that_change_the_base_are_refused(start: str) -> None:
    with pytest.raises(InputError, match=r"^adapter_config.json: init_lora_weights .*base"):
        parse(init_lora_weights=start)


@pytest.mark.parametrize(
    "values",
    [
        {"alora_invocation_tokens": [1, 2]},
        {"arrow_config": {"top_k": 2}},
        {"use_qalora": True},
        {"kasa_config": {"beta": 1e-4}},
        {"use_bdlora": {"nblocks": 2}},
        {"layer_replication": [[0, 4], [2, 5]]},
        {"megatron_config": {"tensor_model_parallel_size": 1}},
        {"enable_lora": [True, False, True]},
        {"use_next_year": True},
        {"next_year_config": {"a": 1}},
    ],
    ids=lambda values: next(iter(values)),
)
def test_variants_that_do_not_merge_plainly_are_refused_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"^adapter_config.json: '?{next(iter(values))}'? is set"):
        parse(**values)


def test_variants_that_differ_in_training_only_pass() -> None:
    assert parse(velora_config={"num_groups": 64}, monteclora_config={"num_samples": 8}, eva_config={"rho": 2.0})
    assert parse(alora_invocation_tokens=None, use_qalora=False, loftq_config={}, megatron_core="megatron.core")
    assert parse(next_year="something").rank == 4


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("PROMPT_TUNING", "inputs"),
        ("PREFIX_TUNING", "inputs"),
        ("XLORA", "each token"),
        ("IA3", "merge_and_unload"),
        ("VERA", "merge_and_unload"),
        (7, "text"),
    ],
)
def test_other_kinds_of_adapters_are_refused_with_what_to_do(kind: Any, reason: str) -> None:
    with pytest.raises(InputError, match=rf"^adapter_config.json: peft_type.*{reason}"):
        parse(peft_type=kind)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{}", "no peft_type"),
        ('{"fine_tune_type": "lora", "num_layers": 4}', "MLX"),
        ("[]", "JSON object"),
        ('{"peft_type": "LORA", "r": 8, "r": 9}', "twice"),
        ('{"peft_type": "LORA", "lora_alpha": NaN}', "NaN"),
        ("[" * 100_000, "deeper"),
    ],
)
def test_what_is_no_configuration_is_refused(text: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        read_config(text.encode(), name="adapter_config.json")


@pytest.mark.parametrize(
    "values",
    [
        {"r": 0},
        {"r": -1},
        {"r": 8.0},
        {"r": True},
        {"r": "8"},
        {"r": 1 << 40},
        {"lora_alpha": "16"},
        {"lora_alpha": True},
        {"lora_alpha": [16]},
        {"use_rslora": 1},
        {"use_dora": "yes"},
        {"bias": "some"},
        {"bias": True},
        {"target_modules": {"q_proj": 1}},
        {"target_modules": ["q_proj", 3]},
        {"target_modules": [""]},
        {"target_modules": "("},
        {"target_modules": "a{5,2}"},
        {"target_modules": r"(a)\1"},
        {"exclude_modules": "*"},
        {"modules_to_save": "lm_head"},
        {"modules_to_save": [f"m{index}" for index in range(1001)]},
        {"rank_pattern": ["q_proj"]},
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": {"(": 4}},
        {"alpha_pattern": {"q_proj": None}},
        {"layers_to_transform": "3"},
        {"layers_to_transform": [1.5]},
        {"layers_pattern": "layers"},
        {"layers_pattern": ["lay(ers)"], "layers_to_transform": 3},
        {"layers_to_transform": 1, "target_modules": "all-linear"},
        {"trainable_token_indices": {"embed_tokens": 4}},
        {"trainable_token_indices": [-1]},
        {"trainable_token_indices": [3, 4, 3]},
        {"trainable_token_indices": "all"},
        {"target_parameters": "experts.gate_up_proj"},
        {"base_model_name_or_path": 3},
        {"init_lora_weights": 1.5},
        {"peft_type": "ADALORA", "use_dora": True},
        {"peft_type": "ADALORA", "init_r": 4, "rank_pattern": {"q_proj.lora_E": [True] * 3}},
        {"peft_type": "ADALORA", "init_r": 1, "rank_pattern": {"q_proj.lora_E": [1]}},
        {"peft_type": "ADALORA", "init_r": 1, "rank_pattern": {"q_proj": [True]}},
        {"peft_type": "TRAINABLE_TOKENS", "token_indices": {"a": 1}},
    ],
    ids=lambda values: json.dumps(values)[:60],
)
def test_values_of_wrong_types_are_refused_with_file_and_key(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"^adapter_config.json: ") as caught:
        parse(**values)
    message = str(caught.value)
    assert any(key in message for key in values)
    assert "\n" not in message


def test_reading_a_configuration_needs_neither_torch_nor_peft() -> None:
    code = (
        "import sys; import quantpress.convert.lora.adapter, quantpress.convert.lora.description\n"
        "print([name for name in ('torch', 'peft', 'transformers', 'scipy', 'numba') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
