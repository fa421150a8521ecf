"""Puts outputs into a store: every file, the sidecar last, so that a sidecar there always speaks of whole files.

While files are on their way a small marker lies beside them that names the hashes of what is being put there. A run
that was killed leaves it, and the next run with the same output goes on from there without `--force`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantpress.convert.files import inside, read_bounded, shown
from quantpress.convert.json_reader import parse_json
from quantpress.pipelines.batch.listing import RemoteFile
from quantpress.pipelines.batch.remote_output import (
    MAX_SIDECAR,
    SIDECAR,
    Target,
    file_there,
    files_there,
    is_temporary,
    open_target,
    outputs_there,
    state_of,
    unfinished,
)
from quantpress.pipelines.batch.stores import name_of, shown_url, store_errors
from quantpress.pipelines.batch.transfers import Moved, Transfer, counting, run_transfers
from quantpress.pipelines.progress import Progress, no_progress
from quantpress.pipelines.sidecar import sidecar_path
from quantpress.quant.errors import InputError, OutputError, UsageError

__all__ = ["check_publishable", "publish"]

_THREADS = 4  # files at a time where the store can


def check_publishable(url: str, *, folder: bool, force: bool, outputs: object = None) -> None:
    """Checks, before long work, that an output may be put at a URL.

    Args:
        url: of the output, with its name filled in.
        folder: whether the output is a folder.
        force: whether an existing output of quantpress is replaced.
        outputs: what the sidecar says of the files, where they are known; the same ones may be put there again.

    Raises:
        UsageError: something is there that may not be replaced, or the URL cannot be written to.
        OutputError: the store cannot be reached, or its package is missing.
    """
    target = open_target(url, folder=folder)
    with store_errors(url, OutputError):
        _check_replaceable(target, files_there(target), force=force, outputs=outputs)


def _check_replaceable(target: Target, there: Mapping[str, RemoteFile], *, force: bool, outputs: object) -> None:
    names = [name for name in there if not is_temporary(name)]
    if outputs is not None and outputs in (unfinished(target, there), outputs_there(target, there)):
        return
    if names and not force:
        raise UsageError(f"{target.url}: the output exists; give --force to replace it")
    if names and not target.output and target.sidecar not in there and target.marker not in there:
        raise UsageError(
            f"{target.url}: the folder holds {shown(min(names))} and no {SIDECAR}, so it is no output of quantpress"
            " and is not replaced even with --force; choose another output"
        )


def publish(local: Path, url: str, *, force: bool = False, progress: Progress = no_progress) -> dict[str, Any]:
    """Puts an output with its sidecar into a store.

    Files get their names when they are whole: by a temporary name where the store can move, by the store itself where
    it is an object store. The sidecar comes last.

    Args:
        local: the file or folder, its sidecar beside or in it; the first file of a model that is split.
        url: of the output, its last part the output's own name.
        force: whether another output of quantpress there is replaced; one with the same hashes always is.
        progress: told bytes, on this thread; what it raises ends the transfer.

    Returns:
        What `remote_state` says afterwards.

    Raises:
        UsageError: something is there that may not be replaced, or the URL cannot be written to.
        OutputError: the store refuses or cannot be reached, or its package is missing.
    """
    if local.name != name_of(url):
        raise UsageError(f"{shown_url(url)}: the URL must end in the name of the output, {local.name}")
    target = open_target(url, folder=local.is_dir())
    sidecar = sidecar_path(local)
    data = read_bounded(sidecar, MAX_SIDECAR)
    outputs = _outputs_of(data, sidecar)
    files = _local_files(local, sidecar, outputs)
    with store_errors(url, OutputError):
        there = files_there(target)
        _check_replaceable(target, there, force=force, outputs=outputs)
        _begin(target, outputs, there)
        _put_all(target, files, progress)
        _put_all(target, {target.sidecar: sidecar}, no_progress)
        _end(target, [*files, target.sidecar], there)
        _check_arrived(target, {**files, target.sidecar: sidecar}, data)
        return state_of(target, files_there(target))


def _outputs_of(data: bytes, sidecar: Path) -> object:
    """Gives what a sidecar says of the files."""
    contents = parse_json(data, name=str(sidecar))
    if not isinstance(contents, dict):
        raise InputError(f"{sidecar}: a JSON object is expected, found {shown(contents)}")
    return contents.get("outputs")


def _local_files(local: Path, sidecar: Path, outputs: object) -> dict[str, Path]:
    """Gives every file but the sidecar: name there -> path here; a model that is split has several beside `local`."""
    if not local.is_dir():
        listed = outputs if isinstance(outputs, list) else []
        names = [each["name"] for each in listed if isinstance(each, dict) and "name" in each]
        return {name: inside(local.parent, name) for name in names if name != local.name} | {local.name: local}
    found = sorted(path for path in local.rglob("*") if path.is_file() and path != sidecar)
    return {path.relative_to(local).as_posix(): path for path in found}


def _begin(target: Target, outputs: object, there: Mapping[str, RemoteFile]) -> None:
    """Says what is on its way, and takes away the sidecar of what is being replaced."""
    fs, place = target.place.fs, target.place
    if not place.atomic:
        fs.makedirs(place.path, exist_ok=True)
    fs.pipe_file(target.path(target.marker), json.dumps({"outputs": outputs}).encode())
    if target.sidecar in there:
        fs.rm_file(target.path(target.sidecar))


def _end(target: Target, names: list[str], there: Mapping[str, RemoteFile]) -> None:
    """Removes what an older output has left in a folder, and the marker."""
    fs = target.place.fs
    if not target.output:
        for name in there:
            if name not in names and name != target.marker:
                fs.rm_file(target.path(name))
    fs.rm_file(target.path(target.marker))


def _put_all(target: Target, files: Mapping[str, Path], progress: Progress) -> None:
    sizes = {name: path.stat().st_size for name, path in files.items()}

    def transfer(name: str, path: Path) -> Transfer:
        return Transfer(lambda moved: _put(target, name, path, sizes[name], moved))

    run_transfers(
        [transfer(name, path) for name, path in files.items()],
        threads=_THREADS if getattr(target.place.fs, "async_impl", False) else 1,
        phase=f"publish {name_of(target.url)}",
        total=sum(sizes.values()),
        progress=progress,
    )


def _put(target: Target, name: str, path: Path, nbytes: int, moved: Moved) -> None:
    """Puts one file."""
    fs, final = target.place.fs, target.path(name)
    callback = counting(moved)
    if target.place.atomic:
        fs.put_file(str(path), final, callback=callback)
    else:
        parent, _, last = final.rpartition("/")
        temporary = f"{parent}/.quantpress-{last}.tmp"
        fs.makedirs(parent, exist_ok=True)
        fs.put_file(str(path), temporary, callback=callback)
        if fs.exists(final):  # not every store moves over a file
            fs.rm_file(final)
        fs.mv(temporary, final)
    moved(max(0, nbytes - callback.value))


def _check_arrived(target: Target, files: Mapping[str, Path], sidecar: bytes) -> None:
    """Asks the store for what was put there.

    Raises:
        OutputError: a size is not what it was here, or the sidecar is another: two runs put different outputs there.
    """
    target.place.fs.invalidate_cache()
    for name, path in files.items():
        found, wanted = file_there(target, name), path.stat().st_size
        if found is None or found.nbytes not in (None, wanted):
            size = "nothing" if found is None else f"{found.nbytes} bytes"
            raise OutputError(f"{target.url}: {shown(name)} was put there with {wanted} bytes and the store has {size}")
    if target.place.fs.cat_file(target.path(target.sidecar)) != sidecar:
        raise OutputError(f"{target.url}: another run put an output there at the same time; run again")
