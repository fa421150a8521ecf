"""Entries that are in use are not removed, and holding them takes little."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from quantpress.pipelines.cache import use_lock
from quantpress.pipelines.cache.keys import key_of
from quantpress.pipelines.cache.store import Cache
from quantpress.quant.errors import CancelledError
from tests.pipelines.cache.making_entries import FILES, begin, files_in, make, material

KEY = key_of(material())


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def test_an_entry_in_use_is_not_removed(cache: Cache) -> None:
    make(cache)
    cache.close()
    reader, other = Cache(cache.folder), Cache(cache.folder)
    found = reader.find(KEY)
    assert found is not None
    assert not other.remove(KEY)
    assert files_in(found.folder) == FILES
    reader.close()
    assert other.remove(KEY)
    assert other.find(KEY) is None
    assert list(other.layout.trash.iterdir()) == []


def test_an_entry_whose_reader_was_forgotten_is_removed(cache: Cache) -> None:
    make(cache)
    cache.close()
    reader = Cache(cache.folder)
    assert reader.find(KEY)
    del reader
    gc.collect()
    assert cache.remove(KEY)


def test_an_entry_that_is_only_looked_at_is_not_held(cache: Cache) -> None:
    make(cache)
    cache.close()
    reader = Cache(cache.folder)
    assert reader.find(KEY, hold=False)
    assert reader.peek(KEY)
    assert reader.damage(KEY) == ""
    assert cache.remove(KEY)


def test_one_that_finds_and_holds_does_not_stop_holding_by_looking(cache: Cache) -> None:
    make(cache)
    cache.close()
    reader = Cache(cache.folder)
    assert reader.find(KEY)
    assert reader.find(KEY, hold=False)
    assert not cache.remove(KEY)


def test_one_that_holds_an_entry_that_was_replaced_holds_the_new_one(cache: Cache) -> None:
    make(cache)
    cache.close()
    reader, other = Cache(cache.folder), Cache(cache.folder)
    assert reader.find(KEY)
    with other.making(KEY, "prepare", material()) as making:
        making.redo()
        made = making.commit({})
    other.close()
    assert reader.find(KEY) == made
    assert not other.remove(KEY)


def test_an_entry_that_goes_away_while_its_lock_is_taken_is_not_there(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make(cache)
    cache.close()
    take = use_lock._locks

    def late(descriptor: int, path: Path, *, shared: bool) -> bool:
        cache.layout.entry(KEY).rename(cache.folder / "trash")
        return take(descriptor, path, shared=shared)

    monkeypatch.setattr(use_lock, "_locks", late)
    assert Cache(cache.folder).find(KEY) is None
    assert not caplog.text


def test_an_entry_can_be_held_without_reading_it(cache: Cache) -> None:
    make(cache)
    cache.close()
    other = Cache(cache.folder)
    assert other.hold(KEY)
    assert not other.hold(key_of(material(3)))
    assert not cache.remove(KEY)


def test_progress_is_told_when_entries_are_made_and_checked_and_may_end_it(cache: Cache) -> None:
    told: list[tuple[str, int, int]] = []
    total = sum(map(len, FILES.values()))
    make(Cache(cache.folder, lambda *call: told.append(call)))
    assert told[-1] == ("hash what is kept", total, total)
    assert Cache(cache.folder, lambda *call: told.append(call)).find(KEY)
    assert told[-1] == ("check the cache", total, total)

    def stop(phase: str, done: int, total: int) -> None:
        raise CancelledError

    with pytest.raises(CancelledError):
        Cache(cache.folder, stop).find(KEY)
    assert Cache(cache.folder).find(KEY)


def test_many_entries_do_not_take_all_descriptors(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantpress.pipelines.cache.store._MOST_HELD", 3)
    before = descriptors()
    for bits in range(8):
        make(cache, bits, {"x": b"x"})
    assert descriptors() == before + 3
    others = Cache(cache.folder)
    assert [others.remove(key_of(material(bits))) for bits in range(8)] == [True] * 5 + [False] * 3
    cache.close()
    assert descriptors() == before


def test_removing_an_entry_leaves_work_and_note_unless_it_is_asked_for(cache: Cache) -> None:
    make(cache)
    begin(cache, lambda making: (making.redo(), making.write_note({"output": "a"})))
    assert cache.remove(KEY)
    with cache.making(KEY, "prepare", material()) as making:
        assert making.entry is None
        assert making.note == {"output": "a"}
    assert cache.remove(KEY, work=True)
    assert not cache.was_begun(KEY)
