"""Making room removes what was asked for and nothing that a run is using."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from quantpress.convert.atomic import held_output
from quantpress.pipelines.cache.contents import DAMAGED, INPUT, UNFINISHED, WHOLE, Piece, pieces
from quantpress.pipelines.cache.explain import GONE, History
from quantpress.pipelines.cache.keys import key_of
from quantpress.pipelines.cache.prune import Wanted, prune
from quantpress.pipelines.cache.store import Cache
from tests.pipelines.cache.making_entries import FILES, make, material

DAY = 86400.0
ALL = Wanted(everything=True)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def key(bits: int) -> str:
    return key_of(material(bits))


def aged(folder: Path, days: float) -> None:
    """Sets all times of a folder back."""
    when = time.time() - days * DAY
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (when, when))


def entry(cache: Cache, bits: int, nbytes: int, days: float) -> str:
    with cache.making(key(bits), "prepare", material(bits)) as making:
        (making.folder / "x").write_bytes(bytes(nbytes))
        making.commit({})
    cache.close()
    place = cache.layout.entry(key(bits))
    aged(place, days)
    return key(bits)


def begun(cache: Cache, bits: int, days: float = 0) -> str:
    with cache.making(key(bits), "prepare", material(bits)) as making:
        (making.folder / "step").write_bytes(b"step")
    aged(cache.layout.work_of(key(bits)), days)
    return key(bits)


def fetched(cache: Cache, days: float, name: str = "0123-4567") -> str:
    cache.layout.create()
    slot = cache.layout.inputs / name
    slot.mkdir(parents=True)
    (slot / "model.safetensors").write_bytes(b"weights")
    aged(slot, days)
    return name


def names(found: tuple[Piece, ...] | list[Piece]) -> list[str]:
    return [piece.name for piece in found]


def test_pieces_are_listed_with_their_sizes_those_used_last_at_the_end(cache: Cache) -> None:
    young, old = entry(cache, 2, 5000, days=0), entry(cache, 3, 7000, days=3)
    work, source = begun(cache, 4, days=2), fetched(cache, days=1)
    broken = entry(cache, 5, 100, days=4)
    (cache.layout.entry(broken) / "files" / "x").write_bytes(b"cut")
    os.utime(cache.layout.entry(broken) / "files" / "x", (0, 0))
    found = pieces(cache)
    # an entry counts as used when it was made, so the times of those that were set back are those of making
    assert set(names(found)) == {young, old, work, source, broken}
    state = {piece.name: piece.state for piece in found}
    assert state == {young: WHOLE, old: WHOLE, work: UNFINISHED, source: INPUT, broken: DAMAGED}
    sizes = {piece.name: piece.nbytes for piece in found}
    assert 5000 < sizes[young] < 6000
    assert sizes[work] == 4
    assert sizes[source] == 7
    assert [piece.used for piece in found] == sorted(piece.used for piece in found)


def test_an_entry_was_used_when_it_was_last_found(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantpress.pipelines.cache.making.time.time", lambda now=time.time: now() - 50 * DAY)
    for bits in (2, 3):
        entry(cache, bits, 10, days=50)
    monkeypatch.undo()
    Cache(cache.folder).find(key(2))
    assert Cache(cache.folder).peek(key(3))
    assert Cache(cache.folder).damage(key(3)) == ""
    result = prune(cache, Wanted(older_than=30 * DAY))
    assert names(result.removed) == [key(3)]
    assert cache.kept_keys() == [key(2)]


def test_old_work_and_old_inputs_go_too(cache: Cache) -> None:
    begun(cache, 4, days=40), begun(cache, 5, days=2)
    fetched(cache, days=40, name="old-1"), fetched(cache, days=2, name="young-1")
    result = prune(cache, Wanted(older_than=30 * DAY))
    assert set(names(result.removed)) == {key(4), "old-1"}
    assert set(names(pieces(cache))) == {key(5), "young-1"}
    assert result.freed == 4 + 7
    assert result.left == 4 + 7


def test_down_to_a_size_what_was_not_used_for_longest_goes_first(cache: Cache) -> None:
    for number in range(5):
        fetched(cache, days=10 - number, name=f"slot-{number}")
    result = prune(cache, Wanted(max_size=3 * 7 + 6))
    assert names(result.removed) == ["slot-0", "slot-1"]
    assert result.left == 21
    assert prune(cache, Wanted(max_size=21)).removed == ()
    assert len(prune(cache, Wanted(max_size=0)).removed) == 3


def test_what_is_too_old_counts_for_the_size(cache: Cache) -> None:
    for number in range(4):
        fetched(cache, days=10 - number, name=f"slot-{number}")
    result = prune(cache, Wanted(older_than=8.5 * DAY, max_size=14), dry_run=True)
    assert names(result.removed) == ["slot-0", "slot-1"]
    result = prune(cache, Wanted(older_than=8.5 * DAY, max_size=7))
    assert names(result.removed) == ["slot-0", "slot-1", "slot-2"]


@pytest.mark.parametrize("wanted", [Wanted(older_than=-DAY), Wanted(max_size=0)], ids=["age", "size"])
def test_records_of_outputs_that_stand_go_only_with_everything(cache: Cache, wanted: Wanted) -> None:
    keys = []
    for place in ("../out/there.gguf", "../out/gone.gguf", "s3://bucket/x.gguf"):
        keys.append(key_of({"work": {}, "place": place}))
        with cache.making(keys[-1], "output", {"work": {}, "place": place}) as making:
            making.commit({})
    cache.close()
    (cache.folder.parent / "out").mkdir()
    (cache.folder.parent / "out" / "there.gguf").touch()
    assert set(names(prune(cache, wanted).removed)) == set(keys[1:])
    assert names(prune(cache, ALL).removed) == keys[:1]


def test_a_dry_run_only_tells(cache: Cache) -> None:
    make(cache)
    cache.close()
    begun(cache, 3)
    before = sorted(cache.folder.rglob("*"))
    result = prune(cache, ALL, dry_run=True)
    assert len(result.removed) == 2
    assert sorted(cache.folder.rglob("*")) == before


def test_everything_goes_but_what_is_remembered(cache: Cache) -> None:
    make(cache)
    History(cache).remember("job/gptq", material())
    begun(cache, 3), fetched(cache, 0)
    cache.close()
    result = prune(cache, ALL)
    assert len(result.removed) == 3
    assert pieces(cache) == []
    assert result.left == 0
    assert list(cache.layout.trash.iterdir()) == list(cache.layout.locks.iterdir()) == []
    assert History(cache).why("job/gptq", material()) == (GONE,)
    assert make(cache)


def test_what_a_run_uses_stays(cache: Cache) -> None:
    make(cache, 2)
    make(cache, 3)
    cache.close()
    reader, other = Cache(cache.folder), Cache(cache.folder)
    assert reader.find(key(2))
    with reader.making(key(4), "prepare", material(4)) as making:
        (making.folder / "step").touch()
        (other.layout.staging / key(4)[:32]).mkdir(parents=True)
        result = prune(other, ALL)
        assert set(names(result.in_use)) == {key(2), key(4), key(4)[:32]}
        assert names(result.removed) == [key(3)]
        assert making.folder.is_dir()
        making.commit({})
    assert set(other.kept_keys()) == {key(2), key(4)}
    reader.close()
    assert set(names(prune(other, ALL).removed)) == {key(2), key(4), key(4)[:32]}


def test_inputs_stay_while_anything_is_in_use(cache: Cache) -> None:
    make(cache)
    cache.close()
    name = fetched(cache, days=9)
    reader = Cache(cache.folder)
    assert reader.find(key(4))
    assert names(prune(Cache(cache.folder), Wanted(older_than=DAY)).in_use) == [name]
    reader.close()
    assert names(prune(Cache(cache.folder), Wanted(older_than=DAY)).removed) == [name]


def test_an_input_that_is_being_fetched_stays(cache: Cache) -> None:
    cache.layout.create()
    slot = cache.layout.inputs / "0123-4567"
    with held_output(slot):
        work = slot.with_name(".quantpress-0123-4567.work")
        work.mkdir()
        result = prune(cache, ALL)
        assert names(result.in_use) == [work.name]
        assert result.in_use[0].state == UNFINISHED
    assert names(prune(cache, ALL).removed) == [work.name]


def test_strange_files_are_left_alone(cache: Cache) -> None:
    make(cache)
    cache.close()
    strange = [cache.layout.entries / "README", cache.layout.inputs / "notes.txt", cache.layout.work / "link"]
    cache.layout.inputs.mkdir()
    (cache.folder.parent / "elsewhere").mkdir()
    (cache.folder.parent / "elsewhere" / "x").touch()
    strange[2].symlink_to(cache.folder.parent / "elsewhere")
    for path in strange[:2]:
        path.touch()
    prune(cache, ALL)
    assert all(path.exists() for path in strange)
    assert (cache.folder.parent / "elsewhere" / "x").exists()


def test_what_dead_runs_have_left_is_swept(cache: Cache) -> None:
    make(cache)
    cache.close()
    left = [
        cache.layout.lock_of(key(2)),
        cache.layout.trash / "x" / "deep" / "file",
        cache.layout.labels / ".a.json-1-ab.tmp",
        cache.folder / ".layout.json-1-ab.tmp",
    ]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (0, 0))
    young = cache.folder / ".layout.json-2-ab.tmp"
    young.touch()
    prune(cache, Wanted(older_than=DAY))
    assert not any(path.exists() for path in left)
    assert young.exists()
    assert cache.kept_keys() == [key(4)]


def test_readers_and_makers_beside_a_pruner_see_whole_entries_or_none(cache: Cache) -> None:
    stop = threading.Event()
    errors: list[BaseException] = []
    seen = [0, 0]

    def work(number: int) -> None:
        try:
            while not stop.is_set():
                own = Cache(cache.folder)
                bits = seen[number] % 2
                if found := own.find(key(bits)):
                    time.sleep(0.001)
                    assert (found.folder / "codes.bin").read_bytes() == FILES["codes.bin"]
                    assert (found.folder / "deep/er/scales.bin").read_bytes() == FILES["deep/er/scales.bin"]
                else:
                    with own.making(key(bits), "prepare", material(bits)) as making:
                        if making.entry is None:
                            for name, data in FILES.items():
                                (making.folder / name).parent.mkdir(parents=True, exist_ok=True)
                                (making.folder / name).write_bytes(data)
                            making.commit({})
                        assert making.entry is not None
                        assert (making.entry.folder / "codes.bin").read_bytes() == FILES["codes.bin"]
                own.close()
                seen[number] += 1
        except BaseException as error:  # noqa: BLE001 - the test fails with it
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    removed = 0
    deadline = time.monotonic() + 20
    while (removed < 12 or min(seen) < 12) and not errors and time.monotonic() < deadline:
        removed += len(prune(Cache(cache.folder), ALL).removed)
    stop.set()
    for thread in threads:
        thread.join(30)
    assert not errors
    assert removed >= 2
    assert min(seen) >= 2
