"""Finds what a URL holds: one file, or the files of a model folder, each with its size and what tells its version."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from quantpress.convert.files import shown
from quantpress.convert.hf_folder import EXTRA_TEMPLATES
from quantpress.pipelines.batch.stores import Place, identity, name_of, store_errors
from quantpress.quant.errors import InputError

__all__ = ["Listing", "RemoteFile", "file_info", "found_file", "list_inputs"]

_MAX_FILES = 2000  # names in one folder; the largest sharded models have 200 files
_NAME = re.compile(r"[^/\\\x00-\x1f\x7f]{1,255}")
# Left by training, and copies of the weights in other forms, as the Hub's folders have them.
_NEVER = re.compile(
    r"(optimizer|scheduler|rng_state|training_args|trainer_state)\b.*|.*\.(h5|msgpack|ot|tflite|pth|ckpt|md5|sha256)"
    r"|consolidated.*\.safetensors|events\.out\.tfevents.*"
)
_COPIES = re.compile(r".*\.(bin|pt|gguf|onnx|data)|.*\.onnx[._]data.*|pytorch_model\.bin\.index\.json")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file in a store.

    Attributes:
        name: relative, `/` between parts.
        path: what the store calls it.
        nbytes: None where the store does not say.
        identity: see `stores.identity`.
    """

    name: str
    path: str
    nbytes: int | None
    identity: str


@dataclass(frozen=True, slots=True)
class Listing:
    """What is to be fetched.

    Attributes:
        name: of the file or folder.
        files: sorted by name; one where `folder` is not set.
        folder: whether it is a folder.
    """

    name: str
    files: tuple[RemoteFile, ...]
    folder: bool


def list_inputs(place: Place, url: str) -> Listing:
    """Asks a store what is at a URL.

    Raises:
        InputError: nothing, no model folder, a name that is none, or the store fails.
    """
    name = name_of(url)
    if _NAME.fullmatch(name) is None or name in (".", "..") or name.startswith(".quantpress"):
        raise InputError(f"{place.url}: the last part of the URL, {shown(name)}, is not a name for a file")
    with store_errors(url, InputError):
        place.fs.invalidate_cache()
        info = place.fs.info(place.path)
        if not _is_folder(place, info):
            return Listing(name, (found_file(name, place.path, info),), folder=False)
        return Listing(name, tuple(_model_files(place)), folder=True)


def _is_folder(place: Place, info: Mapping[str, Any]) -> bool:
    """A web server calls everything a file; a folder's page is HTML."""
    if not place.http:
        return info.get("type") == "directory"
    return place.folder or (info.get("mimetype") == "text/html" and "." not in place.path.rpartition("/")[2])


def found_file(name: str, path: str, info: Mapping[str, Any]) -> RemoteFile:
    """Gives a file from what a store says of it."""
    size = info.get("size")
    return RemoteFile(name, path, size if isinstance(size, int) else None, identity(info))


def file_info(place: Place, name: str, path: str) -> RemoteFile:
    """Asks for one file; may raise what the store raises."""
    return found_file(name, path, place.fs.info(path))


def _model_files(place: Place) -> list[RemoteFile]:
    """Gives the files of a folder that are of use, without second copies of the weights."""
    found, folders = _names(place, place.path)
    if "config.json" in found and any(name.endswith(".safetensors") for name in found):
        found = {name: path for name, path in found.items() if not _COPIES.fullmatch(name)}
    found = {name: path for name, path in found.items() if not _NEVER.fullmatch(name)}
    if EXTRA_TEMPLATES in folders:
        templates, _ = _names(place, folders[EXTRA_TEMPLATES])
        found |= {f"{EXTRA_TEMPLATES}/{name}": path for name, path in templates.items() if name.endswith(".jinja")}
    if not found:
        hint = "; a web server must list the folder's files as links" if place.http else ""
        raise InputError(f"{place.url}: no files of a model are in this folder{hint}")
    return [file_info(place, name, path) for name, path in sorted(found.items())]


def _names(place: Place, folder: str) -> tuple[dict[str, str], dict[str, str]]:
    """Gives files and folders directly in a folder: name -> the store's path."""
    files: dict[str, str] = {}
    folders: dict[str, str] = {}
    where = folder + "/" if place.http and not folder.endswith("/") else folder
    for name, path, kind in _direct(place, where, place.fs.ls(where, detail=True)):
        (folders if kind == "directory" else files)[name] = path
        if len(files) + len(folders) > _MAX_FILES:
            raise InputError(f"{place.url}: more than {_MAX_FILES} names in one folder; this is no model folder")
    return files, folders


def _direct(place: Place, folder: str, entries: Iterable[Mapping[str, Any]]) -> Iterable[tuple[str, str, str]]:
    """Gives name, path and type of what lies directly in a folder; names that could lead elsewhere are left out."""
    root = folder.rstrip("/") + "/"
    for entry in entries:
        path = str(entry["name"])
        if not path.startswith(root):
            continue
        rest = path[len(root) :].rstrip("/")
        if place.http:
            if "?" in rest or "#" in rest:  # an index page's links to sort it
                continue
            rest = unquote(rest)
        if _NAME.fullmatch(rest) and not rest.startswith("."):
            yield rest, path.rstrip("/"), str(entry.get("type"))
