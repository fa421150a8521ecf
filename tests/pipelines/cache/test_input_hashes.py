"""Hashes that are remembered are those that hashlib gives, whatever happens to the files; nothing is read in vain."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantpress.pipelines.cache import input_hashes, stamped_hash
from quantpress.pipelines.cache.input_hashes import InputHashes
from quantpress.quant.errors import InputError


class Reads:
    """Counts the files that are read for a hash, and sets the clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ahead: float = 10.0) -> None:
        self.paths: list[Path] = []
        self.ahead = ahead
        hash_file = stamped_hash.hash_file

        def counted(path: Path, *rest: Any) -> tuple[str, int]:
            self.paths.append(path)
            return hash_file(path, *rest)

        monkeypatch.setattr(stamped_hash, "hash_file", counted)
        monkeypatch.setattr(stamped_hash, "now", lambda: time.time_ns() + int(self.ahead * 1e9))

    def take(self) -> list[str]:
        names = sorted(path.name for path in self.paths)
        self.paths.clear()
        return names


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "a", tmp_path / "b", tmp_path / "empty"]
    for path, data in zip(paths, (b"a" * 70000, b"b", b""), strict=True):
        path.write_bytes(data)
    return paths


def expected(paths: list[Path]) -> dict[Path, tuple[str, int]]:
    return {p: (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_size) for p in paths}


def test_each_file_is_read_once_by_all_runs(tmp_path: Path, files: list[Path], reads: Reads) -> None:
    memory = InputHashes(tmp_path / "cache")
    assert memory.hashes(files) == expected(files)
    assert reads.take() == ["a", "b", "empty"]
    assert memory.hashes(files) == expected(files)
    assert InputHashes(tmp_path / "cache").hashes(files[::-1]) == expected(files)
    assert reads.take() == []
    assert list(memory.hashes(files[::-1])) == files[::-1]
    assert memory.hashes([]) == {}


def test_a_file_that_changed_just_now_is_not_remembered(tmp_path: Path, files: list[Path], reads: Reads) -> None:
    reads.ahead = 1.5
    InputHashes(tmp_path / "cache").hashes(files)
    InputHashes(tmp_path / "cache").hashes(files)
    assert len(reads.take()) == 6
    reads.ahead = 2.5
    InputHashes(tmp_path / "cache").hashes(files)
    InputHashes(tmp_path / "cache").hashes(files)
    assert len(reads.take()) == 3


def test_a_file_from_the_future_is_not_remembered(tmp_path: Path, files: list[Path], reads: Reads) -> None:
    os.utime(files[0], (time.time() + 3600, time.time() + 3600))
    InputHashes(tmp_path / "cache").hashes(files)
    InputHashes(tmp_path / "cache").hashes(files)
    assert reads.take() == ["a", "a", "b", "empty"]


def hidden_change(path: Path) -> None:
    """Other bytes, the same size, and the old time put back, as some tools do."""
    status = path.stat()
    path.write_bytes(b"B" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replaced(path: Path) -> None:
    """Another file with the same size and times under the name."""
    status = path.stat()
    other = path.with_name("other")
    other.write_bytes(b"C" * status.st_size)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("change", [hidden_change, replaced, lambda path: path.write_bytes(b"bb"), os.utime])
def test_every_way_to_change_a_file_is_seen(tmp_path: Path, files: list[Path], reads: Reads, change: Any) -> None:
    InputHashes(tmp_path / "cache").hashes(files)
    reads.take()
    change(files[1])
    assert InputHashes(tmp_path / "cache").hashes(files) == expected(files)
    assert reads.take() == ["b"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from("wumlh"), st.integers(0, 2), st.binary(max_size=3)), max_size=12))
def test_after_any_changes_the_hashes_are_those_of_the_bytes(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, bytes]]
) -> None:
    root = tmp_path_factory.mktemp("any")
    paths = [root / name for name in "abc"]
    for path in paths:
        path.write_bytes(b"")
    for step, which, data in steps:
        path = paths[which]
        if step == "w":
            path.write_bytes(data)
        elif step == "u":
            os.utime(path, (0, 0))
        elif step == "m":
            other = root / "x"
            other.write_bytes(data)
            other.replace(path)
        elif step == "l":
            path.unlink()
            path.symlink_to(paths[(which + 1) % 3]) if not paths[(which + 1) % 3].is_symlink() else path.touch()
        real = [path for path in paths if path.exists()]
        assert InputHashes(root / "cache").hashes(real) == expected(real)


def test_a_link_is_known_by_what_it_leads_to(tmp_path: Path, files: list[Path], reads: Reads) -> None:
    link = tmp_path / "link"
    link.symlink_to(files[0])
    assert InputHashes(tmp_path / "cache").hashes([link]) == {link: expected(files)[files[0]]}
    link.unlink()
    link.symlink_to(files[1])
    assert InputHashes(tmp_path / "cache").hashes([link]) == {link: expected(files)[files[1]]}


