"""What the tests of the cache make entries of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantpress.pipelines.cache.entry import Entry
from quantpress.pipelines.cache.keys import key_of
from quantpress.pipelines.cache.store import Cache, Making

FILES = {"codes.bin": b"codes " * 500, "deep/er/scales.bin": bytes(range(256)), "empty": b""}


def material(bits: int = 4) -> dict[str, Any]:
    return {"stage": {"name": "gptq", "version": 1, "options": {"bits": bits}}, "input": {"files": [["w", "0" * 64]]}}


def fill(folder: Path, files: dict[str, bytes] = FILES) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def make(cache: Cache, bits: int = 4, files: dict[str, bytes] = FILES) -> Entry:
    with cache.making(key_of(material(bits)), "prepare", material(bits)) as making:
        assert making.entry is None
        fill(making.folder, files)
        return making.commit({"notes": ["ä"], "loss": 0.1})


def files_in(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class Failed(Exception):
    pass


def begin(cache: Cache, steps: Callable[[Making], object]) -> None:
    """Work that fails after some steps."""

    def work() -> None:
        with cache.making(key_of(material()), "prepare", material()) as making:
            steps(making)
            raise Failed

    with pytest.raises(Failed):
        work()
