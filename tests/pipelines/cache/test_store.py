"""Entries appear whole, are checked when they are read, and are made once."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from quantpress.pipelines.cache import entry as entries
from quantpress.pipelines.cache.keys import key_of
from quantpress.pipelines.cache.store import Cache, Making
from quantpress.quant.errors import BusyError, CancelledError, OutputError, UsageError
from tests.pipelines.cache.making_entries import FILES, begin, files_in, fill, make, material

KEY = key_of(material())


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def test_nothing_is_made_by_looking(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    assert cache.find(KEY) is None
    assert cache.peek(KEY) is None
    assert not cache.was_begun(KEY)
    assert cache.kept_keys() == []
    assert cache.remove(KEY)
    assert not cache.folder.exists()


def test_what_was_made_is_found_by_another_run(cache: Cache) -> None:
    made = make(cache)
    found = Cache(cache.folder).find(KEY)
    assert found == made
    assert files_in(found.folder) == FILES
    assert found.record == {"notes": ["ä"], "loss": 0.1}
    assert found.material == material()
    assert found.nbytes == sum(map(len, FILES.values()))
    assert {f.name: f.sha256 for f in found.files} == {n: hashlib.sha256(d).hexdigest() for n, d in FILES.items()}
    assert abs(found.created - time.time()) < 60
    assert not cache.was_begun(KEY)
    assert cache.kept_keys() == [KEY]


def test_the_folder_tells_backups_and_git_to_pass_it_over(cache: Cache) -> None:
    make(cache)
    assert (cache.folder / "CACHEDIR.TAG").read_bytes().startswith(b"Signature: 8a477f597d28d172789f06886806bc55")
    assert (cache.folder / ".gitignore").read_text() == "*\n"


def test_an_entry_is_made_once(cache: Cache) -> None:
    made = make(cache)
    with Cache(cache.folder).making(KEY, "prepare", material()) as making:
        assert making.entry == made


def test_work_that_fails_stays_for_the_next_run_with_its_note(cache: Cache) -> None:
    def steps(making: Making) -> None:
        making.write_note({"output": "a"})
        (making.folder / "step 0").write_bytes(b"0")

    begin(cache, steps)
    assert cache.find(KEY) is None
    assert cache.was_begun(KEY)
    with cache.making(KEY, "prepare", material()) as making:
        assert files_in(making.folder) == {"step 0": b"0"}
        assert making.note == {"output": "a"}
        made = making.commit({})
    assert files_in(made.folder) == {"step 0": b"0"}
    assert [path.name for path in (cache.layout.entry(KEY)).iterdir() if path.name == "note.json"] == []
    with cache.making(KEY, "prepare", material()) as making:
        assert making.note is None


def test_work_that_was_not_begun_leaves_nothing(cache: Cache) -> None:
    begin(cache, lambda making: None)
    assert not cache.was_begun(KEY)
    with cache.making(KEY, "prepare", material()) as making:
        making.write_note({})
        making.drop_note()
    assert not cache.was_begun(KEY)


@pytest.mark.parametrize("name", sorted(name for name, data in FILES.items() if data))
@pytest.mark.parametrize("how", ["flipped", "cut", "longer", "gone", "folder", "link", "pipe"])
def test_a_damaged_file_is_a_miss_and_made_anew(
    cache: Cache, caplog: pytest.LogCaptureFixture, name: str, how: str
) -> None:
    file = make(cache).folder / name
    data = file.read_bytes()
    if how in ("flipped", "cut", "longer"):
        changed = {"flipped": data[:-1] + bytes([data[-1] ^ 1]), "cut": data[:-1], "longer": data + b"\0"}
        file.write_bytes(changed[how])
    else:
        file.unlink()
        if how == "folder":
            file.mkdir()
        elif how == "link":
            file.symlink_to("/etc/hostname")
        elif how == "pipe":
            os.mkfifo(file)
    other = Cache(cache.folder)
    assert other.damage(KEY)
    assert other.find(KEY) is None
    assert "damaged" in caplog.text
    assert name.split("/")[-1] in caplog.text
    assert not other.layout.entry(KEY).exists()
    assert files_in(make(other).folder) == FILES


@pytest.mark.parametrize("name", ["entry.json", "use.lock"])
@pytest.mark.parametrize("maker", [False, True], ids=["find", "making"])
def test_a_damaged_description_is_a_miss(cache: Cache, name: str, maker: bool) -> None:
    make(cache)
    file = cache.layout.entry(KEY) / name
    if name == "use.lock":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[200] ^= 1
        file.write_bytes(data)
    if maker:
        with Cache(cache.folder).making(KEY, "prepare", material()) as making:
            assert making.entry is None
            assert files_in(making.folder) == {}
    else:
        assert Cache(cache.folder).find(KEY) is None
    assert not cache.layout.entry(KEY).exists()


def test_an_entry_under_another_key_is_a_miss(cache: Cache) -> None:
    make(cache)
    other = key_of(material(3))
    cache.layout.entry(KEY).rename(cache.layout.entry(other))
    assert Cache(cache.folder).find(other) is None


def test_files_that_somebody_added_are_no_damage(cache: Cache) -> None:
    entry = make(cache)
    (entry.folder / ".DS_Store").write_bytes(b"x")
    (cache.layout.entries / "README").write_text("not ours")
    (cache.folder / "entries" / ("0" * 64)).mkdir()
    again = Cache(cache.folder)
    assert again.find(KEY) == entry
    assert (cache.layout.entries / "README").exists()


def test_a_file_is_hashed_once_in_a_process_as_long_as_it_does_not_change(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    hash_files = entries.hash_files
    entry = make(cache)

    def counted(paths: Sequence[Path], *rest: Any) -> Any:
        hashed.extend(paths)
        return hash_files(paths, *rest)

    monkeypatch.setattr(entries, "hash_files", counted)
    monkeypatch.setattr("quantpress.pipelines.cache.stamped_hash.now", lambda: time.time_ns() + 10**10)
    assert Cache(cache.folder).find(KEY)
    assert len(hashed) == len(FILES)
    assert Cache(cache.folder).find(KEY)
    assert len(hashed) == len(FILES)
    (entry.folder / "empty").touch()  # its time of change is another one now
    assert Cache(cache.folder).find(KEY)
    assert len(hashed) == len(FILES) + 1
    os.utime(entry.folder / "codes.bin", ns=(0, 0))
    times = (entry.folder / "codes.bin").stat()
    data = FILES["codes.bin"]
    (entry.folder / "codes.bin").write_bytes(data[:-1] + b"X")
    os.utime(entry.folder / "codes.bin", ns=(times.st_atime_ns, times.st_mtime_ns))  # as `touch -r` hides a change
    assert Cache(cache.folder).find(KEY) is None


def test_a_file_that_was_written_just_now_is_hashed_again(cache: Cache) -> None:
    entry = make(cache)
    assert cache.find(KEY)
    file = entry.folder / "codes.bin"
    stat = file.stat()
    with file.open("r+b") as opened:
        opened.write(b"CODES ")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert cache.find(KEY) is None


def test_work_that_is_done_again_takes_the_place_of_the_entry_at_its_end(cache: Cache) -> None:
    make(cache)
    with cache.making(KEY, "prepare", material()) as making:
        making.redo()
        assert making.entry is None
        assert files_in(making.folder) == {}
        assert cache.peek(KEY)
        fill(making.folder, {"new": b"new"})
        made = making.commit({"new": True})
    assert files_in(made.folder) == {"new": b"new"}
    assert Cache(cache.folder).find(KEY) == made
    assert list(cache.layout.trash.iterdir()) == []


def test_a_record_is_replaced(cache: Cache) -> None:
    made = make(cache)
    updated = cache.update(KEY, {"verdict": "passed"})
    assert updated is not None
    assert updated.record == {"verdict": "passed"}
    assert (updated.files, updated.created, updated.material) == (made.files, made.created, made.material)
    assert Cache(cache.folder).find(KEY) == updated
    assert cache.update(key_of(material(2)), {}) is None
    assert not cache.was_begun(key_of(material(2)))


def test_a_material_that_is_not_the_keys_is_refused(cache: Cache) -> None:
    with pytest.raises(ValueError, match="not the key"), cache.making(KEY, "prepare", material(3)):
        pass
    for text in ("", "../../x", KEY.upper()):
        with pytest.raises(ValueError, match="is not a key"):
            cache.find(text)


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_only_regular_files_are_kept(cache: Cache, kind: str) -> None:
    with cache.making(KEY, "x", material()) as making:
        if kind == "link":
            (making.folder / "a").symlink_to("/etc/hostname")
        else:
            os.mkfifo(making.folder / "a")
        with pytest.raises(OutputError, match="only regular files"):
            making.commit({})
    assert cache.find(KEY) is None


def test_a_record_that_is_not_plain_keeps_the_work(cache: Cache) -> None:
    with cache.making(KEY, "x", material()) as making:
        fill(making.folder)
        with pytest.raises(UsageError, match="nan"):
            making.commit({"loss": float("nan")})
    with cache.making(KEY, "x", material()) as making:
        assert files_in(making.folder) == FILES


@pytest.mark.parametrize("call", ["fsync", "rename", "open"])
def test_a_full_disk_leaves_the_work_and_no_entry(cache: Cache, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    real = getattr(os, call)
    with cache.making(KEY, "x", material()) as making:
        fill(making.folder)

        def full(path: Any, *rest: Any, **named: Any) -> Any:
            if call == "fsync" or str(making.folder.parent) in str(path):
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(path, *rest, **named)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            with pytest.raises(OutputError, match="No space left"):
                making.commit({})
    assert cache.find(KEY) is None
    assert cache.was_begun(KEY)
    with cache.making(KEY, "x", material()) as making:
        assert files_in(making.folder) == FILES
        assert files_in(making.commit({}).folder) == FILES


def test_whoever_comes_second_waits_and_finds_the_entry(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    found = []

    def second() -> None:
        with Cache(cache.folder).making(KEY, "prepare", material()) as making:
            found.append(making.entry)

    with cache.making(KEY, "prepare", material()) as making:
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(1.5)
        assert not found
        fill(making.folder)
        made = making.commit({})
    thread.join(10)
    assert found == [made]
    assert caplog.text.count("waiting for another run") == 1


def test_whoever_cannot_wait_is_told(cache: Cache) -> None:
    other = Cache(cache.folder)
    with cache.making(KEY, "prepare", material()):
        start = time.monotonic()
        with (
            pytest.raises(BusyError, match=r"another run is making prepare"),
            other.making(KEY, "prepare", material(), wait=0.3),
        ):
            pass
        assert 0.3 <= time.monotonic() - start < 3
        with pytest.raises(CancelledError), other.making(KEY, "prepare", material(), cancelled=lambda: True):
            pass
        assert not other.remove(KEY, work=True)
        with other.making(key_of(material(3)), "prepare", material(3), wait=0):
            pass


def test_a_damaged_entry_that_another_run_makes_anew_is_left_to_it(
    cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    file = make(cache).folder / "codes.bin"
    cache.close()
    with cache.making(KEY, "prepare", material()):
        file.write_bytes(b"damaged")
        with caplog.at_level(logging.WARNING):
            assert Cache(cache.folder).find(KEY) is None
        assert file.read_bytes() == b"damaged"


def test_a_cache_of_a_newer_quantpress_is_refused(cache: Cache) -> None:
    make(cache)
    path = cache.folder / "layout.json"
    path.write_text(json.dumps({"sha256": "other form", "value": {"layout": 2}}))
    with pytest.raises(UsageError, match="layout 2, made by a newer quantpress"):
        Cache(cache.folder)
    for text in ("", "{}", "[]", '{"value": {"layout": true}}', '{"value": {"layout": 0}}'):
        path.write_text(text)
        with pytest.raises(UsageError, match=r"layout\.json: damaged"):
            Cache(cache.folder)


def test_a_folder_that_is_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match=r"not a cache of quantpress: it holds 'thesis\.tex'"):
        Cache(tmp_path)
    with pytest.raises(UsageError, match="the cache is to be a folder"):
        Cache(tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_inputs_that_were_fetched_first_make_no_strange_folder(tmp_path: Path) -> None:
    (tmp_path / "c" / "inputs").mkdir(parents=True)
    (tmp_path / "c" / ".layout.json-7-0f.tmp").touch()
    assert make(Cache(tmp_path / "c"))


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        make(Cache(tmp_path / "file" / "cache"))
