"""The account of an adapter: complete, with norms of a float64 formula, and what reading finds out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from quantpress.convert.lora.ledger import Adapted
from quantpress.convert.lora.merge import merge_lora
from quantpress.convert.open import open_checkpoint
from quantpress.quant.errors import InputError
from tests.peft_oracle import float64_of, quiet, train
from tests.tiny import tiny_checkpoint

EVERYTHING: tuple[tuple[str, Mapping[str, Any], Mapping[str, Any]], ...] = (
    ("llama", {}, {"target_modules": "all-linear", "use_dora": True, "modules_to_save": ["norm", "embed_tokens"]}),
    ("llama", {"attention_bias": True}, {"target_modules": ["q_proj"], "lora_bias": True}),
    ("llama", {"tie_word_embeddings": True}, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    ("llama", {"tie_word_embeddings": True}, {"target_modules": ["embed_tokens", "lm_head"]}),
    ("gpt2", {}, {"target_modules": ["c_attn", "wte"], "use_rslora": True, "rank_pattern": {"wte": 9}}),
    ("qwen2", {}, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]}),
)


def merged(folder: Path, family: str, options: Mapping[str, Any], **config: Any) -> tuple[Adapted, Path, Path]:
    """Makes base and adapter and merges them."""
    base = tiny_checkpoint(folder / "base", family, **options)
    with quiet():
        settings = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **config)
    adapter = train(folder / "adapter", base, settings)
    adapted = merge_lora(open_checkpoint(base), adapter).adapted
    assert adapted is not None
    return adapted, base, adapter


@pytest.mark.parametrize(("family", "options", "config"), EVERYTHING)
def test_every_tensor_of_the_file_has_one_entry_with_the_norm_of_what_it_did(
    tmp_path: Path, family: str, options: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    adapted, base, adapter = merged(tmp_path, family, options, **config)
    entries = adapted.ledger()
    stored = load_file(adapter / "adapter_model.safetensors")
    assert sorted(entry.name for entry in entries) == sorted(stored)
    before, after = float64_of(open_checkpoint(base)), float64_of(merge_lora(open_checkpoint(base), adapter))
    for entry in entries:
        assert (entry.adapter, entry.weight, entry.dtype) == ("adapter", 1.0, "F32")
        assert entry.shape == stored[entry.name].shape
        target = entry.target.removesuffix(" and 1 more")
        # one adapter, and one thing done to each target, but for embeddings that are copied and then added to
        old = before.get(target, before.get("model.embed_tokens.weight"))
        assert old is not None
        norm = np.linalg.norm(after[target] - old) / np.linalg.norm(old)
        copied = "base_layer.weight" in entry.name
        # the merged tensor is rounded to float32, each value by up to 2^-24 of itself
        assert entry.delta_norm == pytest.approx(0.0 if copied else norm, rel=1e-5, abs=1e-7), entry
        assert (entry.scale is None) == (
            entry.kind in ("whole", "tokens") or entry.name.endswith(("_proj.bias", "r.bias"))
        )
    assert adapted.ledger() == entries


def test_an_entry_says_how_its_delta_was_made_and_rounds_nothing(tmp_path: Path) -> None:
    config = {"use_rslora": True, "rank_pattern": {"k_proj": 9}, "alpha_pattern": {"k_proj": 5}}
    adapted, _, _ = merged(tmp_path, "llama", {}, target_modules=["q_proj", "k_proj"], **config)
    entry = next(entry for entry in adapted.ledger() if "1.self_attn.k_proj.lora_B" in entry.name)
    assert (entry.rank, entry.alpha, entry.scale, entry.kind) == (9, 5, 5 / 3, "lora")
    assert entry.target == "model.layers.1.self_attn.k_proj.weight"
    said = json.loads(json.dumps(entry.to_json()))
    assert said["delta_norm"] == entry.delta_norm
    assert said["shape"] == [32, 9]
    assert set(said) == set(entry.__slots__)


def test_a_norm_that_is_not_finite_is_null_in_json(tmp_path: Path) -> None:
    adapted, _, adapter = merged(tmp_path, "llama", {}, target_modules=["q_proj"])
    base = open_checkpoint(tmp_path / "base")
    zero = {**base.tensors}
    name = "model.layers.0.self_attn.q_proj.weight"
    zeros = np.zeros(zero[name].shape, np.float32)
    zero[name] = dataclasses.replace(zero[name], read_rows=lambda start, stop: zeros[start:stop])
    again = merge_lora(dataclasses.replace(base, tensors=zero), adapter).adapted
    assert again is not None
    entry = again.ledger()[0]
    assert entry.delta_norm == float("inf")
    assert entry.to_json()["delta_norm"] is None
    assert len(adapted.ledger()) == len(again.ledger())


def test_norms_are_recorded_while_tensors_are_read(tmp_path: Path) -> None:
    base = open_checkpoint(tiny_checkpoint(tmp_path / "base", "llama"))
    reads: list[str] = []

    def counted(name: str) -> Any:
        tensor = base.tensors[name]

        def read_rows(start: int, stop: int) -> NDArray[Any]:
            reads.append(name)
            return tensor.read_rows(start, stop)

        return read_rows

    tensors = {name: dataclasses.replace(tensor, read_rows=counted(name)) for name, tensor in base.tensors.items()}
    with quiet():
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapter = train(tmp_path / "adapter", tmp_path / "base", config)
    result = merge_lora(dataclasses.replace(base, tensors=tensors), adapter)
    assert not reads
    for tensor in result.tensors.values():
        tensor.read()
    done = len(reads)
    assert result.adapted is not None
    assert len(result.adapted.ledger()) == 6
    assert len(reads) == done


@pytest.mark.parametrize(("value", "count"), [(float("nan"), 1), (float("inf"), 3)])
def test_values_that_are_no_numbers_are_found_before_anything_is_written(
    tmp_path: Path, value: float, count: int
) -> None:
    adapted, base, adapter = merged(tmp_path, "llama", {}, target_modules=["q_proj"])
    assert adapted.check() == ()
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.2.self_attn.q_proj.lora_B.weight"
    tensors[name][1, :count] = value
    save_file(tensors, adapter / "adapter_model.safetensors")
    broken = merge_lora(open_checkpoint(base), adapter).adapted
    assert broken is not None
    with pytest.raises(InputError, match=f"adapter_model.safetensors: '{name}' has {count} of 256 values that are NaN"):
        broken.check()


@pytest.mark.parametrize("layers", [1, 3])
def test_factors_that_are_zero_are_told(tmp_path: Path, layers: int) -> None:
    _, base, adapter = merged(tmp_path, "llama", {}, target_modules=["q_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    for layer in range(layers):
        tensors[f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_B.weight"][:] = 0
    save_file(tensors, adapter / "adapter_model.safetensors")
    adapted = merge_lora(open_checkpoint(base), adapter).adapted
    assert adapted is not None
    (note,) = adapted.check()
    assert ("changes nothing" if layers == 3 else "1 of 3 changes add nothing") in note
    assert [entry.delta_norm for entry in adapted.ledger()][: 2 * layers] == [0.0] * 2 * layers


def test_two_copies_of_a_tied_tensor_must_be_equal(tmp_path: Path) -> None:
    config = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    adapted, base, adapter = merged(tmp_path, "llama", {"tie_word_embeddings": True}, **config)
    assert adapted.check() == ()
    for name in ("lora_A.weight", "lora_B.weight", "base_layer.weight"):
        tensors = load_file(adapter / "adapter_model.safetensors")
        tensors[f"base_model.model.lm_head.{name}"][-1, -1] += 1
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
        (tmp_path / name / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
        broken = merge_lora(open_checkpoint(base), tmp_path / name).adapted
        assert broken is not None
        with pytest.raises(InputError, match=f"lm_head.{name}' differs from .*embed_tokens"):
            broken.check()


@pytest.mark.parametrize(("part", "said"), [("B.weight", "only the magnitudes"), ("magnitude_vector", "")])
def test_magnitudes_are_no_factors(tmp_path: Path, part: str, said: str) -> None:
    _, base, adapter = merged(tmp_path, "llama", {}, target_modules=["q_proj"], use_dora=True)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, values in tensors.items():
        if name.endswith(part):
            values[:] = 0
    save_file(tensors, adapter / "adapter_model.safetensors")
    adapted = merge_lora(open_checkpoint(base), adapter).adapted
    assert adapted is not None
    assert [said in note for note in adapted.check()] == [True] * bool(said)
