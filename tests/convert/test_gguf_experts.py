"""Mixtures of experts in GGUF files, and back; the oracles are the gguf package and what was stored."""

from __future__ import annotations

import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import quantpress as qp
from quantpress.convert.experts_apart import experts_apart
from quantpress.convert.gguf.export import write_gguf
from quantpress.convert.gguf.importance import Importance, ImportanceMatrix
from quantpress.convert.gguf.mixture import TypeOptions
from quantpress.convert.gguf.plan import plan_tensors
from quantpress.convert.open import open_checkpoint
from quantpress.convert.preflight import preflight
from quantpress.quant.errors import InputError
from quantpress.quant.ggml.codec import quantize_rows
from tests.families.cases import Case, write_checkpoint
from tests.tiny import randomize, write_tokenizer

MIXTRAL = {"num_local_experts": 3, "hidden_size": 64, "intermediate_size": 96}
GRANITE = {**MIXTRAL, "shared_intermediate_size": 32}
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(Case("m", "mixtral", MIXTRAL), tmp_path_factory.mktemp("mixtral") / "m")


@pytest.fixture(scope="module")
def granite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    case = Case("g", "granitemoe", GRANITE, model_type="granitemoeshared")
    return write_checkpoint(case, tmp_path_factory.mktemp("granite") / "g")


def press(folder: Path, path: Path, outtype: str, **more: Any) -> dict[str, Any]:
    checkpoint = open_checkpoint(folder)
    checked = preflight(checkpoint)
    plan = plan_tensors(checked.bindings, checked.spec, checked.hyper, TypeOptions(outtype), **more)
    metadata = {"general.architecture": ("string", checked.spec.gguf)}
    write_gguf(path, metadata, plan, threads=2, force=True)
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def test_a_stack_holds_the_experts_in_their_order(mixtral: Path, tmp_path: Path) -> None:
    stored = load_file(mixtral / "model.safetensors")
    found = press(mixtral, tmp_path / "f32.gguf", "f32")
    for part, name, shape in (("gate", "w1", (96, 64)), ("up", "w3", (96, 64)), ("down", "w2", (64, 96))):
        stack = found[f"blk.1.ffn_{part}_exps.weight"]
        assert tuple(stack.shape[::-1]) == (3, *shape)
        wanted = [stored[f"model.layers.1.block_sparse_moe.experts.{each}.{name}.weight"] for each in range(3)]
        np.testing.assert_array_equal(stack.data, np.stack(wanted))
    router = found["blk.1.ffn_gate_inp.weight"]
    np.testing.assert_array_equal(router.data, stored["model.layers.1.block_sparse_moe.gate.weight"])


def test_experts_published_in_one_tensor_are_cut_apart(granite: Path, tmp_path: Path) -> None:
    stored = load_file(granite / "model.safetensors")
    found = press(granite, tmp_path / "f32.gguf", "f32")
    both = stored["model.layers.0.block_sparse_moe.input_linear.weight"]
    np.testing.assert_array_equal(found["blk.0.ffn_gate_exps.weight"].data, both[:, :96])
    np.testing.assert_array_equal(found["blk.0.ffn_up_exps.weight"].data, both[:, 96:])
    shared = stored["model.layers.0.shared_mlp.input_linear.weight"]
    np.testing.assert_array_equal(found["blk.0.ffn_gate_shexp.weight"].data, shared[:32])
    np.testing.assert_array_equal(found["blk.0.ffn_up_shexp.weight"].data, shared[32:])


def test_a_router_stays_in_float32(mixtral: Path, tmp_path: Path) -> None:
    found = press(mixtral, tmp_path / "q8.gguf", "q8_0")
    assert found["blk.0.ffn_gate_inp.weight"].tensor_type.name == "F32"
    assert found["blk.0.ffn_up_exps.weight"].tensor_type.name == "Q8_0"


