"""A GGUF file opened as a checkpoint gives back what the checkpoint was, for every family."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest

from quantpress.convert.arch.registry import find_arch
from quantpress.convert.checkpoint import Checkpoint, LazyTensor
from quantpress.convert.gguf.container import MetadataValue
from quantpress.convert.gguf.export import WriteResult, write_gguf
from quantpress.convert.gguf.general import general_metadata
from quantpress.convert.gguf.mixture import TypeOptions
from quantpress.convert.gguf.plan import plan_tensors
from quantpress.convert.gguf.source import open_gguf
from quantpress.convert.preflight import preflight
from quantpress.quant.errors import InputError

_SIZES: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 80,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 32}  # fmt: skip
_GEMMA = {**_SIZES, "head_dim": 16, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama": {**_SIZES, "architectures": ["LlamaForCausalLM"]},
    "llama-tied": {**_SIZES, "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True},
    "llama-bias": {**_SIZES, "architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": True},
    "llama-head_dim": {**_SIZES, "architectures": ["LlamaForCausalLM"], "head_dim": 32, "rope_scaling": _LLAMA3},
    "mistral": {**_SIZES, "architectures": ["MistralForCausalLM"], "sliding_window": None},
    "qwen2": {**_SIZES, "architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {**_SIZES, "architectures": ["Qwen3ForCausalLM"], "head_dim": 16},
    "gemma": {**_GEMMA, "architectures": ["GemmaForCausalLM"], "hidden_act": "gelu_pytorch_tanh"},
    "gemma2": {**_GEMMA, "architectures": ["Gemma2ForCausalLM"], "sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3": {**_GEMMA, "architectures": ["Gemma3ForCausalLM"], "sliding_window": 8, "query_pre_attn_scalar": 16},
    "phi3": {**_SIZES, "architectures": ["Phi3ForCausalLM"], "original_max_position_embeddings": 64,
             "pad_token_id": 0},
    "gpt2": {"architectures": ["GPT2LMHeadModel"], "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 80,
             "n_positions": 64},
    "gptneox": {**_SIZES, "architectures": ["GPTNeoXForCausalLM"], "rotary_pct": 0.25},
}  # fmt: skip


def random_checkpoint(config: Mapping[str, Any], dtype: Any = np.float32) -> Checkpoint:
    arch = find_arch(config)
    hyper = arch.read_config(config)
    random = np.random.default_rng(0)
    kind = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[np.dtype(dtype).name]
    tensors = {}
    for row, layer in arch.rows(hyper):
        if row.tied_to and hyper.tied:
            continue
        name = row.hf.format(layer=layer)
        # Eighths up to 4 keep their value when Gemma's norms add one to it.
        array = np.round(random.standard_normal([hyper.dims[dim] for dim in row.shape]) * 8).clip(-32, 31) / 8
        array = array.astype(dtype)
        tensors[name] = LazyTensor(name, array.shape, kind, "model", lambda start, stop, kept=array: kept[start:stop])
    return Checkpoint("a model", config, tensors)


def press(path: Path, source: Checkpoint, outtype: str, **extra: MetadataValue) -> WriteResult:
    checked = preflight(source)
    arch, hyper = checked.spec, checked.hyper
    plan = plan_tensors(checked.bindings, arch, hyper, TypeOptions(outtype))
    metadata = general_metadata(
        source, arch.gguf, parameters=plan.parameters, file_type=plan.file_type, quantized=plan.quantized
    )
    metadata |= {f"{arch.gguf}.{key}": value for key, value in arch.gguf_metadata(hyper, source.config).items()}
    return write_gguf(path, metadata | extra, plan, threads=2, force=True)


@pytest.mark.parametrize("case", CONFIGS)
def test_names_shapes_and_values_are_those_of_the_checkpoint(tmp_path: Path, case: str) -> None:
    source = random_checkpoint(CONFIGS[case])
    press(tmp_path / "m.gguf", source, "f32")
    opened = open_gguf(tmp_path / "m.gguf")
    assert opened.format == "gguf"
    assert opened.name == "a model"
    back = dict(opened.tensors)
    if "lm_head.weight" not in source.tensors:
        back.pop("lm_head.weight", None)
    assert set(back) == set(source.tensors)
    for name, tensor in source.tensors.items():
        assert back[name].shape == tensor.shape
        np.testing.assert_array_equal(back[name].read(), tensor.read(), err_msg=name)
        assert back[name].read().flags.c_contiguous


@pytest.mark.parametrize("case", CONFIGS)
def test_rows_are_read_in_any_part(tmp_path: Path, case: str) -> None:
    source = random_checkpoint(CONFIGS[case])
    press(tmp_path / "m.gguf", source, "f32")
    for name, tensor in open_gguf(tmp_path / "m.gguf").tensors.items():
        if name not in source.tensors:
            continue
        whole = source.tensors[name].read()
        for start, stop in (
            (0, 1),
            (1, min(4, len(whole))),
            (len(whole) - 1, len(whole)),
            (len(whole) // 3, len(whole)),
        ):
            part = tensor.read_rows(start, stop)
            np.testing.assert_array_equal(part, whole[start:stop], err_msg=f"{name} {start} {stop}")


@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0", "q4_0", "q5_0"])
@pytest.mark.parametrize("case", ["llama", "gpt2", "gptneox", "gemma2"])
def test_a_file_pressed_again_to_its_own_type_keeps_its_bytes(tmp_path: Path, case: str, outtype: str) -> None:
    random = np.random.default_rng(5)
    source = random_checkpoint(CONFIGS[case])
    noisy = {
        name: LazyTensor(name, tensor.shape, "F32", "model", lambda start, stop, kept=values: kept[start:stop])
        for name, tensor in source.tensors.items()
        for values in [
            (tensor.read() + random.standard_normal(tensor.shape) * 0.01 * (len(tensor.shape) > 1)).astype("f4")
        ]
    }
    press(tmp_path / "1.gguf", Checkpoint("a model", source.config, noisy), outtype)
    press(tmp_path / "2.gguf", open_gguf(tmp_path / "1.gguf"), outtype)
    # Metadata may say more the second time (what the file's config states in full); the tensors must not change.
    one, two = (
        {tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in gguf.GGUFReader(path).tensors}
        for path in (tmp_path / "1.gguf", tmp_path / "2.gguf")
    )
    assert one == two


@pytest.mark.parametrize(("outtype", "dtype"), [("f16", "F16"), ("bf16", "BF16"), ("f32", "F32"), ("q4_1", "F32")])
def test_stored_types_are_kept_and_blocks_become_float32(tmp_path: Path, outtype: str, dtype: str) -> None:
    press(tmp_path / "m.gguf", random_checkpoint(CONFIGS["llama"], ml_dtypes.bfloat16), outtype)
    tensors = open_gguf(tmp_path / "m.gguf").tensors
    tensor = tensors["model.layers.0.mlp.up_proj.weight"]
    assert tensor.dtype == dtype
    stored = next(t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if t.name == "blk.0.ffn_up.weight")
    wanted = gguf.quants.dequantize(stored.data, stored.tensor_type)
    np.testing.assert_array_equal(tensor.read().astype(np.float32), wanted)
    assert tensors["model.norm.weight"].dtype == "F32"


def test_k_quants_are_decoded(tmp_path: Path) -> None:
    config = {**CONFIGS["llama"], "hidden_size": 256, "num_hidden_layers": 1}
    source = random_checkpoint(config)
    press(tmp_path / "m.gguf", source, "f32")
    random = np.random.default_rng(3)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    for key, field in reader.fields.items():
        if key.startswith("llama."):
            writer.add_key_value(key, field.contents(), field.types[0])
    blocks = random.integers(0, 256, (96, 144), np.uint8)
    blocks[:, :4] = np.array([0.01, 0.02], np.float16).view(np.uint8)
    for tensor in reader.tensors:
        if tensor.name == "blk.0.ffn_up.weight":
            writer.add_tensor(tensor.name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_K)
        else:
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = open_gguf(tmp_path / "k.gguf").tensors["model.layers.0.mlp.up_proj.weight"]
    wanted = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_K)
    np.testing.assert_array_equal(tensor.read(), wanted)
    np.testing.assert_array_equal(tensor.read_rows(5, 9), wanted[5:9])


def test_general_metadata_and_sampling_defaults_are_kept(tmp_path: Path) -> None:
    extra: dict[str, MetadataValue] = {
        "general.license": ("string", "mit"),
        "general.sampling.temp": ("float32", 0.5),
        "general.sampling.top_k": ("int32", 20),
    }
    press(tmp_path / "1.gguf", random_checkpoint(CONFIGS["llama"]), "f32", **extra)
    opened = open_gguf(tmp_path / "1.gguf")
    assert opened.generation_config == {"temperature": 0.5, "top_k": 20}
    press(tmp_path / "2.gguf", opened, "q8_0")
    fields = gguf.GGUFReader(tmp_path / "2.gguf").fields
    assert {key: fields[key].contents() for key in extra} == {key: value for key, (_, value) in extra.items()}
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q8_0
    assert fields["general.quantization_version"].contents() == 2
    assert [path.path.name for path in opened.files] == ["1.gguf"]


def test_a_vocabulary_becomes_tokenizer_files_only_when_one_is_asked_for(tmp_path: Path) -> None:
    tokens: dict[str, MetadataValue] = {
        "tokenizer.ggml.model": ("string", "no such model"),
        "tokenizer.ggml.tokens": ("array[string]", [str(number) for number in range(80)]),
    }
    press(tmp_path / "m.gguf", random_checkpoint(CONFIGS["llama"]), "f32", **tokens)
    opened = open_gguf(tmp_path / "m.gguf")
    assert set(tokens) <= set(opened.metadata)
    with pytest.raises(InputError, match="no such model"):
        opened.tokenizer_files.get("tokenizer.json")
    press(tmp_path / "n.gguf", random_checkpoint(CONFIGS["llama"]), "f32")
    assert dict(open_gguf(tmp_path / "n.gguf").tokenizer_files) == {}


def _rewritten(path: Path, out: Path, drop: str = "", rename: Mapping[str, str] = {}, **keys: Any) -> Path:
    """Copies a llama file with the gguf package, with changes."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, keys.pop("architecture", "llama"))
    for key, field in reader.fields.items():
        if key.startswith("llama."):
            writer.add_key_value(key, keys.get(key.rpartition(".")[2], field.contents()), field.types[0])
    for key, value in keys.items():
        if key == "type":
            writer.add_type(value)
    for tensor in reader.tensors:
        if tensor.name != drop:
            writer.add_tensor(rename.get(tensor.name, tensor.name), tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"drop": "blk.1.ffn_up.weight"}, "tensor 'blk.1.ffn_up.weight' is missing"),
        ({"drop": "output_norm.weight"}, "tensor 'output_norm.weight' is missing"),
        ({"rename": {"output_norm.weight": "output_morn.weight"}}, "tensor 'output_norm.weight' is missing"),
        ({"rename": {"output.weight": "outputs.weight"}}, "tensor 'outputs.weight' is not one of llama's"),
        (
            {"feed_forward_length": 97},
            r"has shape \(96, 64\), wanted \(97, 64\)|has shape \(64, 96\), wanted \(64, 97\)",
        ),
        ({"block_count": 3}, "tensor 'blk.2.*' is missing"),
        ({"block_count": 2**31}, "block_count|2147483648 layers are promised"),
        ({"block_count": 1}, "tensor 'blk.1.*' is not one of llama's"),
        ({"architecture": "llamba"}, "general.architecture is 'llamba'.*nearest: llama"),
        ({"type": "adapter"}, "adapter"),
    ],
)
def test_a_file_that_is_not_the_model_it_says_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    press(tmp_path / "m.gguf", random_checkpoint(CONFIGS["llama"]), "f32")
    path = _rewritten(tmp_path / "m.gguf", tmp_path / "n.gguf", **changes)
    with pytest.raises(InputError, match=words) as caught:
        open_gguf(path)
    assert str(caught.value).startswith(str(path))


def test_a_file_without_an_architecture_is_refused(tmp_path: Path) -> None:
    source = random_checkpoint(CONFIGS["llama"])
    checked = preflight(source)
    plan = plan_tensors(checked.bindings, checked.spec, checked.hyper, TypeOptions("f32"))
    write_gguf(tmp_path / "m.gguf", {}, plan, threads=1)
    with pytest.raises(InputError, match="architecture is None"):
        open_gguf(tmp_path / "m.gguf")


def test_a_real_model_survives_the_way_there_and_back(tmp_path: Path, shared: Path) -> None:
    from quantpress.convert.hf_folder import open_folder

    source = open_folder(shared / "models" / "glasslm-en-hf")
    press(tmp_path / "m.gguf", source, "f16")
    opened = open_gguf(tmp_path / "m.gguf")
    assert json.dumps(dict(opened.config)["num_hidden_layers"]) == "4"
    for name, tensor in source.tensors.items():
        back = opened.tensors[name].read()
        np.testing.assert_array_equal(back.astype(np.float32), tensor.read().astype(np.float32), err_msg=name)
