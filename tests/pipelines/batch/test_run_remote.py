"""Batches whose inputs come from a web server and whose outputs go to a store."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from fsspec.registry import register_implementation

from quantpress.pipelines.batch import transfers
from tests.pipelines.batch.batches import Batch, done, job
from tests.pipelines.batch.remote_stores import NotedStore, web_server

pytest.importorskip("aiohttp", reason="fsspec reads http with aiohttp")

FILE = {"gguf": {"outtype": "Q8_0", "output": "noted://bucket/{name}-{ftype}.gguf"}}
FOLDER = {"safetensors": {"dtype": "f16", "output": "noted://bucket/f16"}}


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[NotedStore]:
    monkeypatch.setattr(transfers, "_PAUSES", (0.01, 0.01))
    register_implementation("noted", NotedStore, clobber=True)
    NotedStore.forget()
    yield NotedStore()
    NotedStore.forget()


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    return Batch.with_model(tmp_path)


def test_a_model_from_a_server_gives_the_bytes_of_the_same_model_on_the_disk(batch: Batch, store: NotedStore) -> None:
    with web_server(batch.folder) as server:
        batch.write(
            job("remote", FILE, FOLDER, model=f"{server.url}/model"),
            job("here", {"gguf": {"outtype": "Q8_0", "output": "out/here.gguf"}}),
        )
        assert done(batch.run()) == {"remote": "verified", "here": "verified"}
        loads = sum(path.endswith(".safetensors") for path in server.got)
        again = batch.run()
        assert sum(path.endswith(".safetensors") for path in server.got) == loads == 1
    assert all(job.cached for job in again.jobs)
    assert store.all()["/bucket/model-Q8_0.gguf"] == batch.output("here.gguf").read_bytes()
    assert {name for name in store.all() if "f16" in name} >= {
        "/bucket/f16/config.json",
        "/bucket/f16/model.safetensors",
        "/bucket/f16/quantpress.json",
    }


def test_an_output_that_was_overwritten_in_the_store_is_put_there_again(batch: Batch, store: NotedStore) -> None:
    batch.write(job("a", FILE))
    assert done(batch.run()) == {"a": "verified"}
    wanted = hashlib.sha256(store.all()["/bucket/model-Q8_0.gguf"]).hexdigest()
    store.pipe_file("/bucket/model-Q8_0.gguf", b"overwritten")
    again = batch.run()
    assert (done(again), again.jobs[0].cached) == ({"a": "verified"}, False)
    assert hashlib.sha256(store.all()["/bucket/model-Q8_0.gguf"]).hexdigest() == wanted


def test_what_is_in_the_store_is_not_replaced_by_other_options_without_force(batch: Batch, store: NotedStore) -> None:
    batch.write(job("a", {"gguf": {"outtype": "Q8_0", "output": "noted://bucket/m.gguf"}}))
    batch.run()
    before = store.all()
    batch.write(job("a", {"gguf": {"outtype": "Q4_0", "output": "noted://bucket/m.gguf"}}))
    assert "the output exists; give --force" in done(batch.run())["a"]
    assert store.all() == before
    assert done(batch.run(force=True)) == {"a": "verified"}
    assert store.all()["/bucket/m.gguf"] != before["/bucket/m.gguf"]


def test_a_server_that_is_not_there_fails_its_job_alone(batch: Batch, store: NotedStore) -> None:
    batch.write(job("gone", FILE, model="http://127.0.0.1:9/model"), job("here", FOLDER))
    result = done(batch.run())
    assert "http://127.0.0.1:9/model: cannot be reached" in result["gone"]
    assert result["here"] == "verified"


def test_a_store_that_fails_fails_the_job_and_the_next_run_goes_on(batch: Batch, store: NotedStore) -> None:
    batch.write(job("a", FOLDER))
    store.fail["put"] = 2
    assert "put failed as the test wants" in done(batch.run())["a"]
    assert not [name for name in store.all() if name.endswith("quantpress.json")]
    store.fail.clear()
    assert done(batch.run()) == {"a": "verified"}
    assert [name for name in store.all() if name.endswith("quantpress.json")]
