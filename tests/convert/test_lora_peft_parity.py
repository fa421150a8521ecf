"""merge_lora against PEFT's merge_and_unload, variant by variant, from the same files."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest

from quantpress.convert.lora.merge import merge_lora
from quantpress.convert.open import open_checkpoint
from tests.convert.test_gguf_source import press
from tests.peft_oracle import Arrays, attach, differences, float64_of, merged, train
from tests.tiny import tiny_case, tiny_checkpoint

# PEFT adds sums of at most 16 products in float32 and rounds the result: weights here stay below 4, deltas below 4, so
# each of its roundings is at most 2^-23 (half a unit in the last place below 4), and errors of the 4 or so that matter
# are smaller than 1e-6 together. Ours are rounded once.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Case:
    """An adapter of a tiny model: `options` go to PEFT's class `kind`."""

    id: str
    options: Mapping[str, Any]
    base: str = "llama"
    kind: str = "LoraConfig"
    more: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.id


ALL = "all-linear"


def lora(name: str, base: str = "llama", **options: Any) -> Case:
    return Case(name, {"r": 4, "lora_alpha": 6, "target_modules": ALL, **options}, base)


def other(name: str, kind: str, **options: Any) -> Case:
    return Case(name, {"target_modules": ["q_proj", "v_proj", "down_proj"], **options}, kind=kind)


CONV = {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}
CASES = (
    lora("all-linear"),
    lora("one", target_modules=["k_proj"]),
    lora("regex", target_modules=r".*layers\.[12]\..*(k|down)_proj"),
    lora("exclude", exclude_modules=["v_proj", "up_proj"]),
    lora("layers", target_modules=["q_proj", "up_proj"], layers_to_transform=[0, 2], layers_pattern="layers"),
    lora("rslora", use_rslora=True),
    lora(
        "patterns",
        rank_pattern={"q_proj": 2, "layers.1.mlp.*": 3, r".*\.2\.self_attn\.(k|v)_proj": 5},
        alpha_pattern={"v_proj|down_proj": 1, "o_proj": 9, r"^model\.layers\.0.*up_proj": 2},
    ),
    lora("conv1d", "gpt2", **CONV),
    lora("conv1d-bare", "gpt2-bare", **CONV),
    lora("conv1d-unsaid", "gpt2", target_modules=["c_attn", "c_proj"]),
    lora("lora-bias", "llama-bias", lora_bias=True, lora_alpha=2),
    lora("conv1d-lora-bias", "gpt2", **CONV, lora_bias=True),
    lora("dora", use_dora=True),
    lora("dora-rslora", use_dora=True, use_rslora=True, rank_pattern={"q_proj": 2}),
    lora("dora-conv1d", "gpt2", **CONV, use_dora=True),
    lora("dora-embedding", target_modules=["embed_tokens"], use_dora=True),
    lora("embedding", target_modules=["embed_tokens", "q_proj"]),
    lora("positions", "gpt2-untied", target_modules=["wpe", "wte"]),
    lora("head", target_modules=["lm_head", "embed_tokens"]),
    lora("head-renamed", "gptneox", target_modules=["lm_head", "dense"]),
    lora("dora-head", target_modules=["lm_head"], use_dora=True),
    lora("saved", target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head", "norm", "mlp.up_proj"]),
    lora("saved-conv1d", "gpt2-untied", target_modules=["c_attn"], modules_to_save=["wte", "ln_f", "h.1.mlp.c_fc"]),
    lora("tokens", target_modules=["q_proj"], trainable_token_indices=[3, 200, 7]),
    lora("tokens-both", target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [9, 4], "lm_head": [5]}),
    lora("bias-all", "gptneox", target_modules=["dense"], bias="all"),
    lora("bias-lora_only", "llama-bias", target_modules=["q_proj", "down_proj"], bias="lora_only"),
    lora("parameters", target_modules=[], target_parameters=["self_attn.q_proj.weight", "up_proj.weight"]),
    lora("bare", "llama-bare", target_modules=["q_proj", "up_proj"]),
    lora("vision", "gemma3-vision", target_modules=r".*language_model.*(q_proj|up_proj)"),
    lora("vision-tower", "gemma3-vision", target_modules=["q_proj", "out_proj"]),
    lora("phi3", "phi3"),
    lora("qwen2", "qwen2", bias="all"),
    lora("adapted-by-hand", "qwen3", target_modules=["q_proj", "k_proj"], rank_pattern={"k_proj": 1}),
    # PEFT rounds the scale of LoHa to float32, which 6 / 3 does not show
    other("loha", "LoHaConfig", r=3, alpha=6, init_weights=False),
    other("loha-patterns", "LoHaConfig", r=3, alpha=5, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 1}),
    other("lokr", "LoKrConfig", r=3, alpha=5, init_weights=False),
    other("lokr-both", "LoKrConfig", r=2, alpha=3, decompose_both=True, decompose_factor=4, init_weights=False),
    other("lokr-factor", "LoKrConfig", r=2, alpha=3, decompose_factor=8, init_weights=False),
    other("lokr-whole", "LoKrConfig", r=64, alpha=70, init_weights=False),
    other("adalora", "AdaLoraConfig", init_r=6, target_r=3, lora_alpha=5, total_step=10),
)


