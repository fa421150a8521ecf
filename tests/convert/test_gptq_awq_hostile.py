"""Parts and settings that do not fit are refused when a folder is opened: file, tensor, found, wanted, in one line."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantpress.convert.awq.pack import FORMAT as AWQ
from quantpress.convert.awq.reader import opened as opened_awq
from quantpress.convert.checkpoint import DTYPES, Checkpoint, LazyTensor
from quantpress.convert.gptq.pack import GPTQ_V1
from quantpress.convert.gptq.reader import is_gptq, opened
from quantpress.convert.gptq.rules import read_settings
from quantpress.convert.open import open_checkpoint
from quantpress.convert.preflight import preflight
from quantpress.quant.errors import InputError
from quantpress.quant.grid import Grid
from tests.packed_folders import Tensors, change_settings, change_tensors, pack_folder
from tests.tiny import tiny_checkpoint

pytest.importorskip("torch")
pytest.importorskip("transformers")

_MODULE = "model.layers.1.mlp.down_proj"  # 64 x 96 in three groups


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hostile")
    source = tiny_checkpoint(root / "source", "llama")
    pack_folder(source, root / "gptq", GPTQ_V1, Grid(4, 32))
    pack_folder(source, root / "awq", AWQ, Grid(4, 32, symmetric=False))
    return {"gptq": root / "gptq", "awq": root / "awq"}


@pytest.fixture
def folders(originals: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    return {name: Path(shutil.copytree(folder, tmp_path / name)) for name, folder in originals.items()}


_PARTS: list[tuple[str, str, Any, str]] = [
    ("gptq", "qweight", None, r"qzeros|already quantized"),
    ("gptq", "qzeros", None, r"down_proj\.qzeros' is missing beside"),
    ("gptq", "scales", None, r"down_proj\.scales' is missing beside"),
    ("gptq", "qweight", np.zeros((12, 64), np.int64), r"qweight' is I64 of shape \(12, 64\), wanted a matrix of I32"),
    ("gptq", "qweight", np.zeros(768, np.int32), r"qweight' is I32 of shape \(768,\), wanted a matrix"),
    ("gptq", "qweight", np.zeros((12, 63), np.int32), r"qweight' is I32 of shape \(12, 63\), wanted 64 columns"),
    ("gptq", "qweight", np.zeros((24, 64), np.int32), r"scales' is F16 of shape \(3, 64\), wanted 6 rows: 192 inputs"),
    ("gptq", "qweight", np.zeros((0, 64), np.int32), r"qweight' is I32 of shape \(0, 64\), wanted whole codes"),
    ("gptq", "qzeros", np.zeros((3, 7), np.int32), r"qzeros' is I32 of shape \(3, 7\), wanted \(3, 8"),
    ("gptq", "qzeros", np.zeros((2, 8), np.int32), r"qzeros' is I32 of shape \(2, 8\), wanted \(3, 8"),
    ("gptq", "qzeros", np.zeros((3, 8), np.float32), r"qzeros' is F32 .*, wanted a matrix of I32"),
    ("gptq", "scales", np.zeros((4, 64), np.float16), r"scales' is F16 of shape \(4, 64\), wanted 3 rows"),
    ("gptq", "scales", np.zeros((3, 60), np.float16), r"wanted 60 columns"),
    ("gptq", "scales", np.zeros((3, 0), np.float16), r"scales' is F16 of shape \(3, 0\), wanted a matrix of F16, BF16"),
    ("gptq", "scales", np.zeros((3, 64), np.float64), r"scales' is F64"),
    ("gptq", "scales", np.zeros((3, 64, 1), np.float16), r"scales' is F16 of shape \(3, 64, 1\)"),
    ("gptq", "g_idx", np.zeros(95, np.int32), r"g_idx' is I32 of shape \(95,\), wanted I32 of shape \(96,\)"),
    ("gptq", "g_idx", np.zeros(96, np.int64), r"g_idx' is I64 of shape \(96,\), wanted I32"),
    ("gptq", "weight", np.zeros((64, 96), np.float16), r"down_proj\.weight' is there twice"),
    ("awq", "qzeros", None, r"down_proj\.qzeros' is missing beside"),
    ("awq", "scales", None, r"down_proj\.scales' is missing beside"),
    ("awq", "qweight", np.zeros((96, 8), np.uint8), r"qweight' is U8 .*wanted a matrix of I32"),
    ("awq", "qweight", np.zeros((95, 8), np.int32), None),
    ("awq", "qweight", np.zeros((96, 0), np.int32), r"qweight' is I32 of shape \(96, 0\)"),
    ("awq", "qweight", np.zeros((0, 8), np.int32), r"qweight' is I32 of shape \(0, 8\)"),
    ("awq", "qzeros", np.zeros((3, 9), np.int32), r"qzeros' is I32 of shape \(3, 9\), wanted shape \(3, 8\)"),
    ("awq", "scales", np.zeros((3, 8), np.float16), r"scales' is F16 of shape \(3, 8\), wanted shape \(3, 64\)"),
    ("awq", "scales", np.zeros((3, 64), np.int32), r"scales' is I32"),
    ("awq", "weight", np.zeros((64, 96), np.float16), r"down_proj\.weight' is there twice"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "part", "values", "message"), _PARTS)
def test_parts_that_do_not_fit_are_refused_when_a_folder_is_opened(
    folders: dict[str, Path], kind: str, part: str, values: Any, message: str | None
) -> None:
    def change(tensors: Tensors) -> None:
        tensors.pop(f"{_MODULE}.{part}", None)
        if values is not None:
            tensors[f"{_MODULE}.{part}"] = values

    change_tensors(folders[kind], change)
    with pytest.raises(InputError, match=message) as caught:
        preflight(open_checkpoint(folders[kind]))
    assert "\n" not in str(caught.value)


_SETTINGS: list[tuple[str, dict[str, Any], str]] = [
    ("gptq", {"bits": ...}, r"bits is missing"),
    ("gptq", {"bits": 5}, r"bits is 5, wanted 2, 3, 4, 8"),
    ("gptq", {"bits": "4"}, r"bits is '4'"),
    ("gptq", {"bits": 4.0}, r"bits is 4\.0"),
    ("gptq", {"bits": True}, r"bits is True"),
    ("gptq", {"bits": 8}, r"of 8 bits"),
    ("gptq", {"bits": 2}, r"of 2 bits"),
    ("gptq", {"group_size": ...}, r"group_size is missing"),
    ("gptq", {"group_size": 0}, r"group_size is 0, wanted a positive number, or -1"),
    ("gptq", {"group_size": -2}, r"group_size is -2"),
    ("gptq", {"group_size": None}, r"group_size is None"),
    ("gptq", {"group_size": 64}, r"scales' is F16 of shape \(3, 64\), wanted 2 rows"),
    ("gptq", {"group_size": 1 << 62}, r"wanted 1 rows"),
    ("gptq", {"sym": "yes"}, r"sym is 'yes', wanted true or false"),
    ("gptq", {"desc_act": 1}, r"desc_act is 1, wanted true or false"),
    ("gptq", {"checkpoint_format": "marlin"}, r"checkpoint_format is 'marlin', wanted gptq or gptq_v2"),
    ("gptq", {"checkpoint_format": ["gptq"]}, r"checkpoint_format is \['gptq'\]"),
    ("gptq", {"is_marlin_format": True}, r"Marlin's layout"),
    ("gptq", {"pack_dtype": "int16"}, r"pack_dtype is 'int16', wanted int32"),
    ("gptq", {"dynamic": [1]}, r"dynamic is \[1\], wanted"),
    ("gptq", {"dynamic": {"a": 1}}, r"dynamic rule 'a' is 1, wanted an object"),
    ("gptq", {"dynamic": {"model": {"bits": 16}}}, r"dynamic rule 'model': bits is 16"),
    ("gptq", {"dynamic": {"model": {"sym": 0}}}, r"dynamic rule 'model': sym is 0"),
    ("gptq", {"dynamic": {"+:(": {}}}, r"'\(' is not a regular expression"),
    ("gptq", {"dynamic": {r"(.)\1": {}}}, r"dynamic"),
    ("gptq", {"dynamic": {"-:model": {}}}, r"dynamic rule '-:model' leaves '.*' out, but it is quantized"),
    ("awq", {"bits": 8}, r"bits is 8, wanted 4"),
    ("awq", {"bits": True}, r"bits is True, wanted 4"),
    ("awq", {"group_size": ...}, r"group_size is missing"),
    ("awq", {"group_size": 64}, r"qzeros' is I32 of shape \(3, 8\), wanted shape \(2, 8\)"),
    ("awq", {"group_size": 0}, r"group_size is 0"),
    ("awq", {"version": "gemv"}, r"layout of the weights is 'gemv', wanted gemm"),
    ("awq", {"version": ["gemm"]}, r"layout of the weights is \['gemm'\]"),
    ("awq", {"backend": "llm-awq"}, r"wanted gemm"),
    ("awq", {"zero_point": "no"}, r"zero_point is 'no', wanted true or false"),
]


@pytest.mark.parametrize(("kind", "changes", "message"), _SETTINGS)
def test_settings_that_make_no_sense_are_refused(
    folders: dict[str, Path], kind: str, changes: dict[str, Any], message: str
) -> None:
    change_settings(folders[kind], **changes)
    with pytest.raises(InputError, match=message) as caught:
        open_checkpoint(folders[kind])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_a_configuration_without_packed_tensors_is_refused(folders: dict[str, Path], kind: str) -> None:
    def unpack(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("qweight")]:
            del tensors[name]

    change_tensors(folders[kind], unpack)
    with pytest.raises(InputError, match=rf"says quant_method {kind}, but no tensor is named \.\.\.\.qweight"):
        open_checkpoint(folders[kind])


@pytest.mark.parametrize(("first", "last"), [(-1, 2), (0, 3), (-(2**31), 2**31 - 1)])
def test_groups_that_do_not_exist_are_refused(folders: dict[str, Path], first: int, last: int) -> None:
    """An index beyond the scales would read other memory in the kernels of some runtimes."""

    def change(tensors: Tensors) -> None:
        tensors[f"{_MODULE}.g_idx"][[0, -1]] = first, last

    change_tensors(folders["gptq"], change)
    message = rf"g_idx' goes from {first} to {last}, wanted 0 to 2"
    with pytest.raises(InputError, match=message):
        open_checkpoint(folders["gptq"]).tensor(f"{_MODULE}.weight").read()
    change_settings(folders["gptq"], desc_act=True)
    with pytest.raises(InputError, match=message):
        open_checkpoint(folders["gptq"])


@pytest.mark.parametrize(("kind", "value"), [("gptq", np.inf), ("awq", np.nan)])
def test_scales_that_are_not_finite_are_refused_when_they_are_read(
    folders: dict[str, Path], kind: str, value: float
) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{_MODULE}.scales"][1, 5] = value

    change_tensors(folders[kind], change)
    with pytest.raises(InputError, match=r"down_proj\.scales' has 1 NaN or infinite values"):
        open_checkpoint(folders[kind]).quantized[f"{_MODULE}.weight"].read()


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_symmetric_weights_with_other_zeros_are_refused_when_they_are_read(folders: dict[str, Path], kind: str) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{_MODULE}.qzeros"][1, 5] ^= 1 << 8

    change_tensors(folders[kind], change)
    change_settings(folders[kind], **({"zero_point": False} if kind == "awq" else {}))
    with pytest.raises(InputError, match=r"down_proj\.qzeros' has zeros from \d+ to \d+, wanted 8 everywhere"):
        open_checkpoint(folders[kind]).tensor(f"{_MODULE}.weight").read()
    change_settings(folders[kind], **({"zero_point": True} if kind == "awq" else {"sym": False}))
    open_checkpoint(folders[kind]).tensor(f"{_MODULE}.weight").read()


def test_parts_of_no_weight_are_left_for_preflight_to_refuse(folders: dict[str, Path]) -> None:
    def change(tensors: Tensors) -> None:
        tensors["model.layers.9.mlp.down_proj.scales"] = np.zeros((3, 64), np.float16)

    change_tensors(folders["gptq"], change)
    with pytest.raises(InputError, match="already quantized: 1 tensor"):
        preflight(open_checkpoint(folders["gptq"]))


def test_what_is_not_gptq_or_awq_is_given_back() -> None:
    for config in ({}, {"quantization_config": None}, {"quantization_config": {"quant_method": "fp8"}}):
        checkpoint = Checkpoint("x", config, {})
        assert opened(checkpoint) is checkpoint
        assert opened_awq(checkpoint) is checkpoint
    assert not is_gptq({"quantization_config": "gptq"})


def _lazy(name: str, shape: tuple[int, ...], dtype: str) -> LazyTensor:
    return LazyTensor(name, shape, dtype, "x", lambda start, stop: np.zeros((stop - start, *shape[1:]), DTYPES[dtype]))


_shapes = st.lists(st.sampled_from((0, 1, 2, 3, 7, 8, 31, 32, 64, 96)), min_size=0, max_size=3).map(tuple)
_values = st.one_of(
    st.sampled_from((2, 3, 4, 8, 32, 64, -1, "gptq", "awq", "gemm", True, None, 1 << 63)), st.integers(), st.text()
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    method=st.sampled_from(("gptq", "awq")),
    shapes=st.lists(_shapes, min_size=4, max_size=4),
    dtypes=st.lists(st.sampled_from(("I32", "F16", "F32", "U8")), min_size=4, max_size=4),
    config=st.dictionaries(
        st.sampled_from(
            ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "version", "zero_point", "meta")
        ),
        _values,
    ),
)
def test_no_shapes_and_settings_do_anything_but_open_or_be_refused(
    method: str, shapes: list[tuple[int, ...]], dtypes: list[str], config: dict[str, Any]
) -> None:
    names = ("a.qweight", "a.qzeros", "a.scales", "a.g_idx")
    tensors = {name: _lazy(name, *rest) for name, *rest in zip(names, shapes, dtypes, strict=True)}
    made = {"quantization_config": {"quant_method": method, "bits": 4, "group_size": 32, **config}}
    checkpoint = Checkpoint("x", made, tensors)
    with contextlib.suppress(InputError):
        found = (opened if method == "gptq" else opened_awq)(checkpoint)
        for lazy in found.quantized.values():
            assert lazy.read().form == lazy.form


@settings(max_examples=200, deadline=None)
@given(config=st.dictionaries(st.sampled_from(("bits", "group_size", "dynamic", "sym", "format")), _values))
def test_no_settings_do_anything_but_be_read_or_refused(config: dict[str, Any]) -> None:
    with contextlib.suppress(InputError):
        read_settings(config, "config", 1).of("model.layers.0.mlp.up_proj")
