"""Damaged ONNX models fail, good ones pass: what each measure notices, file by file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from quantpress.pipelines.cli import run
from tests.damage import onnx_damages as damages
from tests.damage.onnx_files import FILES, LONG_FILES, File, good_file, measures_of, model_of

LONG = bool(os.environ.get("QUANTPRESS_LONG"))
SHORT_FILES = FILES if LONG else FILES[:4]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged-onnx")


@pytest.mark.parametrize("file", FILES + LONG_FILES if LONG else FILES, ids=str)
def test_good_files_pass(file: File, models: Path) -> None:
    assert measures_of(good_file(file, models), model_of(file, models)) == ()


@pytest.mark.parametrize("damage", damages.ALL, ids=str)
@pytest.mark.parametrize("file", SHORT_FILES, ids=str)
def test_every_damage_is_noticed(file: File, damage: damages.Damage, models: Path, tmp_path: Path) -> None:
    good = good_file(file, models)
    try:
        bad = damage.copy(good, tmp_path / "bad")
    except damages.NotHereError:
        pytest.skip("nothing of this kind in the file")
    assert measures_of(bad, model_of(file, models))


@pytest.mark.parametrize("name", ["one matrix times 1.1", "epsilon of norms times 10", "two tokens exchanged"])
def test_verify_ends_with_4_and_names_what_is_wrong(
    name: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = FILES[0]
    damage = next(each for each in damages.ALL if each.name == name)
    bad = damage.copy(good_file(file, models), tmp_path / "bad")
    given = ["-q", "verify", str(bad), "--against", str(model_of(file, models)), "--json", "--chunks", "1"]
    assert run([*given, "--context", "64"]) == 4
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["content"]["findings"]
    assert set(found["failures"]) & {"weights", "settings", "vocabulary"}