def make(tmp_path: Path, case: Case, dtype: str = "float32") -> tuple[Path, Path]:
    """Makes base and adapter."""
    tiny = tiny_case(case.base)
    base = tiny_checkpoint(tmp_path / "base", tiny.family, dtype=dtype, **{"num_hidden_layers": 3, **tiny.options})
    config = getattr(peft, case.kind)(task_type="CAUSAL_LM", **copy.deepcopy(dict(case.options)))
    return base, train(tmp_path / "adapter", base, config)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_float32_merge_equals_pefts(case: Case, tmp_path: Path) -> None:
    base, adapter = make(tmp_path, case)
    ours = float64_of(merge_lora(open_checkpoint(base), adapter))
    theirs = _as_saved(case, merged(tmp_path / "merged", attach(base, adapter)))
    assert max(differences(ours, theirs).values()) <= TOLERANCE
    changed = differences(ours, float64_of(open_checkpoint(base)))
    assert max(changed.values()) > 1e-3


def _as_saved(case: Case, tensors: Arrays) -> Arrays:
    """transformers gives the tensors of a bare model the prefix of the whole one."""
    prefix = {"gpt2-bare": "transformer.", "llama-bare": "model."}.get(case.base, "")
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


IN_BFLOAT16 = frozenset(
    {
        "all-linear",
        "patterns",
        "conv1d",
        "lora-bias",
        "dora",
        "dora-conv1d",
        "dora-embedding",
        "embedding",
        "head",
        "saved",
        "tokens-both",
        "bias-all",
        "parameters",
        "loha",
        "lokr",
        "adalora",
    }
)


@pytest.mark.parametrize("case", [case for case in CASES if case.id in IN_BFLOAT16], ids=str)
def test_a_bfloat16_merge_is_the_float64_result_rounded_once(case: Case, tmp_path: Path) -> None:
    base, adapter = make(tmp_path, case, "bfloat16")
    checkpoint = merge_lora(open_checkpoint(base), adapter)
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {"BF16"}
    ours = float64_of(checkpoint)
    exact = merged(tmp_path / "exact", attach(base, adapter, dtype="float64"))
    theirs = merged(tmp_path / "merged", attach(base, adapter))
    assert set(ours) == set(exact) == set(theirs)
    for name, value in exact.items():
        # PEFT's float64 and ours add up in different orders, which differs by 1e-12 at most.
        further = np.abs(ours[name] - value) > np.abs(theirs[name] - value) + 1e-12
        assert not further.any(), f"{name}: {np.count_nonzero(further)} values are further from float64 than PEFT's"
        # bfloat16 has 8 bits of significand: half a unit in the last place of x is 2^(exponent - 8)
        half = np.ldexp(1.0, np.frexp(value)[1] - 1 - 8)
        assert (np.abs(ours[name] - value) <= half + 1e-12).all(), name


SEVERAL = (
    ("lora-lora", {}, {"r": 2, "use_rslora": True}),
    ("lora-dora", {}, {"use_dora": True}),
    ("dora-dora", {"use_dora": True, "r": 3}, {"use_dora": True}),
    ("other-modules", {"target_modules": ["q_proj"]}, {"target_modules": ["up_proj", "q_proj", "lm_head"]}),
    ("saved", {"modules_to_save": ["norm"]}, {"target_modules": ["k_proj"]}),
)


@pytest.mark.parametrize(("first", "second"), [pytest.param(*each[1:], id=each[0]) for each in SEVERAL])
def test_several_adapters_with_weights_equal_pefts(
    first: Mapping[str, Any], second: Mapping[str, Any], tmp_path: Path
) -> None:
    base = tiny_checkpoint(tmp_path / "base", "llama")
    weights, folders, checkpoint = (0.5, -1.25), [tmp_path / "one", tmp_path / "two"], open_checkpoint(base)
    for number, options in enumerate((first, second)):
        config = peft.LoraConfig(
            **{"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"], **options}, task_type="CAUSAL_LM"
        )
        train(folders[number], base, config, seed=number)
        checkpoint = merge_lora(checkpoint, folders[number], weights[number])
    model = attach(base, *folders)
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            for number, weight in enumerate(weights):
                module.set_scale(f"a{number}", weight)
    theirs = merged(tmp_path / "merged", model)
    assert max(differences(float64_of(checkpoint), theirs).values()) <= TOLERANCE
    assert max(differences(theirs, float64_of(open_checkpoint(base))).values()) > 1e-2


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptneox", "gemma3"])
def test_a_gguf_base_merges_like_the_folder_it_was_made_from(family: str, tmp_path: Path) -> None:
    base = open_checkpoint(tiny_checkpoint(tmp_path / "base", family))
    targets = {"gpt2": ["c_attn", "c_proj"], "gptneox": ["query_key_value", "dense"]}
    config = peft.LoraConfig(
        r=4, target_modules=targets.get(family, ["q_proj", "k_proj", "lm_head"]), task_type="CAUSAL_LM", use_dora=True
    )
    adapter = train(tmp_path / "adapter", tmp_path / "base", config)
    press(tmp_path / "base.gguf", base, "f32")
    source = open_checkpoint(tmp_path / "base.gguf")
    merged_here = merge_lora(source, adapter)
    assert merged_here.adapted is not None
    assert not merged_here.storage_types.keys() & merged_here.adapted.changed.keys()
    # Gemma's norms are stored plus one, which rounds them
    ours, wanted = float64_of(merged_here), float64_of(merge_lora(base, adapter))
    assert max(differences(ours, wanted).values()) <= TOLERANCE
    changed = merged_here.adapted.changed
    assert all(np.array_equal(ours[name], wanted[name]) for name in changed)
