"""From tensors of a checkpoint to bytes of a GGUF file, against the gguf package's reader and quantizers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest

from quantpress.convert.arch.registry import find_arch
from quantpress.convert.checkpoint import Checkpoint, LazyTensor
from quantpress.convert.gguf.export import WriteResult, write_gguf
from quantpress.convert.gguf.mixture import TypeOptions
from quantpress.convert.gguf.plan import TensorPlan, plan_tensors
from quantpress.convert.preflight import preflight
from quantpress.quant.errors import InputError, OutputError, UsageError

LLAMA: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
METADATA = {"general.architecture": ("string", "llama")}
Q = gguf.GGMLQuantizationType


def random_weights(config: Mapping[str, Any], dtype: Any = np.float32) -> dict[str, np.ndarray]:
    arch = find_arch(config)
    hyper = arch.read_config(config)
    random = np.random.default_rng(0)
    return {
        row.hf.format(layer=layer): random.standard_normal([hyper.dims[dim] for dim in row.shape]).astype(dtype)
        for row, layer in arch.rows(hyper)
        if not (row.tied_to and hyper.tied)
    }


def checkpoint(config: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> Checkpoint:
    names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "float8_e4m3fn": "F8_E4M3"}

    def tensor(name: str, array: np.ndarray) -> LazyTensor:
        return LazyTensor(name, array.shape, names[array.dtype.name], "model.safetensors", lambda a, b: array[a:b])

    return Checkpoint("model", config, {name: tensor(name, array) for name, array in weights.items()})


def plan(model: Checkpoint, outtype: str, **options: Any) -> TensorPlan:
    checked = preflight(model)
    return plan_tensors(checked.bindings, checked.spec, checked.hyper, TypeOptions(outtype, **options))


def export(path: Path, model: Checkpoint, outtype: str, **options: Any) -> WriteResult:
    return write_gguf(path, METADATA, plan(model, outtype), threads=options.pop("threads", 2), **options)


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    halves = weights.reshape(heads, 2, len(weights) // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def as_llama_cpp(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What llama.cpp's converter makes of a llama checkpoint, as float32: gguf names, q and k rows interleaved."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    result = {}
    for name, array in weights.items():
        values = array.astype(np.float32)
        if "q_proj" in name:
            values = permute(values, 4)
        if "k_proj" in name:
            values = permute(values, 2)
        result[names.get_name(name, (".weight", ".bias"))] = values
    return result


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, ml_dtypes.float8_e4m3fn])
@pytest.mark.parametrize("outtype", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_a_file_holds_what_the_gguf_package_would_write(tmp_path: Path, outtype: str, stored: Any) -> None:
    weights = random_weights(LLAMA, stored)
    result = export(tmp_path / "m.gguf", checkpoint(LLAMA, weights), outtype)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    wanted = as_llama_cpp(weights)
    assert set(found) == set(wanted)
    for name, values in wanted.items():
        kind = Q[outtype]
        if name == "output.weight" and outtype[:2] in ("Q4", "Q5"):
            kind = Q.Q8_0
        if "ffn_down" in name and outtype.startswith("Q"):
            kind = Q.F16
        if values.ndim == 1:
            kind = Q.F32
        assert found[name].tensor_type == kind, name
        packed = gguf.quants.quantize(values, kind)
        assert found[name].data.tobytes() == packed.tobytes(), name
        assert found[name].shape.tolist() == list(reversed(values.shape))
    whole = (tmp_path / "m.gguf").read_bytes()
    assert (result.sha256, result.nbytes) == (hashlib.sha256(whole).hexdigest(), len(whole))
    assert [(each.name, each.nbytes) for each in result.tensors] == [
        (each.name, each.n_bytes) for each in found.values()
    ]


def test_the_errors_are_those_of_the_values_in_the_file(tmp_path: Path) -> None:
    weights = random_weights(LLAMA)
    result = export(tmp_path / "m.gguf", checkpoint(LLAMA, weights), "q4_0")
    errors = {each.name: each.relative_error for each in result.tensors}
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    for name, values in as_llama_cpp(weights).items():
        back = (
            gguf.quants.dequantize(found[name].data, found[name].tensor_type).reshape(values.shape).astype(np.float64)
        )
        whole = np.sqrt(np.square(back - values).sum() / np.square(values, dtype=np.float64).sum())
        # a sample of 8 rows of 64 to 172 values: the ratio of two sums over 512 values or more is within a quarter
        assert errors[name] == pytest.approx(whole, rel=0.25, abs=1e-12), name
    assert errors["output_norm.weight"] == 0.0
    unmeasured = export(tmp_path / "n.gguf", checkpoint(LLAMA, weights), "q4_0", measure_error=False)
    assert {each.relative_error for each in unmeasured.tensors} == {None}


@pytest.mark.parametrize("outtype", ["f16", "q8_0", "q5_1"])
def test_bytes_do_not_depend_on_threads_or_on_the_size_of_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outtype: str
) -> None:
    model = checkpoint(LLAMA, random_weights(LLAMA, ml_dtypes.bfloat16))
    hashes = {export(tmp_path / "m.gguf", model, outtype, threads=1).sha256}
    for chunk, threads in ((1, 3), (64 * 20, 1), (64 * 33, 4)):
        monkeypatch.setattr("quantpress.convert.gguf.planned._CHUNK_VALUES", chunk)
        hashes.add(export(tmp_path / "m.gguf", model, outtype, threads=threads, force=True).sha256)
    assert len(hashes) == 1


def _unreadable(config: Mapping[str, Any]) -> Checkpoint:
    def refuse(start: int, stop: int) -> np.ndarray:
        raise AssertionError("a weight was read")

    tensors = {
        name: LazyTensor(name, array.shape, "BF16", "model.safetensors", refuse)
        for name, array in random_weights(config).items()
    }
    return Checkpoint("model", config, tensors)


def test_planning_reads_no_weight_and_knows_the_size_of_the_file(tmp_path: Path) -> None:
    planned = plan(_unreadable(LLAMA), "q8_0")
    assert planned.quantized
    assert planned.file_type == 7
    assert planned.parameters == sum(array.size for array in random_weights(LLAMA).values())
    result = export(tmp_path / "m.gguf", checkpoint(LLAMA, random_weights(LLAMA)), "q8_0")
    assert planned.file(METADATA).nbytes() == result.nbytes
    assert [(each.name, each.type, each.nbytes) for each in planned.tensors] == [
        (each.name, each.type, each.nbytes) for each in result.tensors
    ]
    assert {each.note for each in planned.tensors if "ffn_down" in each.name} == {
        "rows of 172 values do not divide into blocks of 32 of Q8_0: written as F16"
    }


def test_nan_and_infinity_are_refused_by_name_and_number(tmp_path: Path) -> None:
    weights = random_weights(LLAMA, ml_dtypes.bfloat16)
    weights["model.layers.1.mlp.up_proj.weight"][3, :2] = np.nan
    weights["model.layers.1.mlp.up_proj.weight"][170, 5] = -np.inf
    model = checkpoint(LLAMA, weights)
    words = "model.safetensors: tensor 'model.layers.1.mlp.up_proj.weight': 3 of 11008 values are NaN or infinite"
    with pytest.raises(InputError, match=words):
        export(tmp_path / "m.gguf", model, "q8_0")
    assert list(tmp_path.iterdir()) == []
    export(tmp_path / "m.gguf", model, "bf16", allow_nonfinite=True)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    back = gguf.quants.dequantize(found["blk.1.ffn_up.weight"].data, Q.BF16)
    assert (np.isnan(back).sum(), np.isinf(back).sum()) == (2, 1)


@pytest.mark.parametrize(("outtype", "value"), [("f16", 65520.0), ("q8_0", 1e7), ("q4_0", 6e5), ("q5_1", -7e4)])
def test_values_that_a_type_cannot_hold_are_refused_with_another_type(
    tmp_path: Path, outtype: str, value: float
) -> None:
    weights = random_weights(LLAMA)
    weights["model.layers.0.self_attn.q_proj.weight"][7, 7] = value
    with pytest.raises(InputError, match=r"tensor 'model\.layers\.0\.self_attn\.q_proj\.weight'.*(?i:bf16)"):
        export(tmp_path / "m.gguf", checkpoint(LLAMA, weights), outtype)
    assert list(tmp_path.iterdir()) == []
    export(tmp_path / "m.gguf", checkpoint(LLAMA, weights), "bf16")


def test_the_largest_value_of_f16_is_written(tmp_path: Path) -> None:
    weights = random_weights(LLAMA)
    weights["lm_head.weight"][0, 0] = 65519.0  # rounds down to 65504
    export(tmp_path / "m.gguf", checkpoint(LLAMA, weights), "f16")
    head = next(t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if t.name == "output.weight")
    assert head.data[0, 0] == 65504


def test_a_tied_head_is_not_written_and_decides_the_type_of_the_embedding(tmp_path: Path) -> None:
    config = {**LLAMA, "tie_word_embeddings": True}
    result = export(tmp_path / "m.gguf", checkpoint(config, random_weights(config)), "q4_0")
    types = {each.name: each.type for each in result.tensors}
    assert "output.weight" not in types
    assert types["token_embd.weight"] == "Q8_0"


def test_a_head_that_llama_cpp_needs_is_written_although_it_is_tied(tmp_path: Path) -> None:
    config = {
        "architectures": ["GPTNeoXForCausalLM"],
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 40,
        "max_position_embeddings": 16,
        "rotary_pct": 0.5,
        "tie_word_embeddings": True,
    }
    weights = random_weights(config)
    export(tmp_path / "m.gguf", checkpoint(config, weights), "f32")
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    np.testing.assert_array_equal(found["output.weight"], found["token_embd.weight"])
    np.testing.assert_array_equal(found["output.weight"], weights["gpt_neox.embed_in.weight"])
    fused = weights["gpt_neox.layers.0.attention.query_key_value.weight"].reshape(2, 3, 16, 32)
    np.testing.assert_array_equal(found["blk.0.attn_qkv.weight"], fused.swapaxes(0, 1).reshape(96, 32))


def test_tensors_that_only_gguf_has_come_first(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32}  # fmt: skip
    config = {**LLAMA, "rope_scaling": scaling}
    result = export(tmp_path / "m.gguf", checkpoint(config, random_weights(config)), "q4_0")
    assert [(result.tensors[0].name, result.tensors[0].type)] == [("rope_freqs.weight", "F32")]
    assert gguf.GGUFReader(tmp_path / "m.gguf").tensors[0].data.shape == (8,)


def test_a_conv1d_is_turned(tmp_path: Path) -> None:
    config = {"architectures": ["GPT2LMHeadModel"], "n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 40,
              "n_positions": 16}  # fmt: skip
    weights = random_weights(config)
    result = export(tmp_path / "m.gguf", checkpoint(config, weights), "q8_0")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    turned = np.ascontiguousarray(weights["transformer.h.0.mlp.c_fc.weight"].T)
    assert found["blk.0.ffn_up.weight"].data.tobytes() == gguf.quants.quantize(turned, Q.Q8_0).tobytes()
    assert {each.name: each.type for each in result.tensors}["position_embd.weight"] == "F32"


def test_an_offset_is_added_in_float32(tmp_path: Path) -> None:
    config = {"architectures": ["GemmaForCausalLM"], "hidden_size": 32, "intermediate_size": 64, "head_dim": 16,
              "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 40,
              "max_position_embeddings": 16, "hidden_act": "gelu_pytorch_tanh"}  # fmt: skip
    weights = random_weights(config, np.float16)
    export(tmp_path / "m.gguf", checkpoint(config, weights), "f16")
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    wanted = weights["model.norm.weight"].astype(np.float32) + np.float32(1)
    np.testing.assert_array_equal(found["output_norm.weight"], wanted)


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    model = checkpoint(LLAMA, random_weights(LLAMA))
    result = export(tmp_path / "m.gguf", model, "f16", progress=lambda *call: calls.append(call))
    total = sum(each.nbytes for each in result.tensors)
    assert calls[-1] == ("write", total, total)
    assert [done for _, done, _ in calls] == sorted({done for _, done, _ in calls})


def test_an_existing_file_and_a_full_disk_end_before_any_weight_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(_unreadable(LLAMA), "f16")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(OutputError, match="bytes are needed and 1000 are free"):
        write_gguf(tmp_path / "m.gguf", METADATA, planned, threads=1)
    monkeypatch.undo()
    (tmp_path / "m.gguf").write_bytes(b"old")
    with pytest.raises(UsageError, match="--force"):
        write_gguf(tmp_path / "m.gguf", METADATA, planned, threads=1)


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupt(phase: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "m.gguf", checkpoint(LLAMA, random_weights(LLAMA)), "f16", progress=interrupt)
    assert list(tmp_path.iterdir()) == []
