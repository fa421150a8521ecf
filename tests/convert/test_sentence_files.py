"""Files of sentence-transformers: which pooling they mean, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from quantpress.convert.arch.bert import BERT
from quantpress.convert.open import open_checkpoint
from quantpress.convert.preflight import preflight
from quantpress.convert.sentence_files import POOLING_KEY
from quantpress.pipelines.safetensors_stage import Safetensors
from quantpress.pipelines.stage import RunContext
from quantpress.quant.errors import InputError
from tests.families.encoders import encoder_case, write_encoder

MODULE = "sentence_transformers.models."


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(encoder_case("distilbert-bare"), tmp_path_factory.mktemp("sentences") / "model")


def with_modules(plain: Path, folder: Path, modules: Any, pooling: Any = None) -> Path:
    """Gives a copy of a model with these files."""
    folder.mkdir()
    for path in plain.iterdir():
        shutil.copy(path, folder / path.name)
    folder.joinpath("modules.json").write_text(json.dumps(modules))
    if pooling is not None:
        folder.joinpath("1_Pooling").mkdir()
        folder.joinpath("1_Pooling", "config.json").write_text(json.dumps(pooling))
    return folder


def modules(*kinds: str) -> list[dict[str, Any]]:
    paths = {"Transformer": "", "Pooling": "1_Pooling"}
    return [{"idx": n, "type": MODULE + kind, "path": paths.get(kind, f"{n}_{kind}")} for n, kind in enumerate(kinds)]


@pytest.mark.parametrize(
    ("pooling", "found"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["cls"]}, "cls"),
        ({}, "mean"),  # sentence-transformers' default
    ],
)
def test_pooling_is_what_the_files_say(plain: Path, tmp_path: Path, pooling: Any, found: str) -> None:
    folder = with_modules(plain, tmp_path / "model", modules("Transformer", "Pooling", "Normalize"), pooling)
    source = open_checkpoint(folder)
    assert source.config[POOLING_KEY] == found
    assert preflight(source).hyper.pooling == found


@pytest.mark.parametrize(
    ("kinds", "pooling", "found"),
    [
        (("Transformer", "Pooling"), {"pooling_mode_max_tokens": True}, "max"),
        (("Transformer", "Pooling"), {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "mean+cls"),
        (("Transformer", "Pooling", "Dense"), {"pooling_mode_mean_tokens": True}, "mean+Dense"),
    ],
)
def test_what_llama_cpp_does_not_pool_is_refused_for_gguf(
    plain: Path, tmp_path: Path, kinds: tuple[str, ...], pooling: Any, found: str
) -> None:
    source = open_checkpoint(with_modules(plain, tmp_path / "model", modules(*kinds), pooling))
    checked = preflight(source)
    assert checked.hyper.pooling == ""
    with pytest.raises(InputError, match=f"'{found.replace('+', '.')}'"):
        checked.spec.gguf_check(checked.hyper, source.config)


def test_a_model_without_them_has_no_pooling(plain: Path) -> None:
    source = open_checkpoint(plain)
    assert POOLING_KEY not in source.config
    checked = preflight(source)
    assert "pooling_type" not in BERT.gguf_metadata(checked.hyper, source.config)


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ({"a": 1}, "a list of up to"),
        ([{"type": MODULE + "Pooling"}], "wanted an object with 'type' and 'path'"),
        ([{"type": MODULE + "Pooling", "path": "../../etc"}], "leaves the model folder"),
        ([{"type": MODULE + "Pooling", "path": "1_Pooling"}], "1_Pooling/config.json: missing"),
    ],
)
def test_damaged_files_are_refused(plain: Path, tmp_path: Path, listed: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_checkpoint(with_modules(plain, tmp_path / "model", listed))


def test_they_go_into_the_folders_that_are_written(plain: Path, tmp_path: Path) -> None:
    listed, pooling = modules("Transformer", "Pooling"), {"pooling_mode_cls_token": True}
    source = open_checkpoint(with_modules(plain, tmp_path / "model", listed, pooling))
    written = Safetensors(output=tmp_path / "out").run(source, RunContext(threads=1)).path
    assert json.loads((written / "1_Pooling" / "config.json").read_text()) == pooling
    assert open_checkpoint(written).config[POOLING_KEY] == "cls"
