"""`quantpress cache`: what it lists, finds damaged and removes, and which folder it means."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantpress.pipelines.cache.explain import History
from quantpress.pipelines.cache.keys import key_of
from quantpress.pipelines.cache.store import Cache
from tests.pipelines.cache.making_entries import make, material

Run = Callable[..., Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with Cache(tmp_path / ".quantpress") as cache:
        make(cache)
        History(cache).remember("smol\x1b[31m/gptq", material())
        with cache.making(key_of(material(3)), "prepare", material(3)) as making:
            (making.folder / "step").write_bytes(b"step")
    return tmp_path / ".quantpress"


def damage(folder: Path) -> None:
    (path,) = folder.glob("entries/*/files/codes.bin")
    path.write_bytes(path.read_bytes().replace(b"codes", b"c0des"))


def test_it_lists_pieces_for_people(quantpress: Run, folder: Path) -> None:
    ended = quantpress("cache", "ls", "--cache", folder)
    assert ended.code == 0
    assert key_of(material())[:12] in ended.out
    assert "smol\\x1b[31m/gptq" in ended.out
    assert "unfinished" in ended.out
    assert f"{folder}: 2 pieces, " in ended.out


def test_it_lists_pieces_for_machines(quantpress: Run, folder: Path) -> None:
    ended = quantpress("cache", "ls", "--cache", folder, "--json")
    listed = json.loads(ended.out)
    assert listed["cache"] == str(folder)
    pieces = {piece["name"]: piece for piece in listed["pieces"]}
    whole, begun = pieces[key_of(material())], pieces[key_of(material(3))]
    assert (whole["state"], whole["kind"], whole["for"]) == ("whole", "prepare", ["smol\x1b[31m/gptq"])
    assert (begun["state"], begun["bytes"], begun["created"]) == ("unfinished", 4, None)
    assert whole["created"].endswith("Z")


@pytest.mark.parametrize("content", ["version: 1\ncache: .quantpress\njobs: []\n", "version: 1\njobs: []\n"])
def test_a_pipeline_file_says_which_cache_is_meant(quantpress: Run, folder: Path, content: str) -> None:
    file = folder.parent / "release.yaml"
    file.write_text(content)
    ended = quantpress("cache", "ls", file, "--json")
    assert ended.code == 0
    assert json.loads(ended.out)["cache"] == str(folder)


def test_the_working_folders_cache_is_meant_otherwise(folder: Path) -> None:
    arguments = [sys.executable, "-m", "quantpress", "cache", "ls"]
    ended = subprocess.run(arguments, cwd=folder.parent, capture_output=True, text=True, check=False)
    assert ended.returncode == 0
    assert f"{folder}: 2 pieces" in ended.stdout
    ended = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (3, "")
    assert "no cache is there" in ended.stderr


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        ("cache: [a]\n", 2, "cache is to be the name of a folder"),
        ("cache: '${place}'\n", 2, "depends on variables; give it by --cache"),
        ("cache: [\n", 2, "release.yaml:2"),
        ("cache: nowhere\n", 3, "no cache is there"),
    ],
)
def test_a_file_that_names_no_cache_is_refused(
    quantpress: Run, folder: Path, content: str, code: int, message: str
) -> None:
    file = folder.parent / "release.yaml"
    file.write_text(content)
    ended = quantpress("cache", "ls", file)
    assert ended.code == code
    assert message in ended.err
    assert quantpress("cache", "ls", file, "--cache", folder).code == 2


def test_another_folder_is_refused(quantpress: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    ended = quantpress("cache", "prune", "--all", "--cache", tmp_path)
    assert ended.code == 2
    assert "not a cache of quantpress" in ended.err
    assert (tmp_path / "a.txt").exists()


def test_whole_entries_are_verified(quantpress: Run, folder: Path) -> None:
    ended = quantpress("cache", "verify", "--cache", folder)
    assert ended.code == 0
    assert "1 of 1 entries are whole" in ended.out


def test_damaged_entries_are_told_and_can_be_removed(quantpress: Run, folder: Path) -> None:
    damage(folder)
    ended = quantpress("cache", "verify", "--cache", folder)
    assert ended.code == 3
    assert "codes.bin: the file is damaged" in ended.out
    assert "prune --damaged" in ended.err
    machine = json.loads(quantpress("cache", "verify", "--cache", folder, "--json").out)
    assert [entry["whole"] for entry in machine["entries"]] == [False]
    assert "codes.bin" in machine["entries"][0]["problem"]
    assert list(folder.glob("entries/*"))
    ended = quantpress("cache", "prune", "--cache", folder, "--damaged")
    assert "1 piece removed" in ended.out
    assert not list(folder.glob("entries/*"))
    assert quantpress("cache", "verify", "--cache", folder).code == 0


def test_pruning_tells_what_is_removed_and_what_is_in_use(quantpress: Run, folder: Path) -> None:
    with Cache(folder) as reader:
        assert reader.find(key_of(material()))
        dry = quantpress("cache", "prune", "--cache", folder, "--all", "--dry-run")
        assert "1 piece would be removed" in dry.out
        ended = json.loads(quantpress("cache", "prune", "--cache", folder, "--all", "--json").out)
        assert [piece["name"] for piece in ended["removed"]] == [key_of(material(3))]
        assert [piece["name"] for piece in ended["in_use"]] == [key_of(material())]
        assert ended["freed_bytes"] == 4
        assert "1 more in use by a run" in quantpress("cache", "prune", "--cache", folder, "--all").out
    assert "1 piece removed" in quantpress("cache", "prune", "--cache", folder, "--max-size", "1").out
    assert "0 pieces, 0.0 kB" in quantpress("cache", "ls", "--cache", folder).out


def test_pruning_needs_to_be_told_what(quantpress: Run, folder: Path) -> None:
    ended = quantpress("cache", "prune", "--cache", folder)
    assert ended.code == 2
    assert "--older-than 30d" in ended.err
    ended = quantpress("cache", "prune", "--cache", folder, "--older-than", "soon")
    assert ended.code == 2
    assert "as in 30d" in ended.err


@pytest.mark.parametrize(
    ("age", "seconds"), [("90s", 90), ("2h", 7200), ("1.5d", 129600), ("2W", 1209600), ("5m", 300)]
)
def test_ages_are_read(age: str, seconds: float) -> None:
    from quantpress.pipelines.commands.cache import Age

    assert Age().convert(age, None, None) == seconds


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, quantpress.pipelines.commands.cache, quantpress.pipelines.cache.prune, "
        "quantpress.pipelines.cache.input_hashes, quantpress.pipelines.cache.explain; "
        "heavy = {'torch', 'transformers', 'numba', 'scipy', 'pydantic', 'yaml', 'rich', 'jinja2'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
