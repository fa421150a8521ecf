"""Inputs from URLs: the bytes that are there, once for each version, whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.registry import register_implementation

from quantpress.pipelines.batch import fetched, transfers
from quantpress.pipelines.batch.remote import fetch
from quantpress.quant.errors import CancelledError, InputError, OutputError
from tests.pipelines.batch.remote_stores import NotedStore, web_server

MODEL = {"config.json": b"{}", "tokenizer.json": b"[]", "model.safetensors": os.urandom(300_000)}


@pytest.fixture
def store() -> Iterator[NotedStore]:
    register_implementation("noted", NotedStore, clobber=True)
    NotedStore.forget()
    yield NotedStore()
    NotedStore.forget()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "_PAUSES", (0.01, 0.01))


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """A folder with a model, as a web server has it."""
    folder = tmp_path / "served"
    write(folder / "model", MODEL)
    return folder


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def put(store: NotedStore, files: dict[str, bytes], folder: str = "/bucket/model") -> None:
    for name, data in files.items():
        store.pipe_file(f"{folder}/{name}", data)


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def gets(store: NotedStore) -> list[str]:
    return [name for what, name in store.done if what == "get"]


def left_over(cache: Path) -> list[str]:
    return [path.name for path in (cache / "inputs").iterdir() if path.name.startswith(".quantpress")]


def test_a_folder_comes_with_its_name_and_bytes(store: NotedStore, tmp_path: Path) -> None:
    put(store, MODEL | {"additional_chat_templates/tool.jinja": b"x"})
    found = fetch("noted://bucket/model", tmp_path)
    assert found.name == "model"
    assert files_in(found) == MODEL | {"additional_chat_templates/tool.jinja": b"x"}
    assert left_over(tmp_path) == []


def test_a_file_comes_with_its_name_and_bytes(store: NotedStore, tmp_path: Path) -> None:
    put(store, {"calib.txt": b"text"})
    found = fetch("noted://bucket/model/calib.txt", tmp_path)
    assert (found.name, found.read_bytes()) == ("calib.txt", b"text")


def test_second_copies_of_the_weights_and_what_training_left_stay_there(store: NotedStore, tmp_path: Path) -> None:
    others = ("pytorch_model.bin", "model.onnx", "m.gguf", "optimizer.pt", ".git", "consolidated.safetensors")
    put(store, MODEL | dict.fromkeys((*others, "checkpoint-1/model.safetensors"), b"x"))
    assert files_in(fetch("noted://bucket/model", tmp_path)) == MODEL


def test_bin_weights_come_where_there_are_no_others(store: NotedStore, tmp_path: Path) -> None:
    files = {"config.json": b"{}", "pytorch_model.bin": b"weights"}
    put(store, files | {"training_args.bin": b"x"})
    assert files_in(fetch("noted://bucket/model", tmp_path)) == files


def test_a_version_is_fetched_once(store: NotedStore, tmp_path: Path) -> None:
    put(store, MODEL)
    first = fetch("noted://bucket/model", tmp_path)
    assert fetch("noted://bucket/model/", tmp_path) == first
    assert sorted(gets(store)) == sorted(MODEL)


def test_another_version_is_another_folder_and_the_old_one_stays(store: NotedStore, tmp_path: Path) -> None:
    put(store, MODEL)
    first = fetch("noted://bucket/model", tmp_path)
    put(store, {"config.json": b"[]"})
    second = fetch("noted://bucket/model", tmp_path)
    assert first != second
    assert files_in(second) == MODEL | {"config.json": b"[]"}
    assert files_in(first) == MODEL


def test_a_store_without_versions_is_asked_each_time_and_the_same_bytes_have_one_place(
    store: NotedStore, tmp_path: Path
) -> None:
    NotedStore.tagged = False
    put(store, MODEL)
    first = fetch("noted://bucket/model", tmp_path)
    assert fetch("noted://bucket/model", tmp_path) == first
    assert len(gets(store)) == 2 * len(MODEL)
    put(store, {"config.json": b"[]"})
    assert fetch("noted://bucket/model", tmp_path) != first
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("damage", ["changed", "cut", "removed"])
def test_a_damaged_copy_is_fetched_again(store: NotedStore, tmp_path: Path, damage: str) -> None:
    put(store, MODEL)
    found = fetch("noted://bucket/model", tmp_path)
    file = found / "model.safetensors"
    if damage == "changed":
        file.write_bytes(bytes(len(MODEL[file.name])))
        os.utime(file, ns=(1, 1))
    elif damage == "cut":
        os.truncate(file, 100)
    else:
        file.unlink()
    assert files_in(fetch("noted://bucket/model", tmp_path)) == MODEL


def test_a_copy_that_was_touched_and_not_changed_is_used(store: NotedStore, tmp_path: Path) -> None:
    put(store, MODEL)
    os.utime(fetch("noted://bucket/model", tmp_path) / "config.json", ns=(1, 1))
    fetch("noted://bucket/model", tmp_path)
    assert len(gets(store)) == len(MODEL)


def test_names_that_lead_elsewhere_are_left_out(
    store: NotedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, MODEL)
    honest = NotedStore.ls

    def hostile(self: NotedStore, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        names = ("../../evil.json", "..", "a\\b.json", "new\nline.json", "/etc/passwd", "")
        return [*honest(self, path, detail=True), *({"name": f"{path}/{n}", "type": "file", "size": 1} for n in names)]

    monkeypatch.setattr(NotedStore, "ls", hostile)
    assert files_in(fetch("noted://bucket/model", tmp_path / "cache")) == MODEL
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize("url", ["noted://bucket/..", "noted://bucket/model/.quantpress-x"])
def test_a_url_without_a_name_for_a_file_is_refused(store: NotedStore, tmp_path: Path, url: str) -> None:
    with pytest.raises(InputError, match="is not a name for a file"):
        fetch(url, tmp_path)


def test_what_is_not_there_is_named(store: NotedStore, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="noted://bucket/none: there is no such file or folder"):
        fetch("noted://bucket/none", tmp_path)


def test_what_changes_while_it_is_fetched_is_refused(
    store: NotedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, MODEL)
    honest = NotedStore.get_file

    def changing(self: NotedStore, rpath: str, lpath: str, **kwargs: Any) -> None:
        honest(self, rpath, lpath, **kwargs)
        put(store, {"tokenizer.json": b"{}"})

    monkeypatch.setattr(NotedStore, "get_file", changing)
    with pytest.raises(InputError, match="changed while it was fetched"):
        fetch("noted://bucket/model", tmp_path)
    monkeypatch.undo()
    assert files_in(fetch("noted://bucket/model", tmp_path))["tokenizer.json"] == b"{}"


@pytest.mark.parametrize(("said", "problem"), [(10, "more than the 10 bytes"), (400_000, "300000 bytes came")])
def test_a_size_that_is_not_true_is_noticed(store: NotedStore, tmp_path: Path, said: int, problem: str) -> None:
    put(store, MODEL)
    store.sizes["model.safetensors"] = said
    with pytest.raises(InputError, match=problem):
        fetch("noted://bucket/model", tmp_path)
    assert not [path for path in (tmp_path / "inputs").iterdir() if not path.name.startswith(".quantpress")]


def test_trouble_of_the_moment_is_tried_again_and_lasting_trouble_leaves_what_was_fetched(
    store: NotedStore, tmp_path: Path
) -> None:
    put(store, MODEL)
    store.fail["get"] = 1
    with pytest.raises(InputError, match="get failed as the test wants"):
        fetch("noted://bucket/model", tmp_path)
    assert gets(store) == ["config.json", *["model.safetensors"] * 3]
    store.fail.clear()
    store.done.clear()
    assert files_in(fetch("noted://bucket/model", tmp_path)) == MODEL
    assert gets(store) == ["model.safetensors", "tokenizer.json"]


def test_a_full_disk_is_found_before_the_first_byte(
    store: NotedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, MODEL)
    store.sizes["model.safetensors"] = 1 << 60
    with pytest.raises(OutputError, match="bytes are needed"):
        fetch("noted://bucket/model", tmp_path)
    assert gets(store) == []


def test_progress_is_told_on_the_callers_thread_and_may_end_the_fetch(store: NotedStore, tmp_path: Path) -> None:
    put(store, MODEL)
    seen: list[tuple[str, int, int, int]] = []

    def progress(phase: str, done: int, total: int) -> None:
        seen.append((phase, done, total, threading.get_ident()))
        if done > 1:
            raise CancelledError("enough")

    with pytest.raises(CancelledError):
        fetch("noted://bucket/model", tmp_path, progress)
    total = sum(map(len, MODEL.values()))
    assert {(phase, whole, thread) for phase, _, whole, thread in seen} == {
        ("fetch model", total, threading.get_ident())
    }
    assert not [thread.name for thread in threading.enumerate() if thread.name == "quantpress-transfer"]
    assert files_in(fetch("noted://bucket/model", tmp_path)) == MODEL


def test_two_at_once_fetch_once(store: NotedStore, tmp_path: Path) -> None:
    put(store, MODEL)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(fetch("noted://bucket/model", tmp_path))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 3
    assert len(gets(store)) == len(MODEL)


def test_file_urls_are_used_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "a b").write_bytes(b"x")
    assert fetch(f"file://{tmp_path}/a%20b", tmp_path / "cache") == tmp_path / "a b"
    assert not (tmp_path / "cache").exists()
    with pytest.raises(InputError, match="no such file"):
        fetch(f"file://{tmp_path}/none", tmp_path / "cache")


class TestWeb:
    """A server of this machine, through fsspec's own client."""

    @pytest.fixture(autouse=True)
    def client(self) -> None:
        pytest.importorskip("aiohttp", reason="fsspec reads http with aiohttp")

    @pytest.mark.parametrize("end", ["", "/"])
    def test_a_listed_folder_comes_whole(self, served: Path, tmp_path: Path, end: str) -> None:
        write(served / "model", {"with space.json": b"1", "sub/x.json": b"2"})
        with web_server(served) as server:
            found = fetch(f"{server.url}/model{end}", tmp_path / "cache")
            assert fetch(f"{server.url}/model/", tmp_path / "cache") == found
        assert files_in(found) == MODEL | {"with space.json": b"1"}
        assert sum(path.endswith(".safetensors") for path in server.got) == 1

    def test_a_file_without_a_date_is_fetched_each_time(self, served: Path, tmp_path: Path) -> None:
        with web_server(served, dated=False) as server:
            url = f"{server.url}/model/model.safetensors?download=true"
            first, second = fetch(url, tmp_path / "cache"), fetch(url, tmp_path / "cache")
        assert first == second
        assert first.read_bytes() == MODEL["model.safetensors"]
        assert len(server.got) == 2

    def test_a_connection_that_breaks_is_tried_again(self, served: Path, tmp_path: Path) -> None:
        with web_server(served, broken=2) as server:
            assert files_in(fetch(f"{server.url}/model", tmp_path / "cache")) == MODEL

    def test_a_connection_that_always_breaks_leaves_nothing_that_looks_whole(
        self, served: Path, tmp_path: Path
    ) -> None:
        with web_server(served, broken=9) as server:
            with pytest.raises(InputError, match="model: the store failed"):
                fetch(f"{server.url}/model", tmp_path / "cache")
            assert not list((tmp_path / "cache/inputs").glob("[!.]*"))
            server.broken = 0
            assert files_in(fetch(f"{server.url}/model", tmp_path / "cache")) == MODEL

    def test_nobody_at_the_address_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="cannot be reached, or there is no such file"):
            fetch("http://127.0.0.1:9/model", tmp_path)

    @pytest.mark.skipif(os.name == "nt", reason="signals")
    def test_after_a_kill_the_next_fetch_goes_on(self, served: Path, tmp_path: Path) -> None:
        write(served / "model", {"model.safetensors": os.urandom(2_000_000)})
        code = "import sys; from pathlib import Path; from quantpress.pipelines.batch.remote import fetch;"
        code += "fetch(sys.argv[1], Path(sys.argv[2]))"
        cache = tmp_path / "cache"
        with web_server(served, slow=0.2) as server:
            url = f"{server.url}/model"
            process = subprocess.Popen([sys.executable, "-c", code, url, str(cache)])
            deadline = time.monotonic() + 30
            while not list(cache.rglob("*.safetensors.part")) and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(0.3)
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert not list((cache / "inputs").glob("[!.]*"))
            server.slow = 0
            before = len(server.got)
            assert files_in(fetch(url, cache)) == files_in(served / "model")
            assert not any(path.endswith(".json") for path in server.got[before:])
        assert left_over(cache) == []


def test_the_record_says_the_hashes_of_what_came(store: NotedStore, tmp_path: Path) -> None:
    import hashlib
    import json

    put(store, MODEL)
    record = json.loads((fetch("noted://bucket/model", tmp_path).parent / fetched.RECORD).read_text())
    assert {file["name"]: file["sha256"] for file in record["files"]} == {
        name: hashlib.sha256(data).hexdigest() for name, data in MODEL.items()
    }
