"""Fetches what a URL names into the cache folder, once for each version of it.

`inputs/<place>-<version>/<name>`: `place` follows from the URL, `version` from the sizes and the hashes, versions or
times that the store says of each file. The folder appears whole, under a lock; a fetch that was killed goes on with the
files that are not yet there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantpress.convert.atomic import held_output, new_file, output_errors, require_space, work_folder
from quantpress.convert.disk import remove, sync_folder, sync_tree
from quantpress.convert.files import inside
from quantpress.convert.json_reader import read_json
from quantpress.pipelines.batch.listing import Listing, RemoteFile, list_inputs
from quantpress.pipelines.batch.stores import Place, is_url, local_path, open_place, store_errors
from quantpress.pipelines.batch.transfers import Moved, Transfer, counting, run_transfers
from quantpress.pipelines.hashing import hash_file
from quantpress.pipelines.progress import Progress, no_progress
from quantpress.quant.errors import BusyError, InputError, UsageError

__all__ = ["INPUTS", "RECORD", "fetch"]

INPUTS = "inputs"
"""Folder in the cache folder."""

RECORD = "quantpress-input.json"
"""What a fetched folder says of itself: URL, files with size, SHA-256 and time of change."""

_THREADS = 4  # files at a time where the store can
_MARGIN = 256 << 20  # bytes of the disk that are left free
_LOCK_SECONDS = 1.0  # between two looks at the lock, so that a run that waits can be cancelled


def fetch(url: str, folder: Path, progress: Progress = no_progress) -> Path:
    """Gives a local path of what a URL names: a file, or a model folder.

    Of a folder its own files are fetched (configuration, tokenizer, weights; where there are safetensors no other form
    of the weights), not the folders in it. A version that was fetched before is not fetched again; where a store tells
    no versions, it is.

    Args:
        url: with a protocol that fsspec knows; `file://` is used where it is.
        folder: the cache folder.
        progress: told bytes, on this thread; what it raises ends the fetch.

    Raises:
        InputError: nothing is there, it may not be read, or it changed meanwhile.
        UsageError: not a URL, or an unknown protocol.
        OutputError: the disk is full, or a package is missing.
    """
    if not is_url(url):
        raise UsageError(f"{url}: not a URL")
    if (path := local_path(url)) is not None:
        if not path.exists():
            raise InputError(f"{url}: no such file or folder")
        return path
    place = open_place(url)
    listing = list_inputs(place, url)
    version = _version(listing)
    place_name = _digest(url.rstrip("/").encode())
    slot = folder / INPUTS / f"{place_name}-{version or 'unversioned'}"
    with _held(slot, listing.name, progress):
        if version and _is_whole(slot):
            return slot / listing.name
        return _fetched(place, url, listing, slot, progress, versioned=bool(version)) / listing.name


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:24]


def _version(listing: Listing) -> str:
    """Gives a name for these versions of the files; "" where the store does not tell versions."""
    if not all(file.identity for file in listing.files):
        return ""
    return _digest(json.dumps([(file.name, file.nbytes, file.identity) for file in listing.files]).encode())


@contextlib.contextmanager
def _held(slot: Path, name: str, progress: Progress) -> Iterator[None]:
    """Waits for the lock of a fetched folder for as long as another run fetches it."""
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(held_output(slot, wait=_LOCK_SECONDS))
                break
            except BusyError:
                progress(f"wait for another run to fetch {name}", 0, 1)
        yield


def _fetched(place: Place, url: str, listing: Listing, slot: Path, progress: Progress, *, versioned: bool) -> Path:
    """Fetches into the work folder, which then gets its final name."""
    work = work_folder(slot)
    if not versioned:
        remove(work)
    with output_errors(slot), store_errors(url, InputError):
        work.mkdir(exist_ok=True)
    files = _download(place, url, listing, work, progress)
    if list_inputs(place, url) != listing:
        remove(work)
        raise InputError(f"{place.url}: changed while it was fetched; run again when it is at rest")
    if not versioned:
        content = _digest(json.dumps([(file["name"], file["sha256"]) for file in files]).encode())
        slot = slot.with_name(slot.name.replace("unversioned", content))
        if _is_whole(slot):
            remove(work)
            return slot
    record = {"url": place.url, "name": listing.name, "folder": listing.folder, "files": files}
    remove(work / RECORD)
    with new_file(work / RECORD, slot) as out:
        out.write(json.dumps(record, indent=1).encode())
    with output_errors(slot):
        sync_tree(work)
        remove(slot)  # damaged, or it would have been used
        work.rename(slot)
        sync_folder(slot.parent)
    return slot


def _download(place: Place, url: str, listing: Listing, work: Path, progress: Progress) -> list[dict[str, Any]]:
    """Fetches the files that are not yet there, and gives what the record says of each."""
    total = sum(file.nbytes or 0 for file in listing.files)
    targets = {file.name: _target(work, listing, file) for file in listing.files}
    there = sum(path.stat().st_size for path in targets.values() if path.is_file())
    require_space(work, total - there + _MARGIN)
    free = shutil.disk_usage(work).free - _MARGIN
    found: dict[str, dict[str, Any]] = {}

    def transfer(file: RemoteFile) -> Transfer:
        def move(moved: Moved) -> None:
            found[file.name] = _one(place, file, targets[file.name], moved)

        return Transfer(move, limit=free if file.nbytes is None else file.nbytes)

    # Not every file system of fsspec may be used from several threads; those of asyncio may.
    threads = _THREADS if getattr(place.fs, "async_impl", False) else 1
    with store_errors(url, InputError):
        run_transfers(
            [transfer(file) for file in listing.files],
            threads=threads,
            phase=f"fetch {listing.name}",
            total=total,
            progress=progress,
        )
    return [found[file.name] for file in listing.files]


def _target(work: Path, listing: Listing, file: RemoteFile) -> Path:
    path = inside(work, f"{listing.name}/{file.name}" if listing.folder else listing.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _one(place: Place, file: RemoteFile, target: Path, moved: Moved) -> dict[str, Any]:
    """Fetches one file under another name, checks its size, and gives what the record says of it."""
    if not target.is_file() or (file.nbytes is not None and target.stat().st_size != file.nbytes):
        part = target.with_name(target.name + ".part")
        callback = counting(moved)
        place.fs.get_file(file.path, str(part), callback=callback)
        nbytes = part.stat().st_size
        if file.nbytes is not None and nbytes != file.nbytes:
            raise OSError(f"{file.name}: {nbytes} bytes came, {file.nbytes} were announced")
        moved(max(0, nbytes - callback.value))
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.replace(target)
    else:
        moved(target.stat().st_size)
    sha256, nbytes = hash_file(target)
    return {"name": file.name, "bytes": nbytes, "sha256": sha256, "changed": target.stat().st_mtime_ns}


def _is_whole(slot: Path) -> bool:
    """Whether a fetched folder is there and its files are as they were; a damaged one is not used."""
    try:
        record = read_json(slot / RECORD)
        prefix = f"{record['name']}/" if record["folder"] else ""
        files = [_is_same(inside(slot, prefix + file["name"]), file) for file in record["files"]]
    except (InputError, OSError, LookupError, TypeError):
        return False
    os.utime(slot / RECORD)  # when it was last used, for whoever makes room
    return bool(files) and all(files)


def _is_same(path: Path, file: Mapping[str, Any]) -> bool:
    status = path.stat()
    if status.st_size != file["bytes"]:
        return False
    return bool(status.st_mtime_ns == file["changed"]) or bool(hash_file(path)[0] == file["sha256"])
