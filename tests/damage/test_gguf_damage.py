"""Damaged GGUF files fail, good ones pass: whatever is wrong with what a file holds is found."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from quantpress.pipelines.cli import run
from tests.damage.gguf_damages import DAMAGES, planted
from tests.damage.gguf_files import FILES, LONG_FILES, File, findings_of, good_file, model_of

LONG = bool(os.environ.get("QUANTPRESS_LONG"))
DAMAGED = [*FILES, *LONG_FILES] if LONG else FILES


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where models and good files lie."""
    return tmp_path_factory.mktemp("damaged-gguf")


@pytest.mark.parametrize("file", [*FILES, *LONG_FILES] if LONG else FILES, ids=str)
def test_good_files_pass(file: File, made: Path) -> None:
    assert findings_of(good_file(file, made), model_of(file, made)) == []


@pytest.mark.parametrize("file", DAMAGED, ids=str)
def test_every_damage_is_noticed(file: File, made: Path, tmp_path: Path) -> None:
    good, bad, missed, places = good_file(file, made), tmp_path / "bad.gguf", [], 0
    for name, plant in DAMAGES.items():
        if planted(good, bad, plant):
            places += 1
            if not findings_of(bad, model_of(file, made)):
                missed.append(name)
    assert not missed
    assert places >= 20  # most damages have a place in every file


def verified(bad: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, object]]:
    code = run(["-q", "verify", str(bad), "--against", str(model), "--json", "--chunks", "1", "--context", "32"])
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return code, found


@pytest.mark.parametrize(
    ("name", "measure"),
    [
        ("one row x 1.5", "weights"), ("rope base", "settings"), ("two tokens swapped", "vocabulary"),
        *((name, "") for name in (DAMAGES if LONG else ())),
    ],
)  # fmt: skip
def test_verify_ends_with_4_and_names_what_is_wrong(
    name: str, measure: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = FILES[1]
    bad = tmp_path / "bad.gguf"
    if not planted(good_file(file, made), bad, DAMAGES[name]):
        pytest.skip("no place for it")
    code, found = verified(bad, model_of(file, made), capsys)
    failures = found["failures"]
    assert code == 4
    assert isinstance(failures, list)
    assert measure in failures if measure else failures


def test_verify_passes_the_good_file(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = verified(good_file(FILES[1], made), model_of(FILES[1], made), capsys)
    assert (code, found["failures"]) == (0, [])
    assert found["content"]["tensors"] > 10  # type: ignore[index]


def test_a_setting_that_was_chosen_by_hand_is_no_damage(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = model_of(FILES[0], made), tmp_path / "chosen.gguf"
    few = ("--chunks", "1", "--context", "32")
    code = run(["-q", "convert", str(model), str(out), *few, "--override-kv", "llama.context_length=int:64"])
    assert code == 0
    assert verified(out, model, capsys)[0] == 0
    Path(f"{out}.quantpress.json").unlink()  # then nothing says that it was meant
    code, found = verified(out, model, capsys)
    assert (code, found["failures"]) == (4, ["settings"])
