"""What merge_lora gives and refuses, without PEFT: laziness, several adapters, names, tokenizers, errors."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from quantpress.convert.checkpoint import Checkpoint, LazyTensor, SourceFile
from quantpress.convert.lora.adapter import Adapter, open_adapter
from quantpress.convert.lora.merge import merge_lora
from quantpress.quant.errors import InputError, UsageError

K, N, RANK = 6, 10, 2
Q, UP, EMBED, HEAD = "layers.0.self_attn.q_proj", "layers.0.mlp.up_proj", "embed_tokens", "lm_head"
CONFIG = {"model_type": "unheard_of", "architectures": ["UnheardOfForCausalLM"], "vocab_size": 12, "hidden_size": K}


def array(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def lazy(name: str, values: NDArray[Any], source: str = "base.safetensors") -> LazyTensor:
    return LazyTensor(name, values.shape, "F32", source, lambda start, stop: values[start:stop])


def base_of(prefix: str = "model.", **options: Any) -> Checkpoint:
    """A model of a family that has no table."""
    tensors = {
        f"{prefix}{EMBED}.weight": array(12, K),
        f"{prefix}{Q}.weight": array(N, K),
        f"{prefix}{Q}.bias": array(N),
        f"{prefix}{UP}.weight": array(N, K, seed=1),
        "lm_head.weight": array(12, K, seed=1),
    }
    return Checkpoint(
        "base",
        {**CONFIG, "tie_word_embeddings": False, **options},
        {name: lazy(name, values) for name, values in tensors.items()},
        {"tokenizer.json": b"old", "chat_template.jinja": b"old", "config.json": b"{}"},
        files=(SourceFile(Path("base.safetensors"), 1),),
    )


def adapter_of(folder: Path, tensors: Mapping[str, NDArray[Any]], **config: Any) -> Adapter:
    """Writes an adapter and opens it."""
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 3, "target_modules": ["q_proj", "up_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(
        {f"base_model.model.{name}": value for name, value in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return open_adapter(folder)


def factors(path: str, rows: int = N, width: int = K, seed: int = 5) -> dict[str, NDArray[Any]]:
    a, b = array(RANK, width, seed=seed), array(rows, RANK, seed=seed)
    return {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}


def delta(path: str, rows: int = N, width: int = K, seed: int = 5, scale: float = 1.5) -> NDArray[np.float64]:
    a, b = (value.astype(np.float64) for value in factors(path, rows, width, seed).values())
    return scale * (b @ a)


def values(checkpoint: Checkpoint, name: str) -> NDArray[np.float64]:
    return checkpoint.tensor(name).read().astype(np.float64)


def test_nothing_is_read_until_a_tensor_is(tmp_path: Path) -> None:
    def refuse(start: int, stop: int) -> NDArray[Any]:
        raise AssertionError(f"rows {start} to {stop} were read")

    base = base_of(tie_word_embeddings=True)
    unread = {name: dataclasses.replace(tensor, read_rows=refuse) for name, tensor in base.tensors.items()}
    adapter = adapter_of(tmp_path / "a", {**factors("model." + Q), f"model.{EMBED}.weight": array(14, K)})
    modules = tuple(
        dataclasses.replace(
            module,
            parts={part: dataclasses.replace(tensor, read_rows=refuse) for part, tensor in module.parts.items()},
        )
        for module in adapter.modules
    )
    adapter = dataclasses.replace(adapter, modules=modules)
    merged = merge_lora(dataclasses.replace(base, tensors=unread), adapter)
    assert merged.config["vocab_size"] == 14
    with pytest.raises(AssertionError, match="were read"):
        merged.tensors[f"model.{Q}.weight"].read()


@pytest.mark.parametrize("prefix", ["model.", "", "language_model.model.", "model.language_model.", "transformer."])
@pytest.mark.parametrize("inside", ["model.", "model.language_model.", ""])
def test_wrappers_of_the_model_do_not_matter(tmp_path: Path, prefix: str, inside: str) -> None:
    base = base_of(prefix)
    merged = merge_lora(base, adapter_of(tmp_path / "a", factors(inside + Q)))
    name = f"{prefix}{Q}.weight"
    assert list(merged.tensors) == list(base.tensors)
    assert np.allclose(values(merged, name), values(base, name) + delta(Q), atol=1e-6)
    assert np.array_equal(values(merged, f"{prefix}{UP}.weight"), values(base, f"{prefix}{UP}.weight"))


def test_a_name_that_could_be_two_tensors_is_refused(tmp_path: Path) -> None:
    base = base_of()
    more = {**base.tensors, f"language_model.{Q}.weight": lazy("x", array(N, K))}
    with pytest.raises(InputError, match=r"could be any of .*model.*language_model"):
        merge_lora(dataclasses.replace(base, tensors=more), adapter_of(tmp_path / "a", factors("transformer." + Q)))


def test_a_vision_tower_is_not_taken_for_the_language_model(tmp_path: Path) -> None:
    base = base_of("model.vision_tower.")
    with pytest.raises(InputError, match="does not have; nearest: 'model"):
        merge_lora(base, adapter_of(tmp_path / "a", factors("model." + Q)))


def test_stored_the_other_way_round_shapes_decide_and_for_square_ones_the_config(tmp_path: Path) -> None:
    base = base_of()
    turned = {**base.tensors, f"model.{Q}.weight": lazy(f"model.{Q}.weight", array(K, N))}
    merged = merge_lora(dataclasses.replace(base, tensors=turned), adapter_of(tmp_path / "a", factors("model." + Q)))
    assert np.allclose(values(merged, f"model.{Q}.weight"), array(K, N) + delta(Q).T, atol=1e-6)
    square = {**base.tensors, f"model.{Q}.weight": lazy(f"model.{Q}.weight", array(K, K))}
    for flag in (False, True):
        adapter = adapter_of(tmp_path / f"{flag}", factors("model." + Q, K, K), fan_in_fan_out=flag)
        merged = merge_lora(dataclasses.replace(base, tensors=square), adapter)
        added = delta(Q, K, K).T if flag else delta(Q, K, K)
        assert np.allclose(values(merged, f"model.{Q}.weight"), array(K, K) + added, atol=1e-6)


def test_several_adapters_add_up_with_their_weights_and_are_rounded_once(tmp_path: Path) -> None:
    base, name = base_of(), f"model.{Q}.weight"
    one = adapter_of(tmp_path / "one", factors("model." + Q, seed=1))
    two = adapter_of(tmp_path / "two", {**factors("model." + Q, seed=2), **factors("model." + UP, seed=2)})
    merged = merge_lora(merge_lora(base, one, 0.3), two, -2.0)
    wanted = values(base, name) + delta(Q, seed=1, scale=0.3 * 1.5) + delta(Q, seed=2, scale=-2 * 1.5)
    assert np.array_equal(values(merged, name), wanted.astype(np.float32))
    assert merged.adapted is not None
    assert merged.adapted.base is base
    assert [(each.adapter.name, each.weight) for each in merged.adapted.applied] == [("one", 0.3), ("two", -2.0)]
    assert [file.path.name for file in merged.files] == [
        "base.safetensors",
        *["adapter_config.json", "adapter_model.safetensors"] * 2,
    ]
    first, second = (entry for entry in merged.adapted.ledger() if entry.name.endswith("q_proj.lora_A.weight"))
    before = values(base, name)
    assert first.delta_norm == pytest.approx(np.linalg.norm(delta(Q, seed=1)) * 0.3 / np.linalg.norm(before), rel=1e-12)
    before = before + 0.3 * delta(Q, seed=1)
    assert second.delta_norm == pytest.approx(np.linalg.norm(delta(Q, seed=2)) * 2 / np.linalg.norm(before), rel=1e-12)
    assert (first.weight, first.scale, first.rank, first.alpha) == (0.3, 1.5, 2, 3)


def test_the_base_is_not_changed_by_merging(tmp_path: Path) -> None:
    base = base_of()
    before = {name: tensor.read().copy() for name, tensor in base.tensors.items()}
    merged = merge_lora(base, adapter_of(tmp_path / "a", factors("model." + Q)))
    _ = [tensor.read() for tensor in merged.tensors.values()]
    assert base.adapted is None
    assert all(np.array_equal(base.tensors[name].read(), value) for name, value in before.items())


def test_a_replaced_tensor_ignores_the_weight_and_a_note_says_so(tmp_path: Path) -> None:
    new = array(N, K, seed=9)
    tensors = {**factors("model." + Q), f"model.{UP}.weight": new}
    adapter = adapter_of(tmp_path / "a", tensors, target_modules=["q_proj"], modules_to_save=["up_proj"])
    merged = merge_lora(base_of(), adapter, 0.5)
    assert np.array_equal(values(merged, f"model.{UP}.weight"), new)
    assert merged.adapted is not None
    assert [note for note in merged.adapted.notes if "1 tensors that it replaces" in note]
    same = merge_lora(base_of(), adapter)
    assert same.adapted is not None
    assert not same.adapted.notes


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "1", True, None])
def test_a_weight_that_is_no_finite_number_is_refused(tmp_path: Path, weight: Any) -> None:
    with pytest.raises(UsageError, match="weight of an adapter must be a finite number"):
        merge_lora(base_of(), adapter_of(tmp_path / "a", factors("model." + Q)), weight)


@pytest.mark.parametrize(
    ("tensors", "config", "said"),
    [
        (factors("model.layers.7.self_attn.q_proj"), {}, "which the base does not have"),
        (factors("model.layers.0.attn.qkv", 30), {"target_modules": ["qkv"]}, "another model"),
        (factors("model." + Q, N + 1), {}, r"for a weight of shape \(11, 6\).*has \(10, 6\); it is for another model"),
        (factors("model." + Q, N, K + 1), {}, "it is for another model"),
        (factors("model." + UP), {"target_modules": ["q_proj"]}, "PEFT would ignore it"),
        (factors("model." + UP), {"exclude_modules": ["up_proj"]}, "PEFT would ignore it"),
        (factors("model." + Q), {"layers_to_transform": [1]}, "PEFT would ignore it"),
        (factors("model." + Q), {"r": 3}, "rank"),
        ({"model.norm.bias": array(K)}, {}, "which the base does not have"),
        ({"score.weight": array(2, K)}, {"modules_to_save": ["score"]}, "which the base does not have"),
        ({f"model.{UP}.weight": array(N, K + 1)}, {"modules_to_save": ["up_proj"]}, "it is for another model"),
        ({f"model.{UP}.weight": array(N)}, {"modules_to_save": ["up_proj"]}, "it is for another model"),
        (
            {**factors("model." + UP), f"model.{UP}.lora_B.bias": array(N)},
            {"lora_bias": True},
            "up_proj.bias', which the base does not have",
        ),
        ({f"model.{EMBED}.weight": array(14, K)}, {}, "rows differ.*14.*12.*must hold both whole"),
        (
            {f"model.{EMBED}.lora_embedding_A": array(2, 14), f"model.{EMBED}.lora_embedding_B": array(K, 2)},
            {"target_modules": ["embed_tokens"]},
            "for a vocabulary that has grown and must be in the adapter whole",
        ),
        (
            {f"model.{EMBED}.token_adapter.trainable_tokens_delta": array(2, K)},
            {"trainable_token_indices": [1, 12]},
            "is for token 12, .*for a vocabulary that has grown",
        ),
        (
            {f"model.{EMBED}.token_adapter.trainable_tokens_delta": array(2, K + 1)},
            {"trainable_token_indices": [1, 2]},
            r"has shape \(2, 7\), wanted \(2, 6\)",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    tmp_path: Path, tensors: Mapping[str, NDArray[Any]], config: Mapping[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said) as caught:
        merge_lora(base_of(), adapter_of(tmp_path / "a", tensors, **config))
    assert "\n" not in str(caught.value)


def test_two_adapters_that_replace_the_same_are_refused(tmp_path: Path) -> None:
    saved = {f"model.{UP}.weight": array(N, K, seed=9)}
    one = adapter_of(tmp_path / "one", saved, modules_to_save=["up_proj"])
    two = adapter_of(tmp_path / "two", factors("model." + UP))
    with pytest.raises(InputError, match=r"two.*|one.*which was changed before"):
        merge_lora(merge_lora(base_of(), one), one)
    with pytest.raises(InputError, match="which was changed before"):
        merge_lora(merge_lora(base_of(), two), one)
    merged = merge_lora(merge_lora(base_of(), one), two)  # adding to what another replaced loses nothing
    assert np.allclose(values(merged, f"model.{UP}.weight"), array(N, K, seed=9) + delta(UP), atol=1e-6)


def test_two_adapters_that_train_the_same_token_are_refused(tmp_path: Path) -> None:
    def tokens(name: str, ids: list[int]) -> Adapter:
        rows = {f"model.{EMBED}.token_adapter.trainable_tokens_delta": array(len(ids), K, seed=9)}
        return adapter_of(tmp_path / name, rows, trainable_token_indices=ids)

    merged = merge_lora(merge_lora(base_of(), tokens("one", [1, 7])), tokens("two", [3, 2]))
    wanted = values(base_of(), f"model.{EMBED}.weight")
    wanted[[1, 7]] = wanted[[3, 2]] = array(2, K, seed=9)
    assert np.array_equal(values(merged, f"model.{EMBED}.weight"), wanted)
    with pytest.raises(InputError, match="is for token 7, which another adapter"):
        merge_lora(merged, tokens("three", [7, 8]))


def test_a_second_copy_of_the_bases_embedding_must_equal_the_first(tmp_path: Path) -> None:
    base = base_of()

    def copied(name: str, copy: NDArray[Any]) -> Adapter:
        pair = {f"model.{EMBED}.lora_embedding_A": array(2, 12, seed=4), f"model.{EMBED}.lora_embedding_B": array(K, 2)}
        held = {**pair, f"model.{EMBED}.base_layer.weight": copy}
        return adapter_of(tmp_path / name, held, target_modules=["embed_tokens"])

    first = merge_lora(base, copied("one", array(12, K)))
    merged = merge_lora(first, copied("two", array(12, K)))
    assert merged.adapted is not None
    merged.adapted.check()
    added = 2 * 1.5 * (array(K, 2).astype(np.float64) @ array(2, 12, seed=4)).T
    assert np.allclose(values(merged, f"model.{EMBED}.weight"), array(12, K) + added, atol=1e-5)
    assert len(merged.adapted.ledger()) == 6
    narrow = merge_lora(first, copied("narrow", array(12, K).astype(np.float16)))
    assert narrow.adapted is not None
    narrow.adapted.check()  # it was saved in another type
    other = merge_lora(first, copied("three", array(12, K, seed=8)))
    assert other.adapted is not None
    with pytest.raises(InputError, match="differs from"):
        other.adapted.check()


def test_modules_that_the_file_does_not_hold_are_noted(tmp_path: Path) -> None:
    merged = merge_lora(base_of(), adapter_of(tmp_path / "a", factors("model." + Q), modules_to_save=["lm_head"]))
    assert merged.adapted is not None
    adapted, saved = merged.adapted.notes
    assert "1 more modules were adapted" in adapted
    assert "up_proj" in adapted
    assert "1 more modules were trained whole" in saved


def test_all_linear_is_no_promise_for_embeddings(tmp_path: Path) -> None:
    held = {**factors("model." + Q), **factors("model." + UP)}
    merged = merge_lora(base_of(), adapter_of(tmp_path / "a", held, target_modules="all-linear"))
    assert merged.adapted is not None
    assert not merged.adapted.notes


def test_a_whole_tokenizer_replaces_the_bases_and_templates_are_laid_over_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter, base = adapter_of(tmp_path / "a", factors("model." + Q)), base_of()
    base = dataclasses.replace(
        base, metadata={"tokenizer.ggml.model": ("string", "x"), "general.name": ("string", "x")}
    )
    with caplog.at_level(logging.INFO):
        laid = merge_lora(base, dataclasses.replace(adapter, tokenizer_files={"chat_template.jinja": b"new"}))
    assert laid.tokenizer_files == {"tokenizer.json": b"old", "chat_template.jinja": b"new", "config.json": b"{}"}
    assert laid.metadata == {"general.name": ("string", "x")}
    assert "laid over" in caplog.text
    new = {"tokenizer.json": b"new", "config.json": b"not this"}
    replaced = merge_lora(base, dataclasses.replace(adapter, tokenizer_files=new))
    assert replaced.tokenizer_files == {"tokenizer.json": b"new", "config.json": b"{}"}
    same = merge_lora(base, dataclasses.replace(adapter, tokenizer_files={"tokenizer.json": b"old"}))
    assert same.tokenizer_files is base.tokenizer_files
    assert same.metadata == base.metadata


def test_a_quantized_base_is_refused(tmp_path: Path) -> None:
    base = base_of(quantization_config={"quant_method": "gptq"})
    with pytest.raises(InputError, match="already quantized"):
        merge_lora(base, adapter_of(tmp_path / "a", factors("model." + Q)))


def test_a_repeated_head_of_a_tied_base_goes_where_the_embedding_changes(tmp_path: Path) -> None:
    base = base_of(tie_word_embeddings=True)
    rows = {f"model.{EMBED}.token_adapter.trainable_tokens_delta": array(1, K, seed=9)}
    tied = merge_lora(base, adapter_of(tmp_path / "tokens", rows, trainable_token_indices=[4]))
    assert "lm_head.weight" not in tied.tensors
    assert tied.config["tie_word_embeddings"] is True
    head = merge_lora(base, adapter_of(tmp_path / "head", factors(HEAD, 12), target_modules=["lm_head"]))
    assert head.config["tie_word_embeddings"] is False
    # the head of a tied model is its embedding, whatever the file repeats
    assert np.allclose(values(head, "lm_head.weight"), array(12, K) + delta(HEAD, 12), atol=1e-6)
    kept = merge_lora(base, adapter_of(tmp_path / "none", factors("model." + Q)))
    assert "lm_head.weight" in kept.tensors


def test_tied_embeddings_that_one_adapter_separates_take_the_tokens_of_the_next(tmp_path: Path) -> None:
    base = base_of(tie_word_embeddings=True)
    rows = {f"model.{EMBED}.token_adapter.trainable_tokens_delta": array(1, K, seed=9)}
    head = adapter_of(tmp_path / "head", factors(HEAD, 12), target_modules=["lm_head"])
    tokens = adapter_of(tmp_path / "tokens", rows, trainable_token_indices=[4])
    merged = merge_lora(merge_lora(base, head), tokens)
    assert np.array_equal(values(merged, f"model.{EMBED}.weight")[4], array(1, K, seed=9)[0])
    assert np.array_equal(values(merged, "lm_head.weight")[4], array(1, K, seed=9)[0])
    assert np.array_equal(values(merged, f"model.{EMBED}.weight")[5], array(12, K)[5])
    assert list(merged.tensors)[:2] == [f"model.{EMBED}.weight", "lm_head.weight"]
    entry = merged.adapted.ledger()[-1] if merged.adapted else None
    assert entry is not None
    assert entry.target == f"model.{EMBED}.weight and 1 more"


def test_a_repeated_head_does_not_keep_a_tied_vocabulary_from_growing(tmp_path: Path) -> None:
    grown = array(14, K, seed=9)
    adapter = adapter_of(tmp_path / "a", {**factors("model." + Q), f"model.{EMBED}.weight": grown})
    merged = merge_lora(base_of(tie_word_embeddings=True), adapter)
    assert "lm_head.weight" not in merged.tensors
    assert np.array_equal(values(merged, f"model.{EMBED}.weight"), grown)


def test_what_replaces_a_tensor_takes_its_type(tmp_path: Path) -> None:
    base, name = base_of(), f"model.{UP}.weight"
    half = array(N, K).astype(np.float16)
    tensors = {**base.tensors, name: LazyTensor(name, half.shape, "F16", "base", lambda start, stop: half[start:stop])}
    adapter = adapter_of(tmp_path / "a", {name: array(N, K, seed=9)}, modules_to_save=["up_proj"])
    merged = merge_lora(dataclasses.replace(base, tensors=tensors), adapter).tensors[name]
    assert merged.dtype == "F16"
    assert np.array_equal(merged.read(), array(N, K, seed=9).astype(np.float16))


def test_a_tensor_that_nothing_uses_is_refused(tmp_path: Path) -> None:
    # PEFT cannot train tokens of an embedding that has a LoRA
    held = {
        f"model.{EMBED}.lora_embedding_A": array(2, 12),
        f"model.{EMBED}.lora_embedding_B": array(K, 2),
        f"model.{EMBED}.token_adapter.trainable_tokens_delta": array(1, K),
    }
    adapter = adapter_of(tmp_path / "a", held, target_modules=["embed_tokens"], trainable_token_indices=[1])
    with pytest.raises(InputError, match="lora_embedding_A' is not used by anything"):
        merge_lora(base_of(), adapter)


def test_dora_after_lora_bias_is_refused_for_its_magnitude_would_scale_the_bias_unmerged(tmp_path: Path) -> None:
    path = "model." + Q
    biased = adapter_of(tmp_path / "a", {**factors(path), f"{path}.lora_B.bias": array(N)}, lora_bias=True)
    magnitude = {f"{path}.lora_magnitude_vector": np.abs(array(N))}
    dora = adapter_of(tmp_path / "b", {**factors(path), **magnitude}, use_dora=True)
    with pytest.raises(InputError, match="merge the DoRA adapter first"):
        merge_lora(merge_lora(base_of(), biased), dora)
    assert merge_lora(merge_lora(base_of(), dora), biased).adapted is not None
