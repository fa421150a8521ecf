"""The spool keeps finished steps across runs, and nothing that is damaged or of another run."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from quantpress.pipelines.spool import Spool
from quantpress.quant.errors import OutputError

CODES = {
    "a.qweight": np.arange(12, dtype=np.int32).reshape(3, 4),
    "a.scales": np.array([[0.5, 2.0]], np.float16),
    "a.flag": np.zeros((), np.uint8),
}
NORM = {"norm.weight": np.array([1.5, -2.0, 0.25], ml_dtypes.bfloat16)}


def filled(folder: Path, key: str = "key") -> Spool:
    spool = Spool(folder, key)
    spool.add("layer 0", CODES, {"reports": {"a": {"loss": 0.5}}})
    spool.add("layer 1", NORM, {"reports": {}})
    return spool


def test_steps_and_tensors_are_there_when_the_same_run_opens_it_again(tmp_path: Path) -> None:
    filled(tmp_path / "work")
    again = Spool(tmp_path / "work", "key")
    assert list(again.steps) == ["layer 0", "layer 1"]
    assert again.steps["layer 0"] == {"reports": {"a": {"loss": 0.5}}}
    found = again.tensors()
    assert found.keys() == {*CODES, *NORM}
    for name, values in {**CODES, **NORM}.items():
        assert found[name].shape == values.shape
        assert found[name].read().tobytes() == values.tobytes()
        assert found[name].read().dtype == values.dtype


def test_the_safetensors_package_reads_what_is_kept(tmp_path: Path) -> None:
    filled(tmp_path / "work")
    found = load_file(tmp_path / "work" / "00000.safetensors")
    assert found.keys() == CODES.keys()
    for name, values in CODES.items():
        np.testing.assert_array_equal(found[name], values)


def test_another_run_finds_it_empty(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = filled(tmp_path / "work").folder
    (folder / "live").mkdir()
    other = Spool(folder, "another key")
    assert not other.steps
    assert not other.tensors()
    assert sorted(path.name for path in folder.iterdir()) == ["journal.jsonl"]
    assert "2 finished steps are thrown away" in caplog.text


def test_a_torn_last_line_is_no_step(tmp_path: Path) -> None:
    folder = filled(tmp_path / "work").folder
    journal = folder / "journal.jsonl"
    whole = journal.read_bytes()
    for cut in (1, 5, 40):
        journal.write_bytes(whole[:-cut])
        assert list(Spool(folder, "key").steps) == ["layer 0"]
        journal.write_bytes(whole)
    journal.write_bytes(b"")
    assert not Spool(folder, "key").steps


def test_a_step_after_a_torn_line_is_kept_whole(tmp_path: Path) -> None:
    folder = filled(tmp_path / "work").folder
    journal = folder / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-3])
    Spool(folder, "key").add("layer 1", NORM, {"reports": {"again": {}}})
    again = Spool(folder, "key")
    assert again.steps["layer 1"] == {"reports": {"again": {}}}
    assert again.tensors()["norm.weight"].read().tobytes() == NORM["norm.weight"].tobytes()


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "line"])
def test_a_damaged_step_is_done_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = filled(tmp_path / "work").folder
    file = folder / "00001.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[:-1])
    elif damage == "remove":
        file.unlink()
    else:
        lines = (folder / "journal.jsonl").read_text().splitlines()
        (folder / "journal.jsonl").write_text("\n".join([*lines[:2], json.dumps({"step": "layer 1"})]) + "\n")
    assert list(Spool(folder, "key").steps) == ["layer 0"]
    assert "damaged" in caplog.text


def test_looking_for_finished_steps_changes_nothing(tmp_path: Path) -> None:
    folder = filled(tmp_path / "work").folder
    assert Spool.finished_steps(folder, "key") == {"layer 0", "layer 1"}
    assert Spool.finished_steps(folder, "other") == frozenset()
    assert Spool.finished_steps(tmp_path / "nothing", "key") == frozenset()
    assert list(Spool(folder, "key").steps) == ["layer 0", "layer 1"]
    assert not (tmp_path / "nothing").exists()


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="file"):
        Spool(tmp_path / "file" / "work", "key")


def test_removing_leaves_nothing(tmp_path: Path) -> None:
    filled(tmp_path / "work").remove()
    assert not list(tmp_path.iterdir())