def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hash_file = stamped_hash.hash_file

    def slow(path: Path, *rest: Any) -> tuple[str, int]:
        found = hash_file(path, *rest)
        with path.open("ab") as file:
            file.write(b"more")
        return found

    monkeypatch.setattr(stamped_hash, "hash_file", slow)
    with pytest.raises(InputError, match=r"b: the file changed while it was read"):
        InputHashes(tmp_path / "cache").hashes(files[1:2])


@pytest.mark.parametrize("what", ["gone", "folder", "pipe"])
def test_what_is_no_file_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x"
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    with pytest.raises(InputError, match="x: "):
        InputHashes(tmp_path / "cache").hashes([path])


def test_a_damaged_memory_only_costs_time(tmp_path: Path, files: list[Path], reads: Reads) -> None:
    InputHashes(tmp_path / "cache").hashes(files)
    path = tmp_path / "cache" / "input-hashes.json"
    whole = path.read_bytes()
    for damaged in (whole[:-9], b"", whole.replace(b"a", b"b"), b"{}"):
        path.write_bytes(damaged)
        assert InputHashes(tmp_path / "cache").hashes(files) == expected(files)
    reads.take()
    assert InputHashes(tmp_path / "cache").hashes(files) == expected(files)
    assert reads.take() == []


def test_a_memory_that_cannot_be_written_only_costs_time(tmp_path: Path, files: list[Path], reads: Reads) -> None:
    (tmp_path / "cache" / "input-hashes.json").mkdir(parents=True)
    assert InputHashes(tmp_path / "cache").hashes(files) == expected(files)
    (tmp_path / "file").touch()
    assert InputHashes(tmp_path / "file" / "cache").hashes(files) == expected(files)


def test_runs_at_the_same_time_keep_what_each_other_found(tmp_path: Path, files: list[Path], reads: Reads) -> None:
    memories = [InputHashes(tmp_path / "cache") for _ in files]
    threads = [
        threading.Thread(target=memory.hashes, args=([path],)) for memory, path in zip(memories, files, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reads.take()
    assert InputHashes(tmp_path / "cache").hashes(files) == expected(files)
    assert reads.take() == []


def test_only_the_files_of_late_are_remembered(
    tmp_path: Path, files: list[Path], reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_hashes, "_MOST", 2)
    for path in (*files[:2], files[0], files[2]):
        os.utime(path)
        InputHashes(tmp_path / "cache").hashes([path])
    reads.take()
    InputHashes(tmp_path / "cache").hashes([files[0], files[2]])
    assert reads.take() == []
    InputHashes(tmp_path / "cache").hashes(files)
    assert reads.take() == ["b"]


def test_progress_is_told_in_bytes_and_may_end_the_work(tmp_path: Path, files: list[Path]) -> None:
    told: list[tuple[str, int, int]] = []
    InputHashes(tmp_path / "cache").hashes(files, lambda *call: told.append(call))
    assert told[-1] == ("hash inputs", 70001, 70001)

    def stop(phase: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        InputHashes(tmp_path / "other").hashes(files, stop)
    assert not [thread for thread in threading.enumerate() if "quantpress-hash" in thread.name]


def test_progress_is_told_while_a_large_file_is_read(
    tmp_path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int, int]] = []
    asked = threading.Event()
    hash_file = stamped_hash.hash_file

    def slow(path: Path, stop: threading.Event, on_read: Any) -> tuple[str, int]:
        found = hash_file(path, stop, on_read)
        assert asked.wait(20)
        return found

    def progress(*call: Any) -> None:
        told.append(call)
        asked.set()

    monkeypatch.setattr(stamped_hash, "hash_file", slow)
    monkeypatch.setattr(stamped_hash, "_TELL", 0.05)
    assert InputHashes(tmp_path / "cache").hashes(files[:1], progress) == expected(files[:1])
    assert told[0][0] == "hash inputs"
    assert told[-1] == ("hash inputs", 70000, 70000)


def test_in_the_background_nothing_is_read_that_is_remembered(tmp_path: Path, files: list[Path], reads: Reads) -> None:
    memory = InputHashes(tmp_path / "cache")
    memory.hashes(files[:1])
    reads.take()
    with memory.background() as hashes:
        hashes.add(files[:2])
        hashes.add(files)
        assert hashes.results(files) == expected(files)
    assert reads.take() == ["b", "empty"]
    with InputHashes(tmp_path / "cache").background() as hashes:
        hashes.add(files)
        assert hashes.results(files) == expected(files)
    assert reads.take() == []


def test_in_the_background_a_missing_file_is_told_when_it_is_asked_for(tmp_path: Path, files: list[Path]) -> None:
    with InputHashes(tmp_path / "cache").background() as hashes:
        hashes.add([tmp_path / "missing", *files])
        with pytest.raises(InputError, match="missing"):
            hashes.results([*files, tmp_path / "missing"])