@pytest.mark.parametrize("family", ["mixtral", "granite"])
def test_a_file_gives_the_stored_tensors_back(family: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue(family)
    qp.export_gguf(folder, tmp_path / "f32.gguf", outtype="f32", verify=False)
    stored, back = load_file(folder / "model.safetensors"), open_checkpoint(tmp_path / "f32.gguf")
    assert set(back.tensors) == set(stored)
    for name, values in stored.items():
        np.testing.assert_array_equal(back.tensors[name].read(), values, err_msg=name)
    some = next(name for name in stored if stored[name].ndim == 3) if family == "granite" else EXPERT
    np.testing.assert_array_equal(back.tensors[some].read_rows(1, 2), stored[some][1:2])


def test_each_expert_is_encoded_with_its_own_importance(mixtral: Path, tmp_path: Path) -> None:
    name, random = "blk.1.ffn_gate_exps.weight", np.random.default_rng(1)
    sums, counts = random.uniform(0.1, 9, (3, 64)).astype(np.float32), np.array([5, 0, 7], np.float32)
    matrix = ImportanceMatrix({name: Importance(sums, counts)})
    found = press(mixtral, tmp_path / "q4.gguf", "q4_0", importance=matrix)[name]
    stored = load_file(mixtral / "model.safetensors")
    for expert in range(3):
        rows = stored[f"model.layers.1.block_sparse_moe.experts.{expert}.w1.weight"]
        weights = sums[expert] / counts[expert] if counts[expert] else np.ones(64, np.float32)
        np.testing.assert_array_equal(found.data[expert], quantize_rows("Q4_0", rows, weights))


def test_codes_of_every_expert_are_kept(mixtral: Path, tmp_path: Path) -> None:
    qp.quantize(mixtral, tmp_path / "codes", method="rtn", bits=4, group_size=32, verify=False, threads=1)
    source = open_checkpoint(tmp_path / "codes")
    found = press(tmp_path / "codes", tmp_path / "q4.gguf", "q4_1", quantized=source.quantized)
    stack = found["blk.1.ffn_gate_exps.weight"]
    values = gguf.quants.dequantize(stack.data, stack.tensor_type)
    for expert in range(3):
        name = f"model.layers.1.block_sparse_moe.experts.{expert}.w1.weight"
        # the minimum of a block is its zero times its scale, rounded to float16: half a unit in its last place
        wanted = source.quantized[name].read().dequantize()
        np.testing.assert_allclose(values[expert], wanted, rtol=0, atol=2**-10 * np.abs(wanted).max())


def test_experts_stand_in_memory_one_at_a_time(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 1, "num_local_experts": 24}
    folder = write_checkpoint(Case("m", "mixtral", sizes), tmp_path / "m")
    checkpoint = open_checkpoint(folder)
    checked = preflight(checkpoint)
    plan = plan_tensors(checked.bindings, checked.spec, checked.hyper, TypeOptions("f16"))
    expert = 4 * 256 * 1024
    tracemalloc.start()
    write_gguf(tmp_path / "m.gguf", {"general.architecture": ("string", "llama")}, plan, threads=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # four tasks wait at most, each with an expert in float32 and in float16, while a fifth is read and looked through
    # for values that are not finite: 4 * 1.5 + 2.5, the header, and what another thread frees late; a stack is 24
    assert peak < 12 * expert


def test_a_stack_of_another_number_of_experts_is_refused(mixtral: Path, tmp_path: Path) -> None:
    qp.export_gguf(mixtral, tmp_path / "f32.gguf", outtype="f32", verify=False)
    data = (tmp_path / "f32.gguf").read_bytes()
    key = b"llama.expert_count" + (4).to_bytes(4, "little")
    assert data.count(key + (3).to_bytes(4, "little")) == 1
    changed = data.replace(key + (3).to_bytes(4, "little"), key + (4).to_bytes(4, "little"))
    (tmp_path / "bad.gguf").write_bytes(changed)
    with pytest.raises(InputError, match=r"ffn_gate_inp.* has shape \(3, 64\), wanted \(4, 64\)"):
        open_checkpoint(tmp_path / "bad.gguf")


def test_stacked_experts_of_transformers_5_have_their_published_names(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**MIXTRAL, "vocab_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", num_key_value_heads=2, **settings))
    randomize(model, 0, zero_centred=False)
    for form, original in (("published", True), ("stacked", False)):
        model.float().save_pretrained(tmp_path / form, save_original_format=original)
        write_tokenizer(tmp_path / form)
    published, stacked = (load_file(tmp_path / form / "model.safetensors") for form in ("published", "stacked"))
    assert any(values.ndim == 3 for values in stacked.values())
    checkpoint = open_checkpoint(tmp_path / "stacked")
    checked = preflight(checkpoint)
    for _, _, tensor in checked.bindings:
        name = tensor.name.replace(".mlp.gate.", ".block_sparse_moe.gate.")
        np.testing.assert_array_equal(tensor.read(), published[name], err_msg=name)
    apart = experts_apart(checkpoint, checked)
    assert {name for name, tensor in apart.tensors.items() if len(tensor.shape) > 2} == set()
    assert EXPERT in apart.tensors
    preflight(apart)


def rewritten(folder: Path, out: Path, tensors: Mapping[str, Any]) -> Path:
    out.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((folder / name).read_bytes())
    save_file(dict(tensors), out / "model.safetensors")
    return out


def test_a_missing_expert_is_named(mixtral: Path, tmp_path: Path) -> None:
    stored = load_file(mixtral / "model.safetensors")
    del stored[EXPERT]
    with pytest.raises(InputError, match=r"1 tensor .*experts\.2\.w1\.weight.* missing"):
        preflight(open_checkpoint(rewritten(mixtral, tmp_path / "bad", stored)))


def test_an_expert_too_many_is_named(mixtral: Path, tmp_path: Path) -> None:
    stored = load_file(mixtral / "model.safetensors")
    more = EXPERT.replace("experts.2", "experts.3")
    with pytest.raises(InputError, match=r"1 tensor .*experts\.3\.w1\.weight.* unexpected"):
        preflight(open_checkpoint(rewritten(mixtral, tmp_path / "bad", {**stored, more: stored[EXPERT]})))


def test_an_expert_of_another_shape_is_named(mixtral: Path, tmp_path: Path) -> None:
    stored = load_file(mixtral / "model.safetensors")
    stored[EXPERT] = stored[EXPERT][:-1]
    with pytest.raises(InputError, match=r"experts\.2\.w1\.weight.* is \(95, 64\), wanted \(96, 64\)"):
        preflight(open_checkpoint(rewritten(mixtral, tmp_path / "bad", stored)))
