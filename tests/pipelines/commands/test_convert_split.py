"""`quantpress convert --split-max-...`: several files that are one output, and everything that reads them."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from quantpress.pipelines.gguf_readback import read_back
from quantpress.pipelines.hashing import likely_weights
from quantpress.pipelines.llama_cpp import LlamaCppRuntime
from quantpress.pipelines.llama_cpp_find import find_llama_cpp
from quantpress.quant.errors import InputError

needs_llama_cpp = pytest.mark.skipif(find_llama_cpp() is None, reason="llama.cpp is not installed")
Run = Callable[..., Any]
# The tiny model's F32 file has 21 tensors; its largest have 320 x 64 values, 81920 bytes.
SPLIT = ("--outtype", "f32", "--split-max-size", "100K")


def parts_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-of-*.gguf"))


def write(quantpress: Run, model: Path, out: Path, *flags: object) -> list[Path]:
    ended = quantpress("convert", model, out, *SPLIT, "--no-verify", *flags)
    assert ended.code == 0, ended.err
    parts = parts_of(out.parent)
    assert f"{parts[0]}: F32, " in ended.out
    assert f" in {len(parts)} files" in ended.out
    return parts


@pytest.fixture
def parts(quantpress: Run, tiny_model: Path, tmp_path: Path) -> list[Path]:
    return write(quantpress, tiny_model, tmp_path / "split" / "m.gguf")


@needs_llama_cpp
def test_a_split_model_is_run_in_llama_cpp_and_proved_and_has_one_sidecar(
    quantpress: Run, tiny_model: Path, tmp_path: Path, text_file: Path
) -> None:
    ended = quantpress("convert", tiny_model, tmp_path / "m.gguf", *SPLIT, "--text", text_file, "--json")
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert (report["parity"]["candidate"]["runtime"], report["parity"]["passed"]) == ("llama.cpp", True)
    parts = parts_of(tmp_path)
    assert len(parts) > 3
    assert report["output"] == str(parts[0])
    assert report["bytes"] == sum(path.stat().st_size for path in parts)
    sidecar = Path(f"{parts[0]}.quantpress.json")
    assert sorted(tmp_path.iterdir()) == sorted([*parts, sidecar])
    assert json.loads(sidecar.read_text())["outputs"] == [
        {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
        for path in parts
    ]


def test_the_tensors_are_those_of_the_whole_file(
    quantpress: Run, tiny_model: Path, tmp_path: Path, parts: list[Path]
) -> None:
    whole = tmp_path / "whole.gguf"
    assert quantpress("convert", tiny_model, whole, "--outtype", "f32", "--no-verify").code == 0
    wanted = gguf.GGUFReader(whole)
    readers = [gguf.GGUFReader(path) for path in parts]
    found = [tensor for reader in readers for tensor in reader.tensors]
    assert [tensor.name for tensor in found] == [tensor.name for tensor in wanted.tensors]
    for mine, theirs in zip(found, wanted.tensors, strict=True):
        np.testing.assert_array_equal(mine.data, theirs.data)
    keys = [[key for key in reader.fields if not key.startswith("GGUF.")] for reader in readers]
    split = ["split.no", "split.count", "split.tensors.count"]
    assert keys[0] == [*(key for key in wanted.fields if not key.startswith("GGUF.")), *split]
    assert keys[1:] == [split] * (len(parts) - 1)
    for number, reader in enumerate(readers):
        assert [reader.fields[key].contents() for key in split] == [number, len(parts), len(found)]
        assert [reader.fields[key].types[0].name for key in split] == ["UINT16", "UINT16", "INT32"]


@needs_llama_cpp
def test_llama_cpp_scores_the_parts_as_it_scores_the_whole_file(
    quantpress: Run, tiny_model: Path, tmp_path: Path, parts: list[Path]
) -> None:
    whole = tmp_path / "whole.gguf"
    assert quantpress("convert", tiny_model, whole, "--outtype", "f32", "--no-verify").code == 0
    tokens = np.arange(1, 33, dtype=np.int32)
    scores = []
    for path in (whole, parts[0]):
        with LlamaCppRuntime(path, context=32, threads=1) as model:
            scores.append(np.array(model.logits(tokens, 0)))
    np.testing.assert_array_equal(*scores)


def test_the_gguf_package_reads_all_parts_where_there_is_no_llama_cpp(
    quantpress: Run, tiny_model: Path, parts: list[Path], text_file: Path
) -> None:
    flags = ("--runtime", "torch", "--text", text_file, "--chunks", 1, "--context", 64, "--json")
    for part in (parts[0], parts[2]):
        ended = quantpress("verify", part, "--against", tiny_model, *flags)
        assert ended.code == 0, ended.err
        assert json.loads(ended.out)["mean_kld"] < 1e-9
    parts[1].unlink()
    with pytest.raises(InputError, match=parts[1].name):
        read_back(parts[0])


@needs_llama_cpp
def test_verify_and_perplexity_take_any_part(
    quantpress: Run, tiny_model: Path, parts: list[Path], text_file: Path
) -> None:
    flags = ("--text", text_file, "--chunks", 1, "--context", 64, "--json")
    found = [json.loads(quantpress("perplexity", path, *flags).out)["perplexity"] for path in (parts[0], parts[-1])]
    assert found[0] == found[1]
    ended = quantpress("verify", parts[1], "--against", tiny_model, *flags)
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["candidate"]["runtime"] == "llama.cpp"


def test_inspect_shows_the_whole_model_whichever_part_is_named(
    quantpress: Run, tiny_model: Path, tmp_path: Path, parts: list[Path]
) -> None:
    whole = tmp_path / "tiny.gguf"
    assert quantpress("convert", tiny_model, whole, "--outtype", "f32", "--no-verify").code == 0
    wanted = json.loads(quantpress("inspect", whole, "--json").out)
    for path in (parts[0], parts[-1]):
        found = json.loads(quantpress("inspect", path, "--json").out)
        assert found["parameters"] == wanted["parameters"]
        assert {key for key in wanted if wanted[key] != found[key]} <= {"name", "model", "files", "bytes", "size"}


def test_a_split_model_is_a_source_like_any_other(
    quantpress: Run, tiny_model: Path, tmp_path: Path, parts: list[Path]
) -> None:
    for name, model in (("direct", tiny_model), ("parts", parts[-1])):
        flags = ("--outtype", "q8_0", "--no-verify", "--model-name", "same")
        assert quantpress("convert", model, tmp_path / f"{name}.gguf", *flags).code == 0
    direct, through = (gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in ("direct", "parts"))
    assert [t.data.tobytes() for t in direct.tensors] == [t.data.tobytes() for t in through.tensors]
    inputs = json.loads((tmp_path / "parts.gguf.quantpress.json").read_text())["inputs"]
    assert [each["name"] for each in inputs] == [path.name for path in parts]
    assert not any(key.startswith("split.") for key in through.fields)


def test_a_missing_part_is_told_by_its_name(quantpress: Run, parts: list[Path]) -> None:
    parts[1].unlink()
    ended = quantpress("inspect", parts[0])
    assert ended.code == 3
    assert f"{parts[1].name} is missing beside it" in ended.err
    assert len(ended.err.strip().splitlines()) == 1


def test_a_dry_run_tells_the_bytes_of_all_parts_and_writes_nothing(
    quantpress: Run, tiny_model: Path, tmp_path: Path, parts: list[Path]
) -> None:
    ended = quantpress("convert", tiny_model, tmp_path / "dry" / "m.gguf", *SPLIT, "--dry-run", "--json")
    plan = json.loads(ended.out)
    assert plan["bytes"] == sum(path.stat().st_size for path in parts)
    assert Path(plan["output"]).name == parts[0].name
    assert not (tmp_path / "dry").exists()


def test_parts_are_replaced_with_force_only_and_never_mixed(
    quantpress: Run, tiny_model: Path, parts: list[Path]
) -> None:
    out = parts[0].parent / "m.gguf"
    before = [path.read_bytes() for path in parts]
    ended = quantpress("convert", tiny_model, out, *SPLIT, "--no-verify")
    assert (ended.code, f"{parts[0].name}: the output exists; give --force" in ended.err) == (2, True)
    other = ("--outtype", "f32", "--split-max-tensors", 8, "--no-verify")
    ended = quantpress("convert", tiny_model, out, *other, "--force")
    assert (ended.code, f"a part of {len(parts)} lies where 3 parts" in ended.err) == (2, True)
    assert [path.read_bytes() for path in parts] == before
    assert write(quantpress, tiny_model, out, "--force") == parts
    assert [path.read_bytes() for path in parts] == before


def test_a_source_is_not_replaced_by_its_own_parts(quantpress: Run, parts: list[Path]) -> None:
    ended = quantpress("convert", parts[1], parts[0].parent / "m.gguf", *SPLIT, "--no-verify", "--force")
    assert ended.code == 2
    assert "the output would replace" in ended.err


def test_the_name_of_the_first_part_is_taken_as_well(quantpress: Run, tiny_model: Path, parts: list[Path]) -> None:
    before = [path.read_bytes() for path in parts]
    assert write(quantpress, tiny_model, parts[0], "--force") == parts
    assert [path.read_bytes() for path in parts] == before
    wrong = parts[0].with_name("n-00001-of-00099.gguf")
    ended = quantpress("convert", tiny_model, wrong, *SPLIT, "--no-verify")
    assert (ended.code, f"not of the first of {len(parts)}; name it n.gguf" in ended.err) == (2, True)


def test_a_model_that_fits_into_one_file_is_one(quantpress: Run, tiny_model: Path, tmp_path: Path) -> None:
    flags = ("--outtype", "f16", "--split-max-size", "2G", "--split-max-tensors", 100, "--no-verify")
    assert quantpress("convert", tiny_model, tmp_path / "m.gguf", *flags).code == 0
    assert not any(key.startswith("split.") for key in gguf.GGUFReader(tmp_path / "m.gguf").fields)
    assert parts_of(tmp_path) == []


@pytest.mark.parametrize("flags", [("--split-max-size", "lots"), ("--split-max-tensors", "-3")])
def test_limits_that_are_none_are_usage_errors(
    quantpress: Run, tiny_model: Path, tmp_path: Path, flags: tuple[str, str]
) -> None:
    ended = quantpress("convert", tiny_model, tmp_path / "m.gguf", *flags, "--no-verify")
    assert ended.code == 2
    assert flags[0] in ended.err
    assert list(tmp_path.iterdir()) == []


def test_the_files_that_will_be_read_are_known_by_their_names(parts: list[Path], tmp_path: Path) -> None:
    (parts[0].parent / "m.gguf").touch()
    assert likely_weights(str(parts[1])) == parts
    assert likely_weights(str(tmp_path / "split" / "m.gguf")) == [tmp_path / "split" / "m.gguf"]
    assert likely_weights(str(tmp_path / "none-00001-of-00002.gguf")) == []


_KILLED = """
import os, signal, sys
from quantpress.convert import moved_files
from quantpress.pipelines.cli import run
rename, left = moved_files.Path.rename, int(sys.argv[1])
def counted(*args):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(*args)
moved_files.Path.rename = counted
sys.exit(run(sys.argv[2:]))
"""


@pytest.mark.parametrize("renamed", [0, 3])
def test_a_plain_run_finishes_what_a_killed_one_left(
    quantpress: Run, tiny_model: Path, tmp_path: Path, parts: list[Path], renamed: int
) -> None:
    out = tmp_path / "killed" / "m.gguf"
    arguments = ["convert", str(tiny_model), str(out), *SPLIT, "--no-verify"]
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, str(renamed), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert len(parts_of(out.parent)) == renamed
    assert parts[0].name not in {path.name for path in out.parent.iterdir()}
    again = write(quantpress, tiny_model, out)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in parts]
    names = {path.name for path in parts} | {f"{parts[0].name}.quantpress.json"}
    assert {path.name for path in out.parent.iterdir()} == names
