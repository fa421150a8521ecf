"""A final name holds the old output, nothing, or the whole new one, whatever ends the run."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantpress.convert import lock
from quantpress.convert.atomic import atomic_file, atomic_folder, check_replaceable, require_space, write_file
from quantpress.quant.errors import BusyError, OutputError, UsageError


def _run(code: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


_HOLD = """
import signal, sys, time
from quantpress.convert import lock
from quantpress.convert.atomic import atomic_file
def stop(number, frame):
    raise SystemExit(128 + number)
signal.signal(signal.SIGTERM, stop)
with atomic_file(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    time.sleep(60)
"""


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_and_alone(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "model.gguf"
    with atomic_file(out) as file:
        file.write(b"header")
        assert not out.exists()
        assert any(name.startswith(".quantpress-model.gguf-") for name in _names(out.parent))
        file.write(b"x" * 3_000_000)
        file.seek(0)
        file.write(b"HEADER")
    assert out.read_bytes() == b"HEADER" + b"x" * 3_000_000
    assert _names(out.parent) == ["model.gguf"]


def test_an_existing_output_needs_force(tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    write_file(out, b"old")
    with pytest.raises(UsageError, match="--force"):
        write_file(out, b"new")
    with pytest.raises(UsageError, match="--force"):
        check_replaceable(out, force=False)
    assert out.read_bytes() == b"old"
    write_file(out, b"new", force=True)
    assert out.read_bytes() == b"new"
    assert _names(tmp_path) == ["model.gguf"]


def _stop_in_file(folder: Path, error: type[BaseException]) -> None:
    with atomic_file(folder / "model.gguf", force=True) as file:
        file.write(b"new")
        raise error


def _stop_in_folder(folder: Path, error: type[BaseException]) -> None:
    with atomic_folder(folder / "model", force=True) as new:
        (new / "config.json").write_text("[]")
        raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_in_the_block_leaves_the_old_output_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    out, folder = tmp_path / "model.gguf", tmp_path / "model"
    write_file(out, b"old")
    with atomic_folder(folder) as new:
        (new / "config.json").write_text("{}")
    for write in (_stop_in_file, _stop_in_folder):
        with pytest.raises(error):
            write(tmp_path, error)
    assert out.read_bytes() == b"old"
    assert (folder / "config.json").read_text() == "{}"
    assert _names(tmp_path) == ["model", "model.gguf"]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    out = tmp_path / "model"
    with atomic_folder(out) as new:
        (new / "config.json").write_text("1")
        (new / "old.safetensors").write_text("1")
        assert not out.exists()
    with pytest.raises(UsageError, match="--force"), atomic_folder(out):
        pass
    with atomic_folder(out, force=True) as new:
        (new / "config.json").write_text("2")
        assert (out / "config.json").read_text() == "1"
    assert _names(out) == ["config.json"]
    assert (out / "config.json").read_text() == "2"
    assert _names(tmp_path) == ["model"]


def test_force_never_removes_what_is_not_a_model_folder(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "letters.txt").write_text("dear")
    with pytest.raises(UsageError, match="not a model folder"), atomic_folder(home, force=True):
        pass
    with pytest.raises(UsageError), atomic_file(home, force=True):
        pass
    assert (home / "letters.txt").read_text() == "dear"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="neither"):
        write_file(tmp_path / "pipe", b"", force=True)


def test_an_empty_folder_is_no_output_yet(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as new:
        (new / "config.json").write_text("{}")
    assert _names(tmp_path / "out") == ["config.json"]


def test_an_output_that_is_a_link_is_written_where_it_points(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link.gguf").symlink_to(tmp_path / "disk" / "model.gguf")
    write_file(tmp_path / "link.gguf", b"new")
    assert (tmp_path / "link.gguf").is_symlink()
    assert _names(tmp_path / "disk") == ["model.gguf"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, None)])
def test_signals_leave_nothing_behind(tmp_path: Path, number: signal.Signals, code: int | None) -> None:
    process = _run(_HOLD, tmp_path / "model.gguf")
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(number)
    process.communicate(timeout=10)
    assert code is None or process.returncode == code
    assert _names(tmp_path) == []


def test_after_kill_9_the_next_run_cleans_up_and_finishes(tmp_path: Path) -> None:
    process = _run(_HOLD, tmp_path / "model.gguf")
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.kill()
    process.communicate(timeout=10)
    assert [name for name in _names(tmp_path) if name.endswith(".tmp")]
    (tmp_path / ".quantpress-other.gguf-1-00000000.tmp").write_text("somebody else's")
    write_file(tmp_path / "model.gguf", b"whole")
    assert _names(tmp_path) == [".quantpress-other.gguf-1-00000000.tmp", "model.gguf"]


def test_a_second_run_is_told_that_the_output_is_busy(tmp_path: Path) -> None:
    process = _run(_HOLD, tmp_path / "model.gguf")
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    with pytest.raises(BusyError, match=r"model\.gguf: another run"), atomic_file(tmp_path / "model.gguf", wait=0.2):
        pass
    process.terminate()
    process.communicate(timeout=10)


def test_a_second_run_waits_for_the_first_and_both_end_correct(tmp_path: Path) -> None:
    out, results = tmp_path / "model.gguf", []

    def work(value: bytes) -> None:
        with atomic_file(out, force=True, wait=20) as file:
            results.append(("start", value))
            time.sleep(0.05)
            file.write(value * 1000)
            results.append(("end", value))

    threads = [threading.Thread(target=work, args=(bytes([letter]),)) for letter in b"abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [kind for kind, _ in results] == ["start", "end"] * 4
    assert out.read_bytes() == results[-1][1] * 1000
    assert _names(tmp_path) == ["model.gguf"]


def test_a_lock_file_that_its_holder_removed_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, try_lock, calls = tmp_path / "lock", lock._try_lock, []

    def remove_and_lock(descriptor: int, what: Path) -> bool:
        calls.append(descriptor)
        if len(calls) == 1:  # between our opening and our locking, the holder removes it and another run comes
            path.unlink()
            path.touch()
        return try_lock(descriptor, what)

    monkeypatch.setattr(lock, "_try_lock", remove_and_lock)
    with lock.locked(path, path, wait=5):
        assert os.path.samestat(path.stat(), os.fstat(calls[-1]))
    assert len(calls) == 2
    assert _names(tmp_path) == []


@contextlib.contextmanager
def _files_end_at(nbytes: int) -> Iterator[None]:
    """Lets the system refuse to make files longer: as close to a full disk as a process can get by itself."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def _write(path: Path, parts: list[bytes]) -> None:
    with atomic_file(path, force=True) as file:
        for part in parts:
            file.write(part)


@pytest.mark.parametrize("parts", [[b"x" * 700_000] * 10, [b"x" * 4_000_000]], ids=["many", "one"])
def test_a_disk_that_takes_no_more_is_an_error_that_names_the_output(tmp_path: Path, parts: list[bytes]) -> None:
    out = tmp_path / "model.gguf"
    write_file(out, b"old")
    with _files_end_at(1_500_000), pytest.raises(OutputError, match=f"^{out}: cannot be written: File too large"):
        _write(out, parts)
    assert out.read_bytes() == b"old"
    assert _names(tmp_path) == ["model.gguf"]


def _write_carelessly(path: Path) -> None:
    with atomic_file(path) as file:
        with _files_end_at(1_500_000), contextlib.suppress(OSError):
            file.write(b"x" * 4_000_000)
        file.write(b"room again")


def test_a_failed_write_is_never_tried_again(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="earlier write"):
        _write_carelessly(tmp_path / "model.gguf")
    assert _names(tmp_path) == []


def test_a_folder_without_permission_is_an_error_that_names_the_output(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/model\.gguf: cannot be written"):
        write_file(tmp_path / "file" / "model.gguf", b"")
    if os.geteuid() == 0:
        return
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OutputError, match=r"locked/model\.gguf"):
        write_file(tmp_path / "locked" / "model.gguf", b"")


def test_names_as_long_as_the_disk_allows_are_written(tmp_path: Path) -> None:
    name = "é" * 127
    write_file(tmp_path / name, b"x")
    assert _names(tmp_path) == [name]


def test_missing_space_is_told_before_writing(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "yet" / "there.gguf", 1)
    with pytest.raises(OutputError, match="bytes are needed"):
        require_space(tmp_path / "there.gguf", 1 << 62)
