"""Signals that come while names are removed, and machines that give way where no file is known."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from quantpress.convert.disk import remove
from quantpress.convert.lock import locked
from quantpress.pipelines import cli


def interrupted_once(monkeypatch: pytest.MonkeyPatch, *, after: bool) -> None:
    """The first removal of a name is interrupted, before or after it is done."""
    real, calls = os.unlink, [0]

    def unlink(*arguments: Any, **options: Any) -> None:
        calls[0] += 1
        if calls[0] > 1 or after:
            real(*arguments, **options)
        if calls[0] == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "unlink", unlink)


@pytest.mark.parametrize("after", [False, True])
def test_a_signal_leaves_no_lock(after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted_once(monkeypatch, after=after)
    with pytest.raises(KeyboardInterrupt), locked(tmp_path / "lock", tmp_path / "out", 0):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_signal_does_not_remove_the_lock_of_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.unlink

    def unlink(path: Any, **options: Any) -> None:
        real(path, **options)
        Path(path).write_text("the next run's")
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "unlink", unlink)
    with pytest.raises(KeyboardInterrupt), locked(tmp_path / "lock", tmp_path / "out", 0):
        pass
    assert (tmp_path / "lock").read_text() == "the next run's"


def test_a_signal_leaves_no_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    for name in "abc":
        (folder / name).touch()
    interrupted_once(monkeypatch, after=False)
    with pytest.raises(KeyboardInterrupt):
        remove(folder)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(24, "Too many open files"), "Too many open files"),
        (MemoryError(), "memory or threads are used up"),
        (RuntimeError("can't start new thread"), "memory or threads are used up"),
    ],
)
def test_a_machine_that_gives_way_is_a_line_and_5(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**options: Any) -> None:
        raise error

    monkeypatch.setattr(cli.cli, "main", fail)
    assert cli.run(["schema"]) == 5
    assert capsys.readouterr().err.startswith("error: " + words)


def test_a_bug_stays_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**options: Any) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(cli.cli, "main", fail)
    with pytest.raises(RuntimeError, match="something else"):
        cli.run(["schema"])
