"""Does a piece of work on a cache again and again, killed with SIGKILL at its 1st, 2nd, ... file operation.

Usage: killed_at_every_step.py SCENARIO FOLDER STRIDE. A program of its own, for it forks, and a hook that watches every
file operation stays in a process for ever. After each kill another process looks at what is there and does the work
again. A stride of 3 kills at each third operation. It writes how many kills there were.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from quantpress.pipelines.cache.explain import FIRST, STOPPED, History
from quantpress.pipelines.cache.input_hashes import InputHashes
from quantpress.pipelines.cache.keys import key_of
from quantpress.pipelines.cache.prune import Wanted, prune
from quantpress.pipelines.cache.store import Cache
from tests.pipelines.cache.making_entries import files_in, fill, make, material

KEY = key_of(material())
FILES = {"codes.bin": b"codes", "deep/scales.bin": b"scales"}
OLD = {"old.bin": b"old"}
WATCHED = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.utime", "shutil.rmtree", "fcntl.flock"}


def make_once(folder: Path) -> None:
    cache = Cache(folder)
    with cache.making(KEY, "prepare", material(), wait=0) as making:
        if making.entry is None:
            making.write_note({"output": "a"})
            fill(making.folder, FILES)
            making.commit({"run": 1})


def made_once(folder: Path, killed: bool) -> None:
    cache = Cache(folder)
    found = cache.find(KEY)
    if found is not None:
        assert files_in(found.folder) == FILES, "half an entry"
    assert killed or found is not None
    if found is None and files_in(cache.layout.work_of(KEY) / "files"):
        with cache.making(KEY, "prepare", material(), wait=0) as making:
            assert making.note == {"output": "a"}, "the note was lost"
    cache.close()
    make_once(folder)
    again = Cache(folder).find(KEY)
    assert again is not None
    assert files_in(again.folder) == FILES
    assert not cache.was_begun(KEY)


def make_old(folder: Path) -> None:
    make(Cache(folder), files=OLD)


def redo(folder: Path) -> None:
    cache = Cache(folder)
    with cache.making(KEY, "prepare", material(), wait=0) as making:
        making.redo()
        making.write_note({"output": "a"})
        fill(making.folder, FILES)
        making.commit({"run": 2})


def redone(folder: Path, killed: bool) -> None:
    cache = Cache(folder)
    found = cache.find(KEY)
    if found is None:  # killed between the two renames: what was to be written is known, and the work is there
        with cache.making(KEY, "prepare", material(), wait=0) as making:
            assert making.note == {"output": "a"}
            assert files_in(making.folder) == FILES
    else:
        assert files_in(found.folder) in ([OLD, FILES] if killed else [FILES]), "half an entry"
    cache.close()
    redo(folder)
    again = Cache(folder).find(KEY)
    assert again is not None
    assert files_in(again.folder) == FILES


def update(folder: Path) -> None:
    Cache(folder).update(KEY, {"run": 3}, wait=0)


def updated(folder: Path, killed: bool) -> None:
    found = Cache(folder).find(KEY)
    assert found is not None
    assert found.record in ([{"notes": ["ä"], "loss": 0.1}, {"run": 3}] if killed else [{"run": 3}])
    assert files_in(found.folder) == OLD
    update(folder)
    again = Cache(folder).find(KEY)
    assert again is not None
    assert again.record == {"run": 3}


def prune_all(folder: Path) -> None:
    prune(Cache(folder), Wanted(everything=True))


def pruned(folder: Path, killed: bool) -> None:
    cache = Cache(folder)
    found = cache.find(KEY)
    if found is not None:
        assert killed
        assert files_in(found.folder) == OLD, "half an entry"
    cache.close()
    prune_all(folder)
    assert Cache(folder).find(KEY) is None
    left = {name.split("/")[0] for name in files_in(folder)}
    assert left == {".gitignore", "CACHEDIR.TAG", "layout.json"}, left


def remember(folder: Path) -> None:
    cache = Cache(folder)
    History(cache).remember("job/gptq", material(3))
    (folder.parent / "weights").write_bytes(b"weights")
    InputHashes(folder).hashes([folder.parent / "weights"])


def remembered(folder: Path, killed: bool) -> None:
    why = History(Cache(folder)).why("job/gptq", material())
    assert why in ([(FIRST,), ("option bits: 3 -> 4",)] if killed else [("option bits: 3 -> 4",)]), why
    assert STOPPED not in why
    remember(folder)
    assert History(Cache(folder)).why("job/gptq", material()) == ("option bits: 3 -> 4",)


def nothing(folder: Path) -> None:
    pass


Look = Callable[[Path, bool], None]
SCENARIOS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None], Look]] = {
    "make": (nothing, make_once, made_once),
    "redo": (make_old, redo, redone),
    "update": (make_old, update, updated),
    "prune": (make_old, prune_all, pruned),
    "remember": (nothing, remember, remembered),
}


def child(work: Callable[[], None], kill_at: int = 0) -> int:
    """Does work in a process of its own and gives its end; with SIGKILL at a file operation."""
    pid = os.fork()
    if pid == 0:
        done = 1
        try:
            if kill_at:
                left = [kill_at]

                def hook(event: str, arguments: tuple[object, ...]) -> None:
                    if event in WATCHED:
                        left[0] -= 1
                        if left[0] == 0:
                            os.kill(os.getpid(), signal.SIGKILL)

                sys.addaudithook(hook)
            work()
            done = 0
        finally:
            os._exit(done)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(scenario: str, root: Path, stride: int) -> None:
    before, work, look = SCENARIOS[scenario]
    kills = 0
    while True:
        folder = root / str(kills) / "cache"
        folder.parent.mkdir()
        assert child(lambda place=folder: before(place)) == 0
        end = child(lambda place=folder: work(place), kills * stride + 1)
        assert end in (0, -signal.SIGKILL), end
        assert child(lambda place=folder, killed=end != 0: look(place, killed)) == 0, (
            f"after a kill at {kills * stride + 1}"
        )
        shutil.rmtree(folder.parent)
        if end == 0:
            break
        kills += 1
    sys.stdout.write(str(kills))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
