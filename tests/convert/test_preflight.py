"""Preflight accepts what transformers saves for every family, and names what is wrong with anything else."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

from quantpress.convert.checkpoint import DTYPES, Checkpoint, LazyTensor
from quantpress.convert.hf_folder import open_folder
from quantpress.convert.preflight import bind, check_tied_head, preflight
from quantpress.quant.errors import InputError

_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_FAMILIES: dict[str, Mapping[str, Any]] = {
    "llama": {**_SIZES, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "mistral": {**_SIZES, "head_dim": 4, "tie_word_embeddings": False},
    "qwen2": {**_SIZES, "tie_word_embeddings": True},
    "qwen3": {**_SIZES, "head_dim": 8, "tie_word_embeddings": False},
    "gemma": {**_SIZES, "head_dim": 8},
    "gemma2": {**_SIZES, "head_dim": 8},
    "gemma3_text": {**_SIZES, "head_dim": 8},
    "phi3": {**_SIZES, "tie_word_embeddings": False},
    "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 40},
    "gpt_neox": {**{key: value for key, value in _SIZES.items() if key != "num_key_value_heads"}, "hidden_size": 32},
}


def _tiny(family: str, *, bare: bool = False) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **_FAMILIES[family])
    return (transformers.AutoModel if bare else transformers.AutoModelForCausalLM).from_config(config)


def _lazy(name: str, values: np.ndarray[Any, Any], dtype: str = "F32") -> LazyTensor:
    values = values.astype(DTYPES[dtype])
    return LazyTensor(name, values.shape, dtype, "memory", lambda start, stop: values[start:stop])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("llama")
    _tiny("llama").save_pretrained(folder)
    return open_folder(folder, name="tiny")


def _changed(
    checkpoint: Checkpoint,
    *,
    drop: Callable[[str], bool] = lambda name: False,
    add: Mapping[str, LazyTensor] | None = None,
    **config: Any,
) -> Checkpoint:
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if not drop(name)} | dict(add or {})
    return dataclasses.replace(checkpoint, tensors=tensors, config={**checkpoint.config, **config})


def _refused(checkpoint: Checkpoint, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        preflight(checkpoint)
    assert str(caught.value).startswith("tiny: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bare", [False, True], ids=["with head", "bare"])
@pytest.mark.parametrize("family", _FAMILIES)
def test_what_transformers_saves_is_accepted_and_bound_completely(family: str, bare: bool, tmp_path: Path) -> None:
    model = _tiny(family, bare=bare)
    model.save_pretrained(tmp_path)
    if bare and not model.config.tie_word_embeddings:
        with pytest.raises(InputError, match=r"the head .* is missing"):
            preflight(open_folder(tmp_path))
        return
    checkpoint = open_folder(tmp_path)
    checked = preflight(checkpoint)
    bound = {tensor.name for _, _, tensor in checked.bindings}
    assert bound | set(checked.dropped) == set(checkpoint.tensors)
    assert len(checked.bindings) == len(bound)
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in bound}
    assert shapes == {tensor.name: tensor.shape for _, _, tensor in checked.bindings}
    assert bind(checkpoint, checked) == checked.bindings


def test_real_models_are_accepted(shared: Path) -> None:
    for name, tokens in (("stories260k-hf", 512), ("glasslm-en-hf", 1024), ("mix6m-hf", 2048)):
        checked = preflight(open_folder(shared / "models" / name))
        assert checked.tokens == tokens == checked.hyper.vocab


def test_missing_tensors_are_counted_and_named(llama: Checkpoint) -> None:
    _refused(
        _changed(llama, drop=lambda name: name == "model.norm.weight"), r"1 tensor \('model.norm.weight'\) missing"
    )
    _refused(
        _changed(llama, drop=lambda name: name.endswith("q_proj.weight")),
        r"3 tensors \('model.layers.0.self_attn.q_proj.weight', .*\) missing",
    )
    _refused(_changed(llama, drop=lambda name: "up_proj" in name), r"6 tensors \(.*, \.\.\.\) missing")


def test_a_missing_head_is_an_error_unless_it_is_tied(llama: Checkpoint) -> None:
    headless = _changed(llama, drop=lambda name: name == "lm_head.weight")
    _refused(headless, "the head 'lm_head.weight' is missing and config.json says tie_word_embeddings: false")
    checked = preflight(_changed(headless, tie_word_embeddings=True))
    assert "lm_head.weight" not in {tensor.name for _, _, tensor in checked.bindings}
    assert checked.tied_head is None
    check_tied_head(checked)


def test_missing_and_extra_layers_are_named_as_layers(llama: Checkpoint) -> None:
    _refused(_changed(llama, drop=lambda name: ".layers.2." in name), "layer 2 is missing, config.json says 3 layers")
    _refused(_changed(llama, num_hidden_layers=5), "layers 3 to 4 are missing, config.json says 5 layers")
    _refused(_changed(llama, num_hidden_layers=1), "layers 1 to 2 are unexpected, config.json says 1 layers")
    _refused(_changed(llama, num_hidden_layers=9_000), "says 9000 layers, the checkpoint holds only")


def test_unexpected_tensors_are_counted_and_named(llama: Checkpoint) -> None:
    extra = {name: _lazy(name, np.zeros(3)) for name in ("score.weight", "model.layers.0.mlp.experts.0.w1", "v_head")}
    _refused(
        _changed(llama, add=extra), r"3 tensors \('model.layers.0.mlp.experts.0.w1', 'score.weight', 'v_head'\) un"
    )
    other = "vision.layers.7.fc.weight"  # a number of its own, not a layer too many
    _refused(_changed(llama, add={other: _lazy(other, np.zeros(3))}), rf"1 tensor \('{other}'\) unexpected")
    biases = _changed(llama, attention_bias=False)
    _refused(biases, "12 tensors .*q_proj.bias|12 tensors .*k_proj.bias")


def test_buffers_of_old_versions_are_dropped(llama: Checkpoint) -> None:
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    checked = preflight(_changed(llama, add={name: _lazy(name, np.zeros(2))}))
    assert checked.dropped == (name,)


def test_a_tensor_under_two_names_is_refused(llama: Checkpoint) -> None:
    twin = _lazy("norm.weight", np.ones(16))
    _refused(_changed(llama, add={"norm.weight": twin}), "'model.norm.weight' and 'norm.weight' are the same tensor")


def test_wrong_shapes_are_told_with_what_was_wanted_and_why(llama: Checkpoint) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    turned = {name: _lazy(name, np.zeros((24, 16)))}
    _refused(
        _changed(llama, add=turned), rf"1 of wrong shape: '{name}' is \(24, 16\), wanted \(16, 24\) \(hidden x ffn"
    )
    _refused(_changed(llama, vocab_size=41), r"2 of wrong shape: .* is \(40, 16\), wanted \(41, 16\) \(vocab x hidden")
    _refused(_changed(llama, num_key_value_heads=4), "12 of wrong shape: .*k_proj")
    _refused(_changed(llama, num_attention_heads=3), "tiny: ")
    _refused(_changed(llama, num_key_value_heads=3), "tiny: ")


def test_tensors_that_are_not_floating_point_are_refused(llama: Checkpoint) -> None:
    name = "model.norm.weight"
    _refused(_changed(llama, add={name: _lazy(name, np.zeros(16), "I8")}), f"1 of wrong type: '{name}' is I8")


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": {"quant_method": "fp8"}},
        {"compression_config": {"format": "pack-quantized"}},
        {"quantization_config": "awq"},
    ],
)
def test_a_quantized_source_is_refused_by_its_config(llama: Checkpoint, config: dict[str, Any]) -> None:
    _refused(_changed(llama, **config), "already quantized.*give the unquantized model")


@pytest.mark.parametrize(
    "suffix", ["qweight", "weight_packed", "weight_scale_inv", "weight.absmax", "weight.quant_state.bitsandbytes__nf4"]
)
def test_a_quantized_source_is_refused_by_its_tensors(llama: Checkpoint, suffix: str) -> None:
    name = f"model.layers.0.self_attn.q_proj.{suffix}"
    _refused(_changed(llama, add={name: _lazy(name, np.zeros(2), "I32")}), f"already quantized: 1 tensor.*{suffix}")
    assert preflight(_changed(llama, quantization_config=None))


def _tokenizer(count: int, *, added: int = 0, content: str = "<new>") -> dict[str, bytes]:
    vocab = {f"t{number}": number for number in range(count)}
    more = [{"id": count + number, "content": f"{content}", "special": True} for number in range(added)]
    text = {"model": {"type": "BPE", "vocab": vocab, "merges": []}, "added_tokens": more}
    return {"tokenizer.json": json.dumps(text).encode()}


def test_fewer_embedding_rows_than_tokens_are_refused_and_more_are_fine(llama: Checkpoint) -> None:
    for files, tokens in ((_tokenizer(40), 40), (_tokenizer(30), 30), (_tokenizer(39, added=1), 40), ({}, None)):
        assert preflight(dataclasses.replace(llama, tokenizer_files=files)).tokens == tokens
    for files in (_tokenizer(41), _tokenizer(40, added=1)):
        _refused(
            dataclasses.replace(llama, tokenizer_files=files), "the tokenizer has 41 tokens, the embedding only 40"
        )
    image = _tokenizer(40, added=1, content="<image_soft_token>")
    assert preflight(dataclasses.replace(llama, tokenizer_files=image)).tokens == 40


@pytest.mark.parametrize("vocab", [{"a": -1}, {"a": "0"}, {"a": True}, "abc", 7, None])
def test_a_vocabulary_that_is_none_is_refused(llama: Checkpoint, vocab: Any) -> None:
    files = {"tokenizer.json": json.dumps({"model": {"type": "BPE", "vocab": vocab}}).encode()}
    with pytest.raises(InputError, match=r"tiny/tokenizer\.json"):
        preflight(dataclasses.replace(llama, tokenizer_files=files))


def test_sentencepiece_files_are_counted(llama: Checkpoint, shared: Path) -> None:
    data = (shared / "models" / "stories260k-hf" / "tokenizer.model").read_bytes()
    _refused(dataclasses.replace(llama, tokenizer_files={"tokenizer.model": data}), "the tokenizer has 512 tokens")
    with pytest.raises(InputError, match=r"tokenizer\.model: not a SentencePiece model"):
        preflight(dataclasses.replace(llama, tokenizer_files={"tokenizer.model": b"nonsense"}))


def test_a_tied_head_that_differs_is_found_when_it_is_read(llama: Checkpoint) -> None:
    embedding = llama.tensors["model.embed_tokens.weight"].read()
    for dtype in ("F32", "F64"):
        same = {"lm_head.weight": _lazy("lm_head.weight", embedding, dtype)}
        checked = preflight(_changed(llama, add=same, tie_word_embeddings=True))
        assert "lm_head.weight" not in {tensor.name for _, _, tensor in checked.bindings}
        check_tied_head(checked)
    other = embedding.copy()
    other[39, 15] += 1
    changed = preflight(
        _changed(llama, add={"lm_head.weight": _lazy("lm_head.weight", other)}, tie_word_embeddings=True)
    )
    with pytest.raises(InputError, match=r"'lm_head.weight' differs from 'model.embed_tokens.weight' in rows 0 to 39"):
        check_tied_head(changed)
    check_tied_head(preflight(llama))  # not tied: they may differ


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architectures": ["NobodyKnowsForCausalLM"]}, "NobodyKnows"),
        ({"architectures": [], "model_type": None}, "model_type"),
        ({"num_hidden_layers": -3}, "num_hidden_layers"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 1e30}, "hidden_size"),
        ({"vocab_size": 2**62}, "vocab_size"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_naming_model_and_key(
    llama: Checkpoint, config: dict[str, Any], words: str
) -> None:
    _refused(_changed(llama, **config), words)
