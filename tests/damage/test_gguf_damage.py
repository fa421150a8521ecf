"""Damaged GGUF files fail, good ones pass: whatever is wrong with what a file holds is found."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from quantpress.pipelines.cli import run
from quantpress.pipelines.llama_cpp_find import ENVIRONMENT_VARIABLE, find_llama_cpp
from tests.damage.gguf_damages import DAMAGES, planted
from tests.damage.gguf_files import FILES, LONG_FILES, File, findings_of, good_file, model_of, opened
from tests.gguf_exports import export
from tests.llama_quantize import quantizer

LONG = bool(os.environ.get("QUANTPRESS_LONG"))
SHORT = (
    "trained-f16",
    "trained-q4_0",
    "trained-q4_k_m",
    "trained-q8_0-gptq",
    "biases-q8_0",
    "factors-f16",
    "mix6m-hf-q4_k_m",
)
DAMAGED = [*FILES, *LONG_FILES] if LONG else [file for file in FILES if str(file) in SHORT]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where models and good files lie."""
    return tmp_path_factory.mktemp("damaged-gguf")


@pytest.mark.parametrize("file", [*FILES, *LONG_FILES] if LONG else FILES, ids=str)
def test_good_files_pass(file: File, made: Path) -> None:
    assert findings_of(good_file(file, made), model_of(file, made)) == []


@pytest.mark.parametrize("adapter", ["lora-shakespeare-r8", "lora-wikitext-rslora-r16-attn", "dora-shakespeare-r4"])
@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
def test_an_adapter_that_was_left_out_is_noticed(kind: str, adapter: str, shared: Path, tmp_path: Path) -> None:
    folder = shared / "adapters" / adapter
    model = shared / "models" / "stories260k-hf"
    export(model, tmp_path / "base.gguf", outtype=kind, threads=1)
    export(opened(model, folder), tmp_path / "merged.gguf", outtype=kind, threads=1)
    assert findings_of(tmp_path / "merged.gguf", model, folder) == []
    assert findings_of(tmp_path / "base.gguf", model, folder)
    assert findings_of(tmp_path / "merged.gguf", model)


@pytest.mark.parametrize("ftype", ["Q8_0", "Q4_0", "Q4_K_M", "Q3_K_M", "Q2_K", "IQ4_XS", "Q5_K_M", "Q6_K"])
def test_files_of_llama_quantize_pass(ftype: str, made: Path, tmp_path: Path) -> None:
    library = find_llama_cpp() if os.environ.get(ENVIRONMENT_VARIABLE) else None
    program = quantizer(library.path) if library else None
    if program is None:
        pytest.skip(f"{ENVIRONMENT_VARIABLE} names no library of llama.cpp 0.5.0 with llama_model_quantize")
    out = program.quantize(good_file(FILES[0], made), tmp_path / "theirs.gguf", ftype)
    assert findings_of(out, model_of(FILES[0], made)) == []


def test_parts_of_a_split_file_and_a_source_that_is_a_gguf_file_pass(made: Path, tmp_path: Path) -> None:
    model, good = model_of(FILES[0], made), good_file(FILES[0], made)
    parts = export(model, tmp_path / "split.gguf", outtype="q8_0", split_max_tensors=8, threads=1).artifact.path
    assert findings_of(parts, model) == []
    export(good, tmp_path / "again.gguf", outtype="q4_0", threads=1)
    assert findings_of(tmp_path / "again.gguf", good) == []
    assert findings_of(tmp_path / "again.gguf", model) == []


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
