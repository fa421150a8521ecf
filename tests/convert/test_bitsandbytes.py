"""Checkpoints that transformers saved in 4 and 8 bits open as the numbers that bitsandbytes computes with."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantpress.convert.bitsandbytes import dequantized, is_bitsandbytes
from quantpress.convert.checkpoint import DTYPES, Checkpoint, LazyTensor
from quantpress.convert.open import open_checkpoint
from quantpress.convert.preflight import preflight
from quantpress.convert.safetensors_reader import open_shard
from quantpress.quant.errors import InputError
from tests.tiny import tiny_checkpoint

torch = pytest.importorskip("torch")
functional: Any = pytest.importorskip("bitsandbytes.functional", reason="the oracle, bitsandbytes, is not installed")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers needs accelerate to quantize")

_NAME = "model.layers.0.mlp.down_proj.weight"  # 64 x 96: blocks of 64 go over the ends of rows
_STATE = f"{_NAME}.quant_state.bitsandbytes__nf4"
_SETTINGS: dict[str, dict[str, Any]] = {
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "stored-as-bf16": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
    "int8": {"load_in_8bit": True},
}


def save_quantized(
    source: Path, target: Path, *, dtype: str = "bfloat16", shard: str = "1GB", **settings: Any
) -> dict[str, np.ndarray]:
    """Saves a model as transformers quantizes it; gives what bitsandbytes dequantizes every weight to, in float32."""
    config = transformers.BitsAndBytesConfig(**settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, dtype=getattr(torch, dtype)
    )
    model.save_pretrained(target, max_shard_size=shard)
    values = {}
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if type(module).__name__ == "Linear4bit":
            state = weight.quant_state
            state_shape = state.shape
            state.shape = torch.Size((1, state_shape.numel()))  # see test_dequantized_values_... in tests/quant
            flat = functional.dequantize_4bit(weight.data.view(torch.uint8).reshape(-1, 1), state)
            values[f"{path}.weight"] = flat.float().reshape(state_shape).numpy()
        elif type(module).__name__ == "Linear8bitLt":
            values[f"{path}.weight"] = functional.int8_vectorwise_dequant(weight.data, weight.SCB).numpy()
    return values


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bitsandbytes")
    return {family: tiny_checkpoint(root / family, family, dtype="bfloat16") for family in ("llama", "gpt2")}


@pytest.fixture(scope="module")
def nested(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nested")
    save_quantized(sources["llama"], folder, **_SETTINGS["nf4-double"])
    return folder


@pytest.mark.parametrize("case", _SETTINGS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_quantized_model_opens_with_the_values_of_bitsandbytes(
    sources: dict[str, Path], family: str, case: str, tmp_path: Path
) -> None:
    theirs = save_quantized(sources[family], tmp_path, **_SETTINGS[case])
    opened = open_checkpoint(tmp_path)
    kind = case.split("-")[0] if case != "stored-as-bf16" else "nf4"
    assert opened.storage_types == dict.fromkeys(theirs, kind)
    assert "quantization_config" not in opened.config
    checked = preflight(opened)  # every shape is the family's, also of Conv1D weights, which are saved turned round
    assert checked.spec.family == family
    for name, values in theirs.items():
        tensor = opened.tensor(name)
        assert tensor.dtype == "BF16"
        wanted = values.T if family == "gpt2" else values
        if case == "int8":
            assert tensor.wide_rows is not None
            np.testing.assert_array_equal(tensor.wide_rows(0, tensor.rows), wanted)
            wanted = wanted.astype(DTYPES["BF16"])
        else:
            assert tensor.wide_rows is None
        np.testing.assert_array_equal(tensor.read().astype(np.float32), wanted.astype(np.float32))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_weights_have_the_type_that_bitsandbytes_gives_them(
    sources: dict[str, Path], tmp_path: Path, dtype: str
) -> None:
    theirs = save_quantized(sources["llama"], tmp_path, dtype=dtype, **_SETTINGS["nf4-double"])
    tensor = open_checkpoint(tmp_path).tensor(_NAME)
    assert tensor.dtype == {"float16": "F16", "float32": "F32"}[dtype]
    np.testing.assert_array_equal(tensor.read().astype(np.float32), theirs[_NAME])


@pytest.mark.parametrize("case", ["nf4-double", "stored-as-bf16", "int8"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_can_be_read_in_any_order_and_from_threads(
    sources: dict[str, Path], family: str, case: str, tmp_path: Path
) -> None:
    save_quantized(sources[family], tmp_path, **_SETTINGS[case])
    opened = open_checkpoint(tmp_path)
    ranges = [(0, 1), (5, 6), (1, 3), (7, 8), (63, 64), (2, 2), (10, 41), (0, 64)]
    for name in list(opened.storage_types)[:4]:
        tensor = opened.tensor(name)
        whole = tensor.read()
        spans = [span for span in ranges if span[1] <= tensor.rows]
        with ThreadPoolExecutor(4) as pool:
            parts = list(pool.map(lambda span: tensor.read_rows(*span), spans))  # noqa: B023 - used at once
        for (start, stop), part in zip(spans, parts, strict=True):
            assert part.shape == (stop - start, *tensor.shape[1:])
            assert part.flags.c_contiguous
            assert part.tobytes() == whole[start:stop].tobytes()
    with pytest.raises(IndexError):
        open_checkpoint(tmp_path).tensor(_NAME if family == "llama" else name).read_rows(0, 10_000)


@pytest.mark.parametrize("storage", ["bfloat16", "float32"])
def test_rows_that_begin_inside_an_element_of_the_stored_type_are_read(tmp_path: Path, storage: str) -> None:
    source = tiny_checkpoint(tmp_path / "base", "llama", dtype="bfloat16", intermediate_size=98)  # 49 bytes a row
    settings = {**_SETTINGS["nf4-double"], "bnb_4bit_quant_storage": getattr(torch, storage)}
    theirs = save_quantized(source, tmp_path / "nf4", **settings)
    tensor = open_checkpoint(tmp_path / "nf4").tensor(_NAME)
    for row in range(64):
        part = tensor.read_rows(row, row + 1)
        np.testing.assert_array_equal(part.astype(np.float32), theirs[_NAME][row : row + 1])


def test_sharded_models_open(sources: dict[str, Path], nested: Path, tmp_path: Path) -> None:
    save_quantized(sources["llama"], tmp_path, shard="40KB", **_SETTINGS["nf4-double"])
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    one, many = open_checkpoint(nested), open_checkpoint(tmp_path)
    assert one.storage_types == many.storage_types
    assert one.tensor(_NAME).read().tobytes() == many.tensor(_NAME).read().tobytes()


def _raw(folder: Path) -> Checkpoint:
    """The checkpoint as its file says, before anything is dequantized."""
    config = json.loads((folder / "config.json").read_text())
    return Checkpoint("tiny", config, open_shard(folder / "model.safetensors").tensors)


def _lazy(name: str, values: np.ndarray) -> LazyTensor:
    dtype = next(key for key, kind in DTYPES.items() if kind == values.dtype)
    return LazyTensor(
        name, values.shape, dtype, "x", lambda start, stop: values[start:stop] if values.shape else values
    )


def _with(checkpoint: Checkpoint, **parts: np.ndarray | None) -> Checkpoint:
    """Changes or removes parts of one weight: `absmax`, `nested_absmax`, ..., `weight` for the bytes themselves."""
    tensors = dict(checkpoint.tensors)
    for part, values in parts.items():
        name = {"weight": _NAME, "state": _STATE}.get(part, f"{_NAME}.{part}")
        tensors.pop(name, None)
        if values is not None:
            tensors[name] = _lazy(name, values)
    return replace(checkpoint, tensors=tensors)


def _state(nested: Path, **changes: Any) -> np.ndarray:
    state = json.loads(_raw(nested).tensor(_STATE).read().tobytes())
    state = {key: value for key, value in {**state, **changes}.items() if value is not ...}
    return np.frombuffer(json.dumps(state).encode(), np.uint8)


_HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "no absmax": ({"absmax": None}, r"absmax' is missing beside"),
    "no bytes": ({"weight": None}, r"down_proj.weight' is missing beside"),
    "no quant_map": ({"quant_map": None}, r"quant_map' is missing beside"),
    "no nested map": ({"nested_quant_map": None}, r"nested_quant_map' is missing beside"),
    "fewer scales": ({"absmax": np.zeros(95, np.uint8)}, r"absmax' is U8 of shape \(95,\), wanted U8 of shape \(96,\)"),
    "plain scales": ({"absmax": np.zeros(96, np.float32)}, r"absmax' is F32 of shape .*, wanted U8"),
    "two outer scales": ({"nested_absmax": np.zeros(2, np.float32)}, r"wanted F32 of shape \(1,\)"),
    "short map": ({"nested_quant_map": np.zeros(255, np.float32)}, r"wanted F32 of shape \(256,\)"),
    "wild map": ({"nested_quant_map": np.full(256, 1e9, np.float32)}, r"levels outside \[-1, 1\]"),
    "NaN in the map": ({"nested_quant_map": np.full(256, np.nan, np.float32)}, r"levels outside \[-1, 1\]"),
    "other levels": ({"quant_map": np.linspace(-1, 1, 16, dtype=np.float32)}, r"other levels than nf4"),
    "too few bytes": ({"weight": np.zeros((3071, 1), np.uint8)}, r"wanted a column of 3072 bytes for nf4"),
    "too many bytes": ({"weight": np.zeros((3073, 1), np.uint8)}, r"wanted a column of 3072 bytes for nf4"),
    "a row of bytes": ({"weight": np.zeros((1, 3072), np.uint8)}, r"wanted a column of 3072 bytes for nf4"),
    "state of floats": ({"state": np.zeros(8, np.float32)}, r"wanted U8 with at most 4096 bytes"),
    "long state": ({"state": np.full(5000, 32, np.uint8)}, r"wanted U8 with at most 4096 bytes"),
    "state is no JSON": ({"state": np.full(8, 65, np.uint8)}, r"not JSON"),
    "state is a list": ({"state": np.frombuffer(b"[1, 2]", np.uint8)}, r"wanted the keys"),
    "scales twice": ({"state": {"nested_offset": ..., "nested_dtype": ..., "nested_blocksize": ...}}, r"absmax' is U8"),
    "half nested": ({"state": {"nested_dtype": ...}}, r"wanted the keys"),
    "unknown key": ({"state": {"code": 1}}, r"wanted the keys"),
    "other type": ({"state": {"quant_type": "fp4"}}, r"quant_type is 'fp4', wanted nf4"),
    "odd block": ({"state": {"blocksize": 63}}, r"blocksize is 63"),
    "true block": ({"state": {"blocksize": True}}, r"blocksize is True"),
    "block with a point": ({"state": {"blocksize": 64.0}}, r"blocksize is 64\.0"),
    "block of text": ({"state": {"blocksize": "64"}}, r"blocksize is '64'"),
    "unknown dtype": ({"state": {"dtype": "float64"}}, r"dtype is 'float64'"),
    "dtype in a list": ({"state": {"dtype": ["bfloat16"]}}, r"dtype is \['bfloat16'\]"),
    "no shape": ({"state": {"shape": None}}, r"shape is None"),
    "empty shape": ({"state": {"shape": []}}, r"shape is \[\]"),
    "zero rows": ({"state": {"shape": [0, 96]}}, r"shape is \[0, 96\]"),
    "negative rows": ({"state": {"shape": [-64, -96]}}, r"shape is \[-64, -96\]"),
    "huge rows": ({"state": {"shape": [1 << 46, 1 << 46]}}, r"wanted a column of"),
    "other shape": ({"state": {"shape": [64, 98]}}, r"wanted a column of 3136 bytes"),
    "nested block of 32": ({"state": {"nested_blocksize": 32}}, r"nested_blocksize is 32"),
    "nested type": ({"state": {"nested_dtype": "float16"}}, r"nested_dtype is 'float16'"),
    "offset of text": ({"state": {"nested_offset": "0"}}, r"nested_offset is '0'"),
    "huge offset": ({"state": {"nested_offset": 1e39}}, r"nested_offset is 1e\+39"),
}


@pytest.mark.parametrize("case", _HOSTILE)
def test_parts_that_do_not_fit_are_refused_before_anything_is_read(nested: Path, case: str) -> None:
    parts, message = _HOSTILE[case]
    if isinstance(parts.get("state"), dict):
        parts = {"state": _state(nested, **parts["state"])}
    with pytest.raises(InputError, match=message) as caught:
        dequantized(_with(_raw(nested), **parts))
    assert "\n" not in str(caught.value)


def test_nested_parts_beside_plain_scales_are_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    save_quantized(sources["llama"], tmp_path, **_SETTINGS["nf4"])
    with pytest.raises(InputError, match=r"nested_absmax' is there but .* is not nested"):
        dequantized(_with(_raw(tmp_path), nested_absmax=np.zeros(1, np.float32)))


def test_scales_that_are_not_finite_are_refused_when_they_are_read(nested: Path) -> None:
    tensor = dequantized(_with(_raw(nested), nested_absmax=np.full(1, np.nan, np.float32))).tensor(_NAME)
    with pytest.raises(InputError, match=r"absmax' gives 96 values that are not finite"):
        tensor.read()


def test_parts_of_no_weight_are_left_for_preflight_to_refuse(nested: Path) -> None:
    checkpoint = _raw(nested)
    extra = "model.layers.9.mlp.down_proj.weight.absmax"
    opened = dequantized(replace(checkpoint, tensors={**checkpoint.tensors, extra: _lazy(extra, np.zeros(2))}))
    with pytest.raises(InputError, match="already quantized: 1 tensor"):
        preflight(opened)


@pytest.mark.parametrize(
    ("suffix", "values", "message"),
    [
        ("SCB", np.zeros(63, np.float32), r"SCB' is F32 of shape \(63,\), wanted F32 of shape \(64,\)"),
        ("SCB", np.zeros(64, np.float64), r"SCB' is F64"),
        ("weight", np.zeros((64, 96), np.uint8), r"weight' is U8 of shape .*, wanted I8"),
        ("weight", np.zeros(64, np.int8), r"wanted two dimensions"),
        ("weight_format", np.array(1, np.uint8), r"weight_format' is 1, wanted 0"),
        ("weight_format", np.zeros(4, np.uint8), r"weight_format' is U8 of shape \(4,\)"),
    ],
)
def test_parts_of_int8_weights_that_do_not_fit_are_refused(
    int8: Path, suffix: str, values: np.ndarray, message: str
) -> None:
    checkpoint = _raw(int8)
    name = _NAME.removesuffix("weight") + suffix
    with pytest.raises(InputError, match=message):
        dequantized(replace(checkpoint, tensors={**checkpoint.tensors, name: _lazy(name, values)}))


def test_int8_scales_that_are_not_finite_are_refused_when_they_are_read(int8: Path) -> None:
    checkpoint = _raw(int8)
    name = _NAME.removesuffix("weight") + "SCB"
    bad = replace(checkpoint, tensors={**checkpoint.tensors, name: _lazy(name, np.full(64, np.inf, np.float32))})
    with pytest.raises(InputError, match="SCB' has 3 NaN or infinite values"):
        dequantized(bad).tensor(_NAME).read_rows(1, 4)


@pytest.fixture(scope="module")
def int8(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    save_quantized(sources["llama"], folder, **_SETTINGS["int8"])
    return folder


def test_settings_left_in_the_config_of_a_plain_model_do_not_matter(sources: dict[str, Path]) -> None:
    plain = open_checkpoint(sources["llama"])
    said = {**plain.config, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    opened = dequantized(replace(plain, config=said))
    assert not opened.storage_types
    assert preflight(opened)


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        ({"quant_method": "bitsandbytes"}, True),
        ({"load_in_4bit": True}, True),
        ({"load_in_8bit": True, "load_in_4bit": False}, True),
        ({"quant_method": "gptq", "load_in_4bit": True}, False),
        ({"quant_method": ["bitsandbytes"]}, False),
        ({"bits": 4}, False),
        ("bitsandbytes", False),
        (None, False),
    ],
)
def test_only_bitsandbytes_own_settings_are_taken_for_its(settings: Any, answer: bool) -> None:
    assert is_bitsandbytes({"quantization_config": settings}) is answer


def test_other_quantizers_stay_refused(nested: Path) -> None:
    checkpoint = _raw(nested)
    config = {**checkpoint.config, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    with pytest.raises(InputError, match=r"already quantized.*gptq"):
        preflight(dequantized(replace(checkpoint, config=config)))
