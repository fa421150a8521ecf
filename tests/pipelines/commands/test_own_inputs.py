"""An output never takes the place of what the same run reads, whatever --force says."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quantpress as qp
from quantpress.pipelines.own_inputs import refuse_own_input
from quantpress.quant.errors import UsageError
from tests.pipelines.commands.quantized_folders import WINDOWS

Run = Callable[..., Any]


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the model that a test may lose; the folder around it looks like a model too."""
    around = tmp_path / "around"
    around.mkdir()
    (around / "config.json").write_text("{}")
    return Path(shutil.copytree(tiny_model, around / "model"))


def everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_refused(ended: Any, folder: Path, before: dict[Path, bytes], *named: object) -> None:
    assert ended.code == 2, ended.err
    last = ended.err.splitlines()[-1]
    assert all(str(each) in last for each in (*named, "an input of this run")), last
    assert everything(folder) == before


COMMANDS = {
    "quantize": ("quantize", "--method", "rtn", "--group-size", 32),
    "safetensors": ("convert", "--to", "safetensors"),
    "gguf": ("convert", "--to", "gguf"),
}


@pytest.mark.parametrize("proof", ["--verify", "--no-verify"])
@pytest.mark.parametrize("command", list(COMMANDS))
def test_a_model_is_not_replaced_by_what_is_made_from_it(
    quantpress: Run, model: Path, tmp_path: Path, command: str, proof: str
) -> None:
    (tmp_path / "link").symlink_to(model)
    before, (name, *flags) = everything(tmp_path), COMMANDS[command]
    for out in (model, model.parent, tmp_path / "link", model / ".." / "model", model.parent / "{name}"):
        ended = quantpress(name, model, out, *flags, "--force", proof)
        check_refused(ended, tmp_path, before, out.parent / "model" if "{" in out.name else out, model)
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        check_refused(quantpress(name, model, model / file, *flags, "--force", proof), tmp_path, before, model / file)


def test_a_gguf_file_is_not_replaced_by_itself(quantpress: Run, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    assert quantpress("convert", model, file, "--outtype", "f16", "--no-verify").code == 0
    before = everything(tmp_path)
    ended = quantpress("convert", file, file, "--outtype", "q8_0", "--force", "--no-verify")
    check_refused(ended, tmp_path, before, file)


def test_an_adapter_is_not_replaced_by_the_merged_model(
    quantpress: Run, model: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))
    before = everything(tmp_path)
    for out in (adapter, adapter / "adapter_config.json"):
        ended = quantpress("merge", model, adapter, out, "--force", "--no-verify")
        check_refused(ended, tmp_path, before, out, adapter / "adapter_config.json")


def test_texts_are_not_replaced_nor_folders_that_hold_them(
    quantpress: Run, model: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert quantpress("convert", model, out, "--to", "safetensors", "--no-verify").code == 0
    text = Path(shutil.copy(text_file, out / "notes.txt"))
    before = everything(tmp_path)
    flags = ("--group-size", 32, "--force")
    calibrated = quantpress("quantize", model, out, "--calibration", text, *WINDOWS, *flags, "--no-verify")
    check_refused(calibrated, tmp_path, before, out, text)
    judged = quantpress("quantize", model, out, "--method", "rtn", "--text", text, *flags)
    check_refused(judged, tmp_path, before, out, text)
    assert quantpress("quantize", model, out, "--method", "rtn", *flags, "--no-verify").code == 0  # it is no input then


def test_the_library_refuses_it_too(model: Path, tmp_path: Path) -> None:
    before = everything(tmp_path)
    with pytest.raises(UsageError, match="an input of this run"):
        qp.quantize(model, model, method="rtn", group_size=32, force=True)
    assert everything(tmp_path) == before


def test_places_inside_and_beside_a_model_may_be_written(quantpress: Run, model: Path) -> None:
    flags = ("--method", "rtn", "--group-size", 32, "--no-verify", "--force")
    for out in (model / "int4", model.parent / "model-int4"):
        for _ in range(2):  # the second time it is there
            assert quantpress("quantize", model, out, *flags).code == 0


def test_a_folder_of_links_is_an_input_as_much_as_what_they_point_to(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1f").write_bytes(b"weights")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(Path("..", "blobs", "1f"))
    source = tmp_path / "snapshot" / "model.safetensors"
    for out in (tmp_path / "snapshot", tmp_path / "blobs", tmp_path / "blobs" / "1f", source, tmp_path):
        with pytest.raises(UsageError, match="an input of this run"):
            refuse_own_input(out, [tmp_path / "missing", source])
    refuse_own_input(tmp_path / "missing", [tmp_path / "missing", source])
    refuse_own_input(tmp_path / "snapshot" / "new", [source])
