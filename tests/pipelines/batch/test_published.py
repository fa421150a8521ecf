"""Outputs at URLs: whole files, the sidecar last, nothing replaced that is not ours or not meant."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fsspec.registry import register_implementation

from quantpress.pipelines.batch import transfers
from quantpress.pipelines.batch.remote import (
    check_publishable,
    publish,
    published_sidecar,
    remote_state,
    remote_target,
)
from quantpress.quant.errors import CancelledError, OutputError, UsageError
from tests.pipelines.batch.remote_stores import NotedStore, ObjectStore

FOLDER = {"config.json": b"{}", "model.safetensors": b"w" * 5000, "additional_chat_templates/tool.jinja": b"t"}


@pytest.fixture(params=["noted", "r2"])
def protocol(request: pytest.FixtureRequest) -> Iterator[str]:
    """A store that moves files to their names, and one that shows only whole files anyway."""
    for kind in (NotedStore, ObjectStore):
        register_implementation(kind.protocol, kind, clobber=True)
        kind.forget()
    yield str(request.param)
    for kind in (NotedStore, ObjectStore):
        kind.forget()


@pytest.fixture
def store(protocol: str) -> NotedStore:
    return NotedStore() if protocol == "noted" else ObjectStore()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "_PAUSES", (0.01, 0.01))


def sidecar_of(*outputs: object, seconds: float = 1.0) -> bytes:
    return json.dumps({"outputs": outputs, "timings": {"gguf": seconds}}).encode()


def file_output(folder: Path, data: bytes = b"gguf" * 1000, seconds: float = 1.0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "m-Q8_0.gguf"
    path.write_bytes(data)
    entry = {"name": path.name, "sha256": str(hash(data)), "bytes": len(data)}
    (folder / f"{path.name}.quantpress.json").write_bytes(sidecar_of(entry, seconds=seconds))
    return path


def split_output(folder: Path, data: bytes = b"gguf" * 1000, count: int = 3) -> Path:
    """A model in several files; the sidecar of the first speaks of all."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"m-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    for number, path in enumerate(paths):
        path.write_bytes(data + bytes([number]))
    entries = [{"name": path.name, "sha256": str(hash(path.read_bytes())), "bytes": len(data) + 1} for path in paths]
    (folder / f"{paths[0].name}.quantpress.json").write_bytes(sidecar_of(*entries))
    return paths[0]


