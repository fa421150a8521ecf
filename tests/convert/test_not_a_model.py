"""Config files that are none, and folders and paths that are no models, are refused with a word on what to give."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from quantpress.convert.hf_folder import open_folder
from quantpress.convert.open import open_checkpoint
from quantpress.quant.errors import InputError
from tests.good_folder import good_folder, refused


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A good folder with one file of weights."""
    return good_folder(tmp_path / "model")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (b'{"rms_norm_eps": NaN}', "NaN"),
        (b'{"rope_theta": Infinity}', "Infinity"),
        (b'{"rope_theta": 1e400}', "1e400"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": ' + b"[" * 100_000, "deeper"),
        (b"[]", "a JSON object is expected"),
        (b'"llama"', "a JSON object is expected"),
        (b"", "not JSON"),
        (b"\xff\xfe{\0}\0", "not UTF-8"),
    ],
)
def test_a_config_that_is_none_isrefused(model: Path, config: bytes, words: str) -> None:
    (model / "config.json").write_bytes(config)
    assert "config.json" in refused(model, words)


def test_a_config_too_large_is_refused_before_it_is_read(model: Path) -> None:
    os.truncate(model / "config.json", 10**12)
    refused(model, "has 1000000000000 bytes, at most")
    os.truncate(model / "config.json", (4 << 20) + 1)
    refused(model, "at most 4194304")


def test_a_folder_that_is_no_model_is_told_what_it_is(model: Path) -> None:
    (model / "model.safetensors").rename(model / "adapter_model.safetensors")
    (model / "config.json").rename(model / "adapter_config.json")
    refused(model, "an adapter, not a model.*--adapter")
    (model / "config.json").write_text("{}")
    refused(model, "an adapter, not a model")
    (model / "adapter_config.json").unlink()
    (model / "adapter_model.safetensors").rename(model / "weights.safetensors")
    refused(model, "1 safetensors files, first 'weights.safetensors', but neither")
    (model / "weights.safetensors").rename(model / "model.onnx")
    refused(model, "an ONNX model is a target, not a source; give the model it was made from")
    (model / "model.onnx").rename(model / "model.h5")
    refused(model, r"no weights that can be read; 'model\.h5'")
    (model / "config.json").unlink()
    refused(model, "no config.json")
    (model / "x.gguf").write_bytes(b"")
    refused(model, r"give the file itself, here 'x\.gguf'")
    (model.parent / "outer").mkdir()
    shutil.move(model, model.parent / "outer" / "inner")
    (model.parent / "outer" / "inner" / "config.json").write_text("{}")
    refused(model.parent / "outer", "in the folder 'inner'")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing-folder", "no such file or folder; give a model folder"),
        ("missing/file.gguf", "no such file or folder"),
        ("one/two/three", "no such file or folder"),
        ("../x/y", "no such file or folder"),
        ("", "the name of the model is empty"),
        ("a\nb", "no such file or folder"),
        ("model/model.safetensors", "give the folder that holds it"),
        ("model/model.onnx", "an ONNX model is a target, not a source"),
        ("model/notes.txt", "not a model"),
    ],
)
def test_a_path_that_is_no_model_gets_help(model: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str) -> None:
    (model / "model.onnx").write_bytes(b"")
    (model / "notes.txt").write_bytes(b"")
    monkeypatch.chdir(model.parent)
    with pytest.raises(InputError, match=words) as caught:
        open_checkpoint(name)
    assert "\n" not in str(caught.value)


def test_the_name_of_a_model_is_its_folders_even_when_opened_as_a_dot(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model)
    assert open_folder(".").name == "model"
