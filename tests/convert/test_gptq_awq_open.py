"""GPTQ and AWQ folders open as the numbers their codes stand for, whoever wrote them and however they are labelled."""

from __future__ import annotations

import json
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from quantpress.convert.awq.pack import FORMAT as AWQ
from quantpress.convert.gptq.pack import GPTQ_V1, GPTQ_V2
from quantpress.convert.open import open_checkpoint
from quantpress.convert.preflight import preflight
from quantpress.convert.quantized import PackFormat
from quantpress.quant.errors import InputError
from quantpress.quant.grid import Grid
from tests.packed_folders import Tensors, change_settings, change_tensors, pack_folder, write_config
from tests.quantized_tensors import fields_of, read_awq, read_gptq
from tests.tiny import tiny_checkpoint

pytest.importorskip("torch")
pytest.importorskip("transformers")

_NAME = "model.layers.1.mlp.down_proj.weight"
_CASES: dict[str, tuple[PackFormat, Grid]] = {
    "v1 4 bits": (GPTQ_V1, Grid(4, 32)),
    "v1 8 bits, rows": (GPTQ_V1, Grid(8, -1)),
    "v2 4 bits, short last group": (GPTQ_V2, Grid(4, 64, symmetric=False)),
    "v2 3 bits": (GPTQ_V2, Grid(3, 32, symmetric=False)),
    "v2 2 bits": (GPTQ_V2, Grid(2, 16, symmetric=False)),
    "awq": (AWQ, Grid(4, 32, symmetric=False)),
    "awq, rows": (AWQ, Grid(4, -1, symmetric=False)),
    "awq, symmetric": (AWQ, Grid(4, 32)),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {family: tiny_checkpoint(root / family, family) for family in ("llama", "gpt2", "phi3", "gptneox", "qwen2")}


@pytest.fixture
def v1(sources: dict[str, Path], tmp_path: Path) -> Path:
    pack_folder(sources["llama"], tmp_path / "v1", GPTQ_V1, Grid(4, 32))
    return tmp_path / "v1"


def _parts(folder: Path, name: str) -> Tensors:
    module = name.removesuffix(".weight")
    tensors = load_file(folder / "model.safetensors")
    return {part: tensors[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx") if
            f"{module}.{part}" in tensors}  # fmt: skip


@pytest.mark.parametrize("case", _CASES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_are_the_numbers_of_their_codes(
    sources: dict[str, Path], tmp_path: Path, family: str, case: str
) -> None:
    fmt, grid = _CASES[case]
    packed = pack_folder(sources[family], tmp_path / "q", fmt, grid)
    opened = open_checkpoint(tmp_path / "q")
    assert (opened.format, "quantization_config" in opened.config) == (fmt.name, False)
    assert opened.storage_types == {name: str(tensor.form) for name, tensor in packed.items()}
    assert list(opened.quantized) == [name for name in opened.tensors if name in packed]
    assert preflight(opened).spec.family == family  # every name and shape is the family's, Conv1D's turned ones too
    for name, tensor in packed.items():
        parts = _parts(tmp_path / "q", name)
        wanted = (
            read_awq(parts, tensor.group_size)
            if fmt is AWQ
            else read_gptq(parts, grid.bits, version=1 + (fmt is GPTQ_V2))
        )
        lazy = opened.tensor(name)
        assert (lazy.dtype, lazy.wide_rows is not None) == ("F16", True)
        wanted = wanted.T if family == "gpt2" else wanted
        np.testing.assert_array_equal(lazy.exact_rows(0, lazy.rows), wanted)
        np.testing.assert_array_equal(lazy.read(), wanted.astype(np.float16))
        found = opened.quantized[name]
        assert found.form == tensor.form == found.read().form
        np.testing.assert_array_equal(found.read().codes, tensor.codes)
        np.testing.assert_array_equal(found.read().zeros(), tensor.zeros())
        np.testing.assert_array_equal(found.read().scale, tensor.scale)


@pytest.mark.parametrize("family", ["phi3", "gptneox", "qwen2"])
@pytest.mark.parametrize("fmt", [GPTQ_V1, AWQ], ids=["gptq", "awq"])
def test_fused_names_and_biases_open(sources: dict[str, Path], tmp_path: Path, family: str, fmt: PackFormat) -> None:
    packed = pack_folder(sources[family], tmp_path / "q", fmt, Grid(4, 32))
    opened = open_checkpoint(tmp_path / "q")
    preflight(opened)
    source = open_checkpoint(sources[family])
    assert set(opened.tensors) == set(source.tensors)
    for name, tensor in source.tensors.items():
        if name not in packed:
            np.testing.assert_array_equal(opened.tensor(name).read(), tensor.read().astype(np.float16))


@pytest.mark.parametrize("case", ["v1 4 bits", "awq"])
def test_rows_can_be_read_in_any_order_and_from_threads(sources: dict[str, Path], tmp_path: Path, case: str) -> None:
    pack_folder(sources["llama"], tmp_path / "q", *_CASES[case])
    tensor = open_checkpoint(tmp_path / "q").tensor(_NAME)
    whole = tensor.read()
    spans = [(0, 1), (5, 6), (63, 64), (2, 2), (10, 41), (0, 64)]
    with ThreadPoolExecutor(4) as pool:
        for (start, stop), part in zip(spans, pool.map(lambda span: tensor.read_rows(*span), spans), strict=True):
            assert part.tobytes() == whole[start:stop].tobytes()
    with pytest.raises(IndexError):
        tensor.read_rows(0, 65)


def test_modules_of_different_forms_and_skipped_ones_open(sources: dict[str, Path], tmp_path: Path) -> None:
    def grid(name: str) -> Grid:
        return Grid(8, 32) if "o_proj" in name else Grid(2, 16, symmetric=False) if "layers.1.mlp" in name else Grid()

    packed = pack_folder(sources["llama"], tmp_path / "q", GPTQ_V2, grid, skip=lambda name: "layers.2.mlp.up" in name)
    opened = open_checkpoint(tmp_path / "q")
    preflight(opened)
    assert {name: lazy.form for name, lazy in opened.quantized.items()} == {
        name: packed[name].form for name in opened.quantized
    }
    assert "model.layers.2.mlp.up_proj.weight" not in opened.quantized
    assert len({str(tensor.form) for tensor in packed.values()}) >= 3


def test_a_quantized_head_is_a_weight_like_others(sources: dict[str, Path], tmp_path: Path) -> None:
    pack_folder(sources["llama"], tmp_path / "q", GPTQ_V1, Grid(4, 32))
    packed = pack_folder(sources["llama"], tmp_path / "other", GPTQ_V1, Grid(4, 32, symmetric=True))
    some = packed["model.layers.0.self_attn.q_proj.weight"]
    head = type(some)(np.tile(some.codes, (5, 1)), np.tile(some.scale, (5, 1)), None, 4, 32)

    def swap(tensors: Tensors) -> None:
        del tensors["lm_head.weight"]
        tensors.update(GPTQ_V1.pack("lm_head.weight", head, head.form))

    change_tensors(tmp_path / "q", swap)
    change_settings(tmp_path / "q", lm_head=True)
    opened = open_checkpoint(tmp_path / "q")
    preflight(opened)
    np.testing.assert_array_equal(opened.tensor("lm_head.weight").exact_rows(0, 320), head.dequantize())


@pytest.mark.parametrize(("fmt", "bits"), [(GPTQ_V1, 4), (GPTQ_V2, 4), (GPTQ_V1, 3), (GPTQ_V2, 8)])
def test_a_file_with_the_wrong_version_on_it_is_read_right_and_said_so(
    sources: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, fmt: PackFormat, bits: int
) -> None:
    packed = pack_folder(sources["llama"], tmp_path / "q", fmt, Grid(bits, 32))
    other = {"gptq": "gptq_v2", "gptq_v2": "gptq"}[fmt.name]
    change_settings(tmp_path / "q", checkpoint_format=other)
    with caplog.at_level(logging.WARNING, logger="quantpress"):
        opened = open_checkpoint(tmp_path / "q")
    assert opened.format == fmt.name
    assert f"says {other}, but symmetric zeros are stored as {fmt.name}" in caplog.text
    np.testing.assert_array_equal(opened.tensor(_NAME).exact_rows(0, 64), packed[_NAME].dequantize())


@pytest.mark.parametrize("changes", [{"checkpoint_format": ...}, {"checkpoint_format": None, "format": "gptq"}])
def test_what_says_no_version_is_version_1(v1: Path, changes: dict[str, Any]) -> None:
    change_settings(v1, sym=False, **changes)
    opened = open_checkpoint(v1)
    zeros = opened.quantized[_NAME].read().zero
    assert opened.format == "gptq"
    assert zeros is not None
    assert (zeros == 8).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zeros_of_0_in_version_1_come_back_as_gptqmodel_writes_them(
    sources: dict[str, Path], tmp_path: Path, bits: int
) -> None:
    """GPTQModel takes 1 from all fields of a word at once, and adds it at once (convert_gptq_v2_to_v1_format).

    Fields of 3 bits lie across words: there each wraps by itself.
    """
    packed = pack_folder(sources["llama"], tmp_path / "q", GPTQ_V2, Grid(bits, 32, symmetric=False))
    ones = np.uint32({2: 0x55555555, 3: 0, 4: 0x11111111, 8: 0x01010101}[bits])
    zeros = np.random.default_rng(0).integers(0, 2, (3, 64), np.uint8)
    tensor = packed[_NAME]
    changed = type(tensor)(tensor.codes, tensor.scale, np.ascontiguousarray(zeros.T), bits, 32)

    def to_version_1(tensors: Tensors) -> None:
        tensors.update(GPTQ_V2.pack(_NAME, changed, changed.form))
        for name in [name for name in tensors if name.endswith(".qzeros")]:
            words = tensors[name]
            tensors[name] = _less_one_of_3_bits(words) if bits == 3 else (words.view(np.uint32) - ones).view(np.int32)

    change_tensors(tmp_path / "q", to_version_1)
    change_settings(tmp_path / "q", checkpoint_format="gptq")
    found = open_checkpoint(tmp_path / "q").quantized[_NAME].read().zero
    np.testing.assert_array_equal(found, zeros.T)


def _less_one_of_3_bits(words: np.ndarray) -> np.ndarray:
    lessened = (fields_of(words, 3).astype(int) - 1) % 8
    bits = (lessened[..., None] >> np.arange(3)) & 1
    return np.packbits(bits.astype(np.uint8).reshape(len(words), -1), axis=1, bitorder="little").view(np.int32)


def test_columns_ordered_by_activation_open(v1: Path) -> None:
    order = np.random.default_rng(3).permutation(np.arange(96) // 32).astype(np.int32)
    name = _NAME.replace("weight", "g_idx")

    def reorder(tensors: Tensors) -> None:
        tensors[name] = order

    change_tensors(v1, reorder)
    with pytest.raises(InputError, match=r"g_idx' orders the columns, but desc_act is false"):
        open_checkpoint(v1).tensor(_NAME).read()
    change_settings(v1, desc_act=True)
    opened = open_checkpoint(v1)
    assert [weight for weight, lazy in opened.quantized.items() if lazy.form.ordered] == [_NAME]
    found = opened.quantized[_NAME].read()
    assert found.form == opened.quantized[_NAME].form
    np.testing.assert_array_equal(found.g_idx, order)
    wanted = read_gptq(_parts(v1, _NAME), 4, version=1)
    np.testing.assert_array_equal(opened.tensor(_NAME).exact_rows(0, 64), wanted)


@pytest.mark.parametrize("desc_act", [False, True])
def test_an_order_of_zeros_or_none_at_all_means_columns_in_order(v1: Path, desc_act: bool) -> None:
    wanted = open_checkpoint(v1).tensor(_NAME).read()

    def empty(tensors: Tensors) -> None:
        tensors[_NAME.replace("weight", "g_idx")][:] = 0
        del tensors["model.layers.0.mlp.down_proj.g_idx"]

    change_tensors(v1, empty)
    change_settings(v1, desc_act=desc_act)
    opened = open_checkpoint(v1)
    preflight(opened)
    assert not any(lazy.form.ordered for lazy in opened.quantized.values())
    np.testing.assert_array_equal(opened.tensor(_NAME).read(), wanted)


def test_biases_of_zeros_that_autogptq_added_are_dropped(v1: Path) -> None:
    name = _NAME.replace("weight", "bias")

    def add(tensors: Tensors) -> None:
        tensors[name] = np.zeros(64, np.float16)

    change_tensors(v1, add)
    assert name not in open_checkpoint(v1).tensors

    def fill(tensors: Tensors) -> None:
        tensors[name][3] = 1

    change_tensors(v1, fill)
    with pytest.raises(InputError, match=r"down_proj\.bias' *\)? unexpected"):
        preflight(open_checkpoint(v1))


def test_biases_of_zeros_that_the_family_knows_are_kept(sources: dict[str, Path], tmp_path: Path) -> None:
    pack_folder(sources["qwen2"], tmp_path / "q", GPTQ_V1, Grid(4, 32))
    name = "model.layers.0.self_attn.q_proj.bias"

    def empty(tensors: Tensors) -> None:
        tensors[name][:] = 0

    change_tensors(tmp_path / "q", empty)
    opened = open_checkpoint(tmp_path / "q")
    preflight(opened)
    assert not opened.tensor(name).read().any()


def _older(folder: Path, file: str, settings: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    write_config(folder, config)
    (folder / "quantize_config.json").unlink(missing_ok=True)
    (folder / file).write_text(json.dumps(settings))


@pytest.mark.parametrize("base", [None, "gptq_model-4bit-32g", "my-model"])
def test_older_folders_of_autogptq_open(v1: Path, base: str | None) -> None:
    wanted = open_checkpoint(v1).tensor(_NAME).read()
    settings: dict[str, Any] = {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "sym": True}
    settings |= {"true_sequential": True, "model_file_base_name": base if base == "my-model" else None}
    _older(v1, "quantize_config.json", settings)
    if base:
        shutil.move(v1 / "model.safetensors", v1 / f"{base}.safetensors")
    opened = open_checkpoint(v1)
    np.testing.assert_array_equal(opened.tensor(_NAME).read(), wanted)
    assert sorted(file.path.name for file in opened.files if file.path.name.startswith(("quant", "gptq", "my"))) == [
        *([f"{base}.safetensors"] if base else []),
        "quantize_config.json",
    ]


def test_older_folders_of_autoawq_open(sources: dict[str, Path], tmp_path: Path) -> None:
    packed = pack_folder(sources["llama"], tmp_path / "q", *_CASES["awq"])
    _older(tmp_path / "q", "quant_config.json", {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"})
    opened = open_checkpoint(tmp_path / "q")
    assert opened.format == "awq"
    np.testing.assert_array_equal(opened.tensor(_NAME).exact_rows(0, 64), packed[_NAME].dequantize())


def test_a_folder_without_packed_tensors_ignores_such_files(sources: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(sources["llama"], tmp_path / "plain")
    (tmp_path / "plain" / "quantize_config.json").write_text("{}")
    assert not open_checkpoint(tmp_path / "plain").quantized


def test_scales_of_gptneox_activations_are_ones_that_are_dropped(sources: dict[str, Path], tmp_path: Path) -> None:
    """transformers' AWQ modules of this family want them: ScaledActivation."""
    pack_folder(sources["gptneox"], tmp_path / "q", AWQ, Grid(4, 32))
    name = "gpt_neox.layers.2.mlp.act.scales"
    found = load_file(tmp_path / "q" / "model.safetensors")
    assert [key for key in found if "act.scales" in key] == [name.replace("2", str(layer)) for layer in range(3)]
    assert found[name].tolist() == [1.0] * 96
    assert name not in open_checkpoint(tmp_path / "q").tensors

    def scale(tensors: Tensors) -> None:
        tensors[name][5] = 2

    change_tensors(tmp_path / "q", scale)
    with pytest.raises(InputError, match=r"act\.scales' scales an activation by other numbers than 1"):
        open_checkpoint(tmp_path / "q")


def test_a_gptqmodel_awq_folder_opens(sources: dict[str, Path], tmp_path: Path) -> None:
    """GPTQModel says checkpoint_format gemm and sym; zero_point is AutoAWQ's word."""
    pack_folder(sources["llama"], tmp_path / "q", *_CASES["awq, symmetric"])
    change_settings(tmp_path / "q", version=..., zero_point=..., meta=..., checkpoint_format="gemm", sym=True)
    assert not open_checkpoint(tmp_path / "q").quantized[_NAME].form.symmetric
    change_settings(tmp_path / "q", zero_point=False)
    assert open_checkpoint(tmp_path / "q").quantized[_NAME].form.symmetric


def test_dynamic_rules_of_others_are_followed(sources: dict[str, Path], tmp_path: Path) -> None:
    pack_folder(sources["llama"], tmp_path / "q", GPTQ_V1, lambda name: Grid(8, 32) if "mlp" in name else Grid(4, 32))
    rules = {"-:.*\\.(visual|router)": {}, r"(?:model\.)?layers\.\d+\.mlp\..*_proj": {"bits": 8, "mse": 2.4}}
    change_settings(tmp_path / "q", bits=4, group_size=32, dynamic=rules)
    assert {lazy.form.bits for name, lazy in open_checkpoint(tmp_path / "q").quantized.items() if "mlp" in name} == {8}
    change_settings(tmp_path / "q", dynamic={"model": {}, **rules})  # the first that fits decides
    with pytest.raises(InputError, match=r"wanted .* of 4 bits|whole codes of 4 bits|of 4 bits in groups"):
        open_checkpoint(tmp_path / "q")


def test_a_pattern_that_would_run_for_years_is_answered_or_refused_at_once(v1: Path) -> None:
    change_settings(v1, dynamic={"(model|odel|m)*(.*.*)*(a+)+$b": {"bits": 8}})
    assert open_checkpoint(v1).quantized[_NAME].form.bits == 4