def folder_output(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    entries = [{"name": name, "sha256": str(hash(data)), "bytes": len(data)} for name, data in sorted(files.items())]
    (path / "quantpress.json").write_bytes(sidecar_of(*entries))
    return path


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_file_and_its_sidecar_arrive(protocol: str, store: NotedStore, tmp_path: Path) -> None:
    local = file_output(tmp_path)
    publish(local, f"{protocol}://bucket/v1/m-Q8_0.gguf")
    assert store.all() == {f"/bucket/v1/{name}": data for name, data in files_in(tmp_path).items()}


def test_all_files_of_a_split_model_arrive(protocol: str, store: NotedStore, tmp_path: Path) -> None:
    local = split_output(tmp_path)
    (tmp_path / "n.gguf").write_bytes(b"another output beside it")
    state = publish(local, f"{protocol}://bucket/v1/{local.name}")
    wanted = {f"/bucket/v1/{name}": data for name, data in files_in(tmp_path).items() if name != "n.gguf"}
    assert store.all() == wanted
    assert sorted(state["files"]) == sorted(name.rpartition("/")[2] for name in wanted)
    assert remote_state(f"{protocol}://bucket/v1/{local.name}") == state


@pytest.mark.parametrize("number", [1, 2, 3])
def test_any_file_of_a_split_model_needs_force_and_is_looked_after(
    protocol: str, store: NotedStore, tmp_path: Path, number: int
) -> None:
    name = f"m-0000{number}-of-00003.gguf"
    store.pipe_file(f"/bucket/{name}", b"theirs")
    local = split_output(tmp_path)
    url = f"{protocol}://bucket/{local.name}"
    with pytest.raises(UsageError, match="the output exists; give --force"):
        check_publishable(url, folder=False, force=False)
    with pytest.raises(UsageError, match="the output exists; give --force"):
        publish(local, url)
    assert store.all() == {f"/bucket/{name}": b"theirs"}
    state = publish(local, url, force=True)
    store.pipe_file(f"/bucket/{name}", b"overwritten")
    assert remote_state(url) != state


def test_a_folder_arrives(protocol: str, store: NotedStore, tmp_path: Path) -> None:
    local = folder_output(tmp_path / "m", FOLDER)
    publish(local, f"{protocol}://bucket/v1/m/")
    assert store.all() == {f"/bucket/v1/m/{name}": data for name, data in files_in(local).items()}


def test_the_sidecar_comes_last(protocol: str, store: NotedStore, tmp_path: Path) -> None:
    publish(folder_output(tmp_path / "m", FOLDER), f"{protocol}://bucket/m")
    puts = [name for what, name in store.done if what == ("mv" if protocol == "noted" else "put")]
    assert puts[-1] == "quantpress.json"
    assert len(puts) == len(FOLDER) + 1


def test_a_store_that_shows_half_files_gets_them_under_other_names(store: NotedStore, tmp_path: Path) -> None:
    publish(file_output(tmp_path), f"{store.protocol}://bucket/m-Q8_0.gguf")
    puts = [name for what, name in store.done if what == "put"]
    assert any(name.startswith(".quantpress-") for name in puts) == (store.protocol == "noted")
    assert not [name for name in store.all() if ".quantpress-" in name]


def test_another_output_is_not_replaced_without_force(protocol: str, store: NotedStore, tmp_path: Path) -> None:
    url = f"{protocol}://bucket/m-Q8_0.gguf"
    publish(file_output(tmp_path / "a"), url)
    before, other = store.all(), file_output(tmp_path / "b", b"other")
    with pytest.raises(UsageError, match="the output exists; give --force"):
        publish(other, url)
    with pytest.raises(UsageError, match="the output exists; give --force"):
        check_publishable(url, folder=False, force=False)
    assert store.all() == before
    check_publishable(url, folder=False, force=True)
    publish(other, url, force=True)
    assert store.all()["/bucket/m-Q8_0.gguf"] == b"other"


def test_the_same_output_may_be_put_there_again(protocol: str, store: NotedStore, tmp_path: Path) -> None:
    url = f"{protocol}://bucket/m-Q8_0.gguf"
    publish(file_output(tmp_path), url)
    store.store["/bucket/m-Q8_0.gguf"].write(b"damaged")
    publish(file_output(tmp_path, seconds=2.0), url)
    assert store.all() == {f"/bucket/{name}": data for name, data in files_in(tmp_path).items()}


def test_a_folder_of_somebody_else_is_not_replaced_even_with_force(
    protocol: str, store: NotedStore, tmp_path: Path
) -> None:
    store.pipe_file("/bucket/m/config.json", b"theirs")
    with pytest.raises(UsageError, match=r"no quantpress\.json, so it is no output of quantpress"):
        publish(folder_output(tmp_path / "m", FOLDER), f"{protocol}://bucket/m", force=True)
    assert store.all() == {"/bucket/m/config.json": b"theirs"}


def test_force_leaves_no_file_of_the_old_folder(protocol: str, store: NotedStore, tmp_path: Path) -> None:
    url = f"{protocol}://bucket/m"
    publish(folder_output(tmp_path / "a/m", FOLDER | {"model-00002.safetensors": b"old"}), url)
    local = folder_output(tmp_path / "b/m", FOLDER | {"config.json": b"[]"})
    publish(local, url, force=True)
    assert store.all() == {f"/bucket/m/{name}": data for name, data in files_in(local).items()}


@pytest.mark.parametrize("kind", ["file", "split", "folder"])
@pytest.mark.parametrize("succeed", [0, 1])
def test_what_failed_half_way_has_no_sidecar_and_goes_on_without_force(
    protocol: str, store: NotedStore, tmp_path: Path, kind: str, succeed: int
) -> None:
    if kind == "folder":
        local = folder_output(tmp_path / "o/m", FOLDER)
    else:
        local = file_output(tmp_path / "o") if kind == "file" else split_output(tmp_path / "o")
    url = f"{protocol}://bucket/{local.name}"
    store.fail["put"] = succeed
    with pytest.raises(OutputError, match="put failed as the test wants"):
        publish(local, url)
    assert not [name for name in store.all() if name.endswith("quantpress.json")]
    store.fail.clear()
    publish(local, url)
    wanted = files_in(tmp_path / "o")
    assert store.all() == {f"/bucket/{name}": data for name, data in wanted.items()}


def test_what_another_run_left_half_is_not_replaced_without_force(
    protocol: str, store: NotedStore, tmp_path: Path
) -> None:
    url = f"{protocol}://bucket/m-Q8_0.gguf"
    store.fail["put"] = 1
    with pytest.raises(OutputError):
        publish(file_output(tmp_path / "a"), url)
    store.fail.clear()
    with pytest.raises(UsageError, match="the output exists"):
        publish(file_output(tmp_path / "b", b"other"), url)


def test_a_replaced_sidecar_never_speaks_of_mixed_files(protocol: str, store: NotedStore, tmp_path: Path) -> None:
    url = f"{protocol}://bucket/m"
    publish(folder_output(tmp_path / "a/m", FOLDER), url)
    store.fail["put"] = 1
    with pytest.raises(OutputError):
        publish(folder_output(tmp_path / "b/m", dict.fromkeys(FOLDER, b"new")), url, force=True)
    assert published_sidecar(url) is None


def test_the_state_is_the_same_until_something_changes(protocol: str, store: NotedStore, tmp_path: Path) -> None:
    url = f"{protocol}://bucket/m"
    assert remote_state(url) is None
    state = publish(folder_output(tmp_path / "m", FOLDER), url)
    assert remote_state(url) == state == json.loads(json.dumps(state))
    store.pipe_file("/bucket/m/config.json", b"[]")
    assert remote_state(url) != state
    store.rm_file("/bucket/m/model.safetensors")
    assert remote_state(url) != state


def test_the_sidecar_can_be_read_back(protocol: str, store: NotedStore, tmp_path: Path) -> None:
    local = file_output(tmp_path)
    url = f"{protocol}://bucket/{local.name}"
    assert published_sidecar(url) is None
    publish(local, url)
    assert published_sidecar(url) == json.loads((tmp_path / f"{local.name}.quantpress.json").read_text())
    store.pipe_file(f"/bucket/{local.name}.quantpress.json", b"{no json")
    assert published_sidecar(url) is None


def test_a_size_that_is_another_afterwards_is_an_error(protocol: str, store: NotedStore, tmp_path: Path) -> None:
    store.sizes["m-Q8_0.gguf"] = 3
    with pytest.raises(OutputError, match="was put there with 4000 bytes and the store has 3 bytes"):
        publish(file_output(tmp_path), f"{protocol}://bucket/m-Q8_0.gguf")


def test_progress_is_told_on_the_callers_thread_and_may_end_it(
    protocol: str, store: NotedStore, tmp_path: Path
) -> None:
    seen = []

    def progress(phase: str, done: int, total: int) -> None:
        seen.append((phase, total, threading.get_ident()))
        if done:
            raise CancelledError("enough")

    url = f"{protocol}://bucket/m-Q8_0.gguf"
    with pytest.raises(CancelledError):
        publish(file_output(tmp_path), url, progress=progress)
    assert set(seen) == {("publish m-Q8_0.gguf", 4000, threading.get_ident())}
    assert published_sidecar(url) is None


def test_a_url_with_another_name_is_refused(protocol: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"must end in the name of the output, m-Q8_0\.gguf"):
        publish(file_output(tmp_path), f"{protocol}://bucket/m.gguf")


def test_a_disk_is_a_store_too(tmp_path: Path) -> None:
    local = folder_output(tmp_path / "m", FOLDER)
    url = f"file://{tmp_path}/elsewhere/m"
    state = publish(local, url)
    assert files_in(tmp_path / "elsewhere/m") == files_in(local)
    assert remote_state(url) == state


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("s3://bucket/a/{name}.gguf", "s3://bucket/a/x.gguf"),
        ("memory://{name}.gguf", "memory://x.gguf"),
        ("memory:///{name}/", "memory:///x.gguf"),
    ],
)
def test_the_last_part_is_replaced_by_the_name(url: str, target: str) -> None:
    assert remote_target(url, "x.gguf") == target
