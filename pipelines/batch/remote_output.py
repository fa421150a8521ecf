"""What of an output is in a store: its files, its sidecar, and the marker of one that is still on its way."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantpress.convert.gguf.split import PartName
from quantpress.convert.json_reader import parse_json
from quantpress.pipelines.batch.listing import RemoteFile, file_info, found_file
from quantpress.pipelines.batch.stores import Place, is_url, name_of, open_place, shown_url, store_errors
from quantpress.quant.errors import InputError, OutputError, UsageError

__all__ = [
    "MAX_SIDECAR",
    "SIDECAR",
    "Target",
    "file_there",
    "files_there",
    "is_temporary",
    "open_target",
    "outputs_there",
    "published_sidecar",
    "remote_state",
    "remote_target",
    "state_of",
    "unfinished",
]

SIDECAR = "quantpress.json"
MAX_SIDECAR = 64 << 20  # bytes
_MAX_FILES = 2000  # in one output folder


@dataclass(frozen=True, slots=True)
class Target:
    """Where the files of one output go.

    Attributes:
        place: the folder that holds them.
        output: name of the file, or of the first of several; "" where the output is the folder itself.
        url: for messages.
    """

    place: Place
    output: str
    url: str

    @property
    def files(self) -> list[str]:
        """Names of an output that is no folder: its own, and where that is the first of several files theirs too."""
        name = PartName.of(Path(self.output))
        return [self.output] if name is None else name.names()

    @property
    def sidecar(self) -> str:
        """Name of the sidecar in the folder."""
        return f"{self.output}.{SIDECAR}" if self.output else SIDECAR

    @property
    def marker(self) -> str:
        """Name of what lies beside files that are on their way."""
        return f".quantpress-{self.output or 'folder'}.unfinished"

    def path(self, name: str) -> str:
        """Gives the store's path of a file in the folder."""
        return self.place.within(name)


def remote_target(url: str, name: str) -> str:
    """Gives a URL with another last part: the name of the output once `{ftype}` and `{name}` are known."""
    scheme, _, rest = url.rstrip("/").partition("://")
    parent, slash, _ = rest.rpartition("/")
    return f"{scheme}://{parent}{slash}{name}"


def open_target(url: str, *, folder: bool, writing: bool = True) -> Target:
    """Opens the place of an output.

    Raises:
        UsageError: the URL has no name for it, or cannot be written to.
        OutputError: the package for the store is missing.
    """
    name = name_of(url)
    if not is_url(url) or not name or name in (".", "..") or name.startswith(".quantpress"):
        raise UsageError(f"{shown_url(url)}: not a URL with a name for an output")
    where = url if folder else remote_target(url, "")
    return Target(open_place(where, writing=writing), "" if folder else name, shown_url(url))


def is_temporary(name: str) -> bool:
    """Whether a name is one of those that are there only while files are on their way."""
    return name.startswith(".quantpress-")


def files_there(target: Target) -> dict[str, RemoteFile]:
    """Gives what of an output is in the store; may raise what the store raises."""
    fs = target.place.fs
    fs.invalidate_cache()
    if target.output:
        names = {*target.files, target.sidecar, target.marker}
        return {name: file for name in sorted(names) if (file := file_there(target, name)) is not None}
    root = target.place.path.rstrip("/") + "/"
    try:
        found = fs.find(target.place.path, detail=True)
    except FileNotFoundError:
        return {}
    if len(found) > _MAX_FILES:
        raise UsageError(f"{target.url}: holds {len(found)} files, which is no output of quantpress; choose another")
    files = {path[len(root) :]: info for path, info in found.items() if path.startswith(root)}
    return {name: found_file(name, root + name, info) for name, info in sorted(files.items()) if name}


def file_there(target: Target, name: str) -> RemoteFile | None:
    """Asks for one file of an output; None where it is not there."""
    try:
        return file_info(target.place, name, target.path(name))
    except FileNotFoundError:
        return None


def _json_there(target: Target, name: str, there: Mapping[str, RemoteFile]) -> Any:
    """Reads a small JSON file of the store; None where it is not there or is none."""
    if name not in there or (there[name].nbytes or 0) > MAX_SIDECAR:
        return None
    try:
        return parse_json(target.place.fs.cat_file(target.path(name)), name=f"{target.url} ({name})")
    except (FileNotFoundError, InputError):
        return None


def outputs_there(target: Target, there: Mapping[str, RemoteFile]) -> Any:
    """Gives `outputs` of the sidecar there."""
    contents = _json_there(target, target.sidecar, there)
    return contents.get("outputs") if isinstance(contents, dict) else None


def unfinished(target: Target, there: Mapping[str, RemoteFile]) -> Any:
    """Gives `outputs` of what was on its way when a run was killed."""
    contents = _json_there(target, target.marker, there)
    return contents.get("outputs") if isinstance(contents, dict) else None


def remote_state(url: str) -> dict[str, Any] | None:
    """Gives what is at a URL now, to compare with what was there after `publish`; plain JSON.

    Returns:
        Sizes and the store's versions of all files, and the SHA-256 of the sidecar; None where no output is.

    Raises:
        OutputError: the store cannot be reached, or its package is missing.
    """
    with store_errors(url, OutputError):
        target = _existing(url)
        return None if target is None else state_of(target, files_there(target))


def published_sidecar(url: str) -> Mapping[str, Any] | None:
    """Reads the sidecar of an output in a store; None where there is none.

    Raises:
        OutputError: the store cannot be reached, or its package is missing.
    """
    with store_errors(url, OutputError):
        target = _existing(url)
        found = None if target is None else _json_there(target, target.sidecar, files_there(target))
    return found if isinstance(found, dict) else None


def _existing(url: str) -> Target | None:
    """Opens an output that is there, file or folder."""
    place = open_place(url)
    place.fs.invalidate_cache()
    try:
        info = place.fs.info(place.path)
    except FileNotFoundError:
        return None
    return open_target(url, folder=info.get("type") == "directory", writing=False)


def state_of(target: Target, there: Mapping[str, RemoteFile]) -> dict[str, Any]:
    """Gives what `remote_state` says."""
    files = {name: [file.nbytes, file.identity] for name, file in there.items()}
    sidecar = target.place.fs.cat_file(target.path(target.sidecar)) if target.sidecar in there else b""
    return {"files": files, "sidecar": hashlib.sha256(sidecar).hexdigest() if sidecar else ""}
