"""The same inputs and options give the same bytes: for any threads, hash seed, working folder, cache and shard layout.

Five runs here, in which each of these changes; `QUANTPRESS_LONG=1` for every combination of them.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from quantpress.pipelines.default_text import default_text
from tests.pipelines.commands.peft_adapters import make_adapter
from tests.repeat.kinds import CALIBRATED, KINDS
from tests.tiny import tiny_checkpoint

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Way:
    """How one run differs from others; none of it may show in what is written.

    Attributes:
        threads: worker threads, and processes of a batch.
        seed: PYTHONHASHSEED.
        relative: the working folder lies beside the inputs, which are named relative to it.
        cache: "cold"; "warm", all of an earlier run; or "half", where every second entry is gone.
        layout: "one" file of weights, "shards", or shards that hold the tensors in "reverse" order.
    """

    threads: int = 1
    seed: str = "0"
    relative: bool = False
    cache: str = "cold"
    layout: str = "one"

    def __str__(self) -> str:
        folder = "relative" if self.relative else "absolute"
        return f"{self.threads}-{self.seed}-{folder}-{self.cache}-{self.layout}"


SHORT = (
    Way(),  # the same once more
    Way(threads=2, seed="1", relative=True, cache="warm"),
    Way(threads=2, seed="random", layout="shards"),
    Way(seed="random", relative=True, cache="half", layout="reverse"),
    Way(threads=2, cache="half"),
)
EVERY = tuple(
    itertools.starmap(
        Way,
        itertools.product(
            (1, 2), ("0", "1", "random"), (False, True), ("cold", "warm", "half"), ("one", "shards", "reverse")
        ),
    )
)
WAYS = EVERY if os.environ.get("QUANTPRESS_LONG") else SHORT


@dataclass(frozen=True)
class Pressed:
    """What a run wrote.

    Attributes:
        folder: its working folder, the cache in it.
        files: name -> bytes; of sidecars without their timings.
    """

    folder: Path
    files: dict[str, bytes]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in each layout, an adapter and a text."""
    folder = tmp_path_factory.mktemp("inputs")
    one = tiny_checkpoint(folder / "one" / "tiny", "llama", hidden_size=256, intermediate_size=256, dtype="bfloat16")
    weights = load_file(one / "model.safetensors")
    _in_shards(one, folder / "shards" / "tiny", weights, sorted(weights))
    _in_shards(one, folder / "reverse" / "tiny", weights, sorted(weights, reverse=True))
    make_adapter(one, folder / "adapter")
    (folder / "text.txt").write_text(default_text().text[:20_000], encoding="utf-8")
    return folder


def _in_shards(one: Path, folder: Path, weights: dict[str, Any], names: Sequence[str]) -> None:
    """Writes the same model in three files of weights, each with every third name."""
    shutil.copytree(one, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    where = {}
    for number in range(3):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        part = names[number::3]
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}), encoding="utf-8")


def press(inputs: Path, folder: Path, way: Way) -> Pressed:
    """Writes every kind of output in one process."""
    named = [inputs / way.layout / "tiny", inputs / "adapter", inputs / "text.txt"]
    words = [os.path.relpath(path, folder) if way.relative else str(path) for path in named]
    environment = {**os.environ, "PYTHONHASHSEED": way.seed, "OMP_NUM_THREADS": str(way.threads)}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-m", "tests.repeat.press", *words, "cache", str(way.threads)],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Pressed(folder, _written(folder))


def _written(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name.startswith("cache/") or name == "batch.yaml":
            continue
        data = path.read_bytes()
        if name.endswith("quantpress.json"):
            record = json.loads(data)
            assert record.pop("timings")
            data = json.dumps(record).encode()
        found[name] = data
    return found


def _filled_cache(way: Way, first: Pressed, folder: Path) -> None:
    if way.cache == "cold":
        return
    shutil.copytree(first.folder / "cache", folder / "cache", symlinks=True)
    if way.cache == "half":
        entries = sorted(path for path in (folder / "cache").glob("*/*") if path.is_dir())
        for entry in entries[::2]:
            shutil.rmtree(entry)


@pytest.fixture(scope="module")
def first(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Pressed:
    pressed = press(inputs, tmp_path_factory.mktemp("first"), Way())
    assert {name.partition("/")[0] for name in pressed.files} >= {name.partition("/")[0] for name in KINDS | CALIBRATED}
    return pressed


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_kind_of_output_has_the_same_bytes(way: Way, inputs: Path, first: Pressed, tmp_path: Path) -> None:
    folder = inputs / f"run-{way}" if way.relative else tmp_path
    folder.mkdir(exist_ok=True)
    _filled_cache(way, first, folder)
    again = press(inputs, folder, way)
    wanted, found = dict(first.files), dict(again.files)
    if way.layout != "one":  # a sidecar names the files of its inputs, and those do differ
        for files in (wanted, found):
            _without_inputs(files)
    assert wanted.keys() == found.keys()
    different = [name for name in wanted if wanted[name] != found[name]]
    assert different == [], " ".join(different)
    shutil.rmtree(folder)


def _without_inputs(files: dict[str, bytes]) -> None:
    for name, data in files.items():
        if name.endswith("quantpress.json"):
            record = json.loads(data)
            assert record.pop("inputs")
            assert record["predicate"]["buildDefinition"].pop("resolvedDependencies")
            files[name] = json.dumps(record).encode()


def test_a_sidecar_says_on_which_device_it_was_made(first: Pressed) -> None:
    records = {name: json.loads(data) for name, data in first.files.items() if name.endswith("quantpress.json")}
    assert len(records) > 20
    assert {name: record["environment"]["device"] for name, record in records.items()} == dict.fromkeys(records, "cpu")
