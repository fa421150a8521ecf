"""Damages something in a cache, as disks, people and other programs do."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path


def _flip(path: Path, random: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(bytes(data))


def _cut(path: Path, random: random.Random) -> None:
    os.truncate(path, random.randrange(max(1, path.stat().st_size)))


def _lengthen(path: Path, random: random.Random) -> None:
    with path.open("ab") as file:
        file.write(random.randbytes(17))


def _delete(path: Path, random: random.Random) -> None:
    del random
    path.unlink()


def _folder(path: Path, random: random.Random) -> None:
    del random
    path.unlink()
    path.mkdir()


def _fifo(path: Path, random: random.Random) -> None:
    del random
    path.unlink()
    os.mkfifo(path)


def _link(path: Path, random: random.Random) -> None:
    path.unlink()
    path.symlink_to(random.choice(["/etc/hostname", "nowhere", path.name]))


def _other(path: Path, random: random.Random) -> None:
    """Another file of the cache in its place."""
    others = sorted(other for other in path.parents[1].rglob("*") if other.is_file() and other != path)
    if others:
        shutil.copyfile(random.choice(others), path)


def _forbidden(path: Path, random: random.Random) -> None:
    path.chmod(random.choice([0o000, 0o222, 0o777]))


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (
    _flip,
    _flip,
    _cut,
    _lengthen,
    _delete,
    _folder,
    _fifo,
    _link,
    _other,
    _forbidden,
)


def damage(cache: Path, random: random.Random) -> None:
    """Damages one to three files of a cache, every other one of them kept work itself, which is few among its files."""
    for _ in range(random.randint(1, 3)):
        files = sorted(path for path in cache.rglob("*") if path.is_file() and not path.is_symlink())
        kept = [path for path in files if "files" in path.relative_to(cache).parts]
        chosen = kept if kept and random.random() < 0.5 else files
        random.choice(DAMAGES)(random.choice(chosen), random)
