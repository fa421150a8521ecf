"""Batches whose outputs are several files: they stand together, and any of them that is lost is made again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from fsspec.registry import register_implementation

from quantpress.pipelines.batch import transfers
from tests.pipelines.batch.batches import Batch, done, gguf, job
from tests.pipelines.batch.remote_stores import NotedStore

SPLIT = {"split_max_tensors": 9}


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    return Batch.with_model(tmp_path)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[NotedStore]:
    monkeypatch.setattr(transfers, "_PAUSES", (0.01, 0.01))
    register_implementation("noted", NotedStore, clobber=True)
    NotedStore.forget()
    yield NotedStore()
    NotedStore.forget()


def parts_of(batch: Batch) -> list[Path]:
    return sorted(batch.output("").glob("m-*.gguf"))


def test_all_files_stand_together(batch: Batch) -> None:
    batch.write(job("a", gguf("Q8_0", "m", **SPLIT)))
    result = batch.run()
    assert done(result) == {"a": "verified"}
    parts = parts_of(batch)
    assert len(parts) > 2
    (output,) = result.jobs[0].outputs
    assert (output.path, output.nbytes) == (str(parts[0]), sum(path.stat().st_size for path in parts))
    assert batch.run().jobs[0].cached


@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize("damage", ["lost", "changed"])
def test_a_file_that_is_lost_or_changed_is_seen(batch: Batch, number: int, damage: str) -> None:
    batch.write(job("a", gguf("Q8_0", "m", **SPLIT)))
    batch.run()
    parts = parts_of(batch)
    before = [path.read_bytes() for path in parts]
    if damage == "lost":
        parts[number].unlink()
    else:
        parts[number].write_bytes(before[number][:-1] + b"x")
    # As with one file or a folder: what may be somebody else's work is not replaced unasked.
    assert "the output exists; give --force" in done(batch.run())["a"]
    again = batch.run(force=True)
    assert (done(again), again.jobs[0].cached) == ({"a": "verified"}, False)
    assert [path.read_bytes() for path in parts] == before


def test_files_that_are_all_lost_are_written_again(batch: Batch) -> None:
    batch.write(job("a", gguf("Q8_0", "m", **SPLIT)))
    batch.run()
    before = {path: path.read_bytes() for path in parts_of(batch)}
    for path in before:
        path.unlink()
    again = batch.run()
    assert (done(again), again.jobs[0].cached) == ({"a": "verified"}, False)
    assert {path: path.read_bytes() for path in parts_of(batch)} == before


def test_a_sidecar_that_is_lost_is_restored(batch: Batch) -> None:
    batch.write(job("a", gguf("Q8_0", "m", **SPLIT)))
    batch.run()
    sidecar = Path(f"{parts_of(batch)[0]}.quantpress.json")
    before = json.loads(sidecar.read_text())
    sidecar.unlink()
    assert batch.run().jobs[0].cached
    assert json.loads(sidecar.read_text()) == before


def test_other_limits_do_not_mix_with_what_stands(batch: Batch) -> None:
    batch.write(job("a", gguf("Q8_0", "m", **SPLIT)))
    batch.run()
    before = {path: path.read_bytes() for path in parts_of(batch)}
    batch.write(job("a", gguf("Q8_0", "m", split_max_tensors=4)))
    assert f"a part of {len(before)} lies where" in done(batch.run())["a"]
    assert {path: path.read_bytes() for path in parts_of(batch)} == before


def test_all_files_go_to_a_store(batch: Batch, store: NotedStore) -> None:
    batch.write(job("a", gguf("Q8_0", "m", **SPLIT)))
    batch.run()
    local = {path.name: path.read_bytes() for path in parts_of(batch)}
    batch.write(job("a", {"gguf": {"outtype": "Q8_0", "output": "noted://bucket/m.gguf", **SPLIT}}))
    assert done(batch.run()) == {"a": "verified"}
    there = {name.removeprefix("/bucket/"): data for name, data in store.all().items()}
    sidecar = f"{min(local)}.quantpress.json"
    assert sorted(there) == sorted([*local, sidecar])
    assert {name: data for name, data in there.items() if name != sidecar} == local
    assert batch.run().jobs[0].cached
    store.pipe_file(f"/bucket/{max(local)}", b"overwritten")
    again = batch.run()
    assert (done(again), again.jobs[0].cached) == ({"a": "verified"}, False)
    assert store.all()[f"/bucket/{max(local)}"] == local[max(local)]
