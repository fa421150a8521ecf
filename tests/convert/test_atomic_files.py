"""Several files appear together or not at all, whatever ends the run and whenever it does."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from quantpress.convert import disk, moved_files
from quantpress.convert.atomic import atomic_file, new_file
from quantpress.convert.atomic_files import atomic_files, check_all_replaceable
from quantpress.quant.errors import BusyError, OutputError, UsageError

NAMES = ("m-1.gguf", "m-2.gguf", "m-3.gguf")

# Writes three files and kills itself before the n-th step on the disk that others could see.
_KILLED = """
import os, signal, sys
from pathlib import Path
from quantpress.convert import disk, moved_files
from quantpress.convert.atomic import new_file
from quantpress.convert.atomic_files import atomic_files
folder, content, force, left = Path(sys.argv[1]), sys.argv[2].encode(), sys.argv[3] == "force", int(sys.argv[4])
def counted(function):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
for name in ("rename", "mkdir", "unlink"):
    setattr(Path, name, counted(getattr(Path, name)))
os.fsync = counted(os.fsync)
names = [f"m-{number}.gguf" for number in (1, 2, 3)]
with atomic_files(folder / "m.gguf", names, force=force) as new:
    for name in names:
        with new_file(new / name) as file:
            file.write(content)
"""


def _run(folder: Path, content: str, *, force: bool, steps: int) -> int:
    arguments = [str(folder), content, "force" if force else "", str(steps)]
    return subprocess.run([sys.executable, "-c", _KILLED, *arguments], capture_output=True, check=False).returncode


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _contents(folder: Path) -> list[bytes | None]:
    return [(folder / name).read_bytes() if (folder / name).exists() else None for name in NAMES]


def _write(folder: Path, content: bytes, *, force: bool = False, wait: float = 5.0) -> None:
    with atomic_files(folder / "m.gguf", NAMES, force=force, wait=wait) as new:
        for name in NAMES:
            with new_file(new / name) as file:
                file.write(content)


def test_nothing_is_there_until_all_is(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "er"
    with atomic_files(folder / "m.gguf", NAMES) as new:
        for name in NAMES:
            with new_file(new / name) as file:
                file.write(b"new")
            assert _contents(folder) == [None] * 3
        assert any(name.startswith(".quantpress-m.gguf-") for name in _names(folder))
    assert _contents(folder) == [b"new"] * 3
    assert _names(folder) == list(NAMES)


@pytest.mark.parametrize("older", [False, True], ids=["first", "replaced"])
def test_a_run_killed_at_any_step_leaves_old_or_no_or_new_files_and_the_next_one_finishes(
    tmp_path: Path, older: bool
) -> None:
    seen = []
    for steps in range(100):
        folder = tmp_path / str(steps)
        folder.mkdir()
        if older:
            _write(folder, b"old")
        code = _run(folder, "new", force=older, steps=steps)
        found = _contents(folder)
        # Without the first file the others cannot be opened; with it all three must be of one run.
        assert found in ([b"old"] * 3, [b"new"] * 3) or found[0] is None, steps
        seen.append(found)
        if code == 0:
            break
        if found == [b"new"] * 3:  # killed after the last move: an output like any other
            with pytest.raises(UsageError, match="exists; give --force"):
                _write(folder, b"other")
            assert _contents(folder) == [b"new"] * 3
        _write(folder, b"new", force=older or found == [b"new"] * 3)
        assert _contents(folder) == [b"new"] * 3
        assert _names(folder) == list(NAMES)
    # Every state that may be seen was: before, with some of the files, and after.
    assert code == 0
    assert seen[0] == [b"old" if older else None] * 3
    assert [None, b"new", b"new"] in seen
    assert [b"new"] * 3 in seen[:-1]
    assert _names(folder) == list(NAMES)


def _killed_while_moving(folder: Path, name: str) -> None:
    """Leaves what a run does that is killed after it has moved a file; how many steps that takes is tried out."""
    for steps in range(7, 100):
        _run(folder, "new", force=False, steps=steps)
        if (folder / name).exists():
            return


def test_files_that_somebody_else_put_there_after_a_kill_are_kept(tmp_path: Path) -> None:
    _killed_while_moving(tmp_path, NAMES[2])
    (tmp_path / NAMES[2]).unlink()
    (tmp_path / NAMES[2]).write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"m-3\.gguf: the output exists; give --force"):
        check_all_replaceable(tmp_path / "m.gguf", NAMES, force=False)
    with pytest.raises(UsageError, match="exists"):
        _write(tmp_path, b"new")
    assert _contents(tmp_path) == [None, None, b"mine"]


def test_what_a_dead_run_half_moved_is_no_obstacle_and_goes_even_if_something_else_is_written(tmp_path: Path) -> None:
    _killed_while_moving(tmp_path, NAMES[1])
    assert _contents(tmp_path) == [None, b"new", b"new"]
    check_all_replaceable(tmp_path / "m.gguf", NAMES, force=False)
    with atomic_file(tmp_path / "m.gguf") as file:  # the same output, not split this time
        file.write(b"whole")
    assert _names(tmp_path) == ["m.gguf"]


class _FailsAt:
    """A step that fails when it is taken for the n-th time."""

    def __init__(self, function: object, number: int, error: BaseException) -> None:
        self.function, self.left, self.error = function, number, error

    def __call__(self, *args: object) -> object:
        self.left -= 1
        if self.left == -1:
            raise self.error
        return self.function(*args)  # type: ignore[operator]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()], ids=["disk", "interrupt"])
@pytest.mark.parametrize("older", [False, True], ids=["first", "replaced"])
def test_an_error_while_files_are_moved_puts_everything_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older: bool, error: BaseException
) -> None:
    before = [b"old" if older else None] * 3
    rename, failed = Path.rename, 0
    for number in range(20):
        if older:
            _write(tmp_path, b"old", force=True)
        failing = _FailsAt(rename, number, error)
        monkeypatch.setattr(Path, "rename", lambda *args, failing=failing: failing(*args))
        try:
            _write(tmp_path, b"new", force=older)
        except (OutputError, KeyboardInterrupt):
            failed += 1
        else:
            break
        finally:
            monkeypatch.setattr(Path, "rename", rename)
        assert _contents(tmp_path) == before
        assert _names(tmp_path) == (list(NAMES) if older else [])
    assert failed == (6 if older else 3)
    assert _contents(tmp_path) == [b"new"] * 3


def test_the_other_names_are_on_the_disk_before_the_first_file_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    rename = Path.rename

    def noted(path: Path, target: Path) -> Path:
        steps.append(target.name)
        return rename(path, target)

    def synced(folder: Path) -> None:
        steps.append(f"sync {'folder' if folder == tmp_path else 'new'}")
        disk.sync_folder(folder)

    monkeypatch.setattr(Path, "rename", noted)
    monkeypatch.setattr(moved_files, "sync_folder", synced)
    _write(tmp_path, b"new")
    assert steps == ["sync new", "m-3.gguf", "m-2.gguf", "sync folder", "m-1.gguf", "sync folder"]


def _stop_after_one(folder: Path, error: type[BaseException]) -> None:
    with atomic_files(folder / "m.gguf", NAMES, force=True) as new:
        (new / NAMES[0]).write_bytes(b"new")
        raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_in_the_block_leaves_the_old_files_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    _write(tmp_path, b"old")
    with pytest.raises(error):
        _stop_after_one(tmp_path, error)
    assert _contents(tmp_path) == [b"old"] * 3
    assert _names(tmp_path) == list(NAMES)


def test_a_file_that_was_not_written_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError), atomic_files(tmp_path / "m.gguf", NAMES) as new:
        (new / NAMES[0]).write_bytes(b"new")
    assert _names(tmp_path) == []


@pytest.mark.parametrize("number", [0, 1, 2])
def test_any_existing_file_needs_force(tmp_path: Path, number: int) -> None:
    (tmp_path / NAMES[number]).write_bytes(b"old")
    with pytest.raises(UsageError, match=f"{NAMES[number]}: the output exists; give --force"):
        _write(tmp_path, b"new")
    assert _names(tmp_path) == [NAMES[number]]
    _write(tmp_path, b"new", force=True)
    assert _contents(tmp_path) == [b"new"] * 3


def test_folders_and_pipes_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / NAMES[1]).mkdir()
    with pytest.raises(UsageError, match=r"m-2\.gguf: the output is a folder"):
        _write(tmp_path, b"new", force=True)
    (tmp_path / NAMES[1]).rmdir()
    os.mkfifo(tmp_path / NAMES[2])
    with pytest.raises(UsageError, match=r"m-3\.gguf: the output is neither"):
        _write(tmp_path, b"new", force=True)
    assert _names(tmp_path) == [NAMES[2]]


def test_a_note_that_names_places_elsewhere_moves_nothing(tmp_path: Path) -> None:
    # A folder with the name of a dead run's, made by somebody who wants a file to be removed.
    victim = tmp_path / "victim"
    victim.write_bytes(b"dear")
    status = victim.stat()
    place = tmp_path / "out" / ".quantpress-m.gguf-1-00000000.tmp"
    place.mkdir(parents=True)
    for note in ("{", "[]", "7", f'{{"x": 1, "../victim": [{status.st_ino}, {status.st_size}, {status.st_mtime_ns}]}}'):
        place.mkdir(exist_ok=True)
        (place / "moving.json").write_text(note)
        check_all_replaceable(tmp_path / "out" / "m.gguf", NAMES, force=True)
        _write(tmp_path / "out", b"new", force=True)
        assert victim.read_bytes() == b"dear"
    assert _names(tmp_path / "out") == list(NAMES)


def test_a_second_run_is_told_that_the_output_is_busy(tmp_path: Path) -> None:
    with atomic_files(tmp_path / "m.gguf", NAMES) as new:
        with pytest.raises(BusyError, match=r"m\.gguf: another run"):
            _write(tmp_path, b"other", wait=0.1)
        for name in NAMES:
            (new / name).write_bytes(b"new")
    assert _contents(tmp_path) == [b"new"] * 3


def test_runs_at_the_same_time_end_one_after_the_other(tmp_path: Path) -> None:
    threads = [
        threading.Thread(target=_write, args=(tmp_path, letter), kwargs={"force": True, "wait": 20})
        for letter in (b"a", b"b", b"c")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _contents(tmp_path) in ([b"a"] * 3, [b"b"] * 3, [b"c"] * 3)
    assert _names(tmp_path) == list(NAMES)


def test_a_link_of_the_whole_outputs_name_does_not_lead_the_files_away(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "m.gguf").write_bytes(b"whole")
    (tmp_path / "m.gguf").symlink_to(tmp_path / "disk" / "m.gguf")
    _write(tmp_path, b"new")
    assert _contents(tmp_path) == [b"new"] * 3
    assert _names(tmp_path / "disk") == ["m.gguf"]
