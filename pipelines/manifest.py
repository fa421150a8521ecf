"""Re-hashes the files that a sidecar speaks of: what was written, and, where they are given, what it was made from.

A sidecar that lies beside an output may come from a stranger as the output does, so it is read as all input is:
bounded, checked field by field, and no file is opened that it names outside its own folder.
"""

from __future__ import annotations

import dataclasses
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantpress.convert.files import check_name, inside, open_regular, shown
from quantpress.convert.json_reader import read_json
from quantpress.pipelines.cancel import cancellable
from quantpress.pipelines.hashing import hash_file
from quantpress.pipelines.progress import Progress, no_progress
from quantpress.pipelines.sidecar import SCHEMA, STATEMENT, sidecar_path
from quantpress.quant.errors import InputError

__all__ = ["ManifestFile", "ManifestReport", "changed_weights", "verify_manifest"]

_KIND = {"_type": STATEMENT, "predicateType": SCHEMA, "schema": SCHEMA}
_SUFFIX = ".quantpress.json"
_IN_FOLDER = "quantpress.json"
_HASH = re.compile(r"[0-9a-f]{64}")
_WEIGHTS = (".gguf", ".safetensors", ".onnx", ".onnx.data")
_MOST_FILES = 100_000
_PART = re.compile(r"(.+)-\d{5}(-of-\d{5}\.gguf)")


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """A file of a sidecar, and what was found.

    Attributes:
        name: as the sidecar has it.
        sha256, nbytes: what the sidecar says; "" and 0 of a file that it does not speak of.
        state: "same", "different", "missing", "unexpected", or of an input "not looked for".
        found: SHA-256 of the file that is there, "" where none was read.
    """

    name: str
    sha256: str
    nbytes: int
    state: str
    found: str = ""

    def to_json(self) -> dict[str, Any]:
        """One entry of a report's ``outputs`` or ``inputs``."""
        return {
            "name": self.name, "sha256": self.sha256, "bytes": self.nbytes, "state": self.state,
            "found": self.found or None,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class ManifestReport:
    """Whether the files are those that a sidecar speaks of.

    Attributes:
        manifest: the sidecar.
        outputs: what was written, and what lies in an output folder besides.
        inputs: what it was made from.
    """

    manifest: Path
    outputs: tuple[ManifestFile, ...]
    inputs: tuple[ManifestFile, ...]

    @property
    def passed(self) -> bool:
        """All outputs are as they were written, and no input that was given is another."""
        return not self.problems

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong, a sentence a file."""
        wrong = [each for each in self.outputs if each.state != "same"]
        wrong += [each for each in self.inputs if each.state not in ("same", "not looked for")]
        return tuple(f"{each.name} is {each.state}" for each in wrong)

    @property
    def reason(self) -> str:
        """The verdict in a line."""
        if self.problems:
            more = f", and {len(self.problems) - 1} more" if len(self.problems) > 1 else ""
            return self.problems[0] + more
        looked = sum(each.state == "same" for each in self.inputs)
        return f"{len(self.outputs)} outputs and {looked} of {len(self.inputs)} inputs are what the sidecar says"

    def to_json(self) -> dict[str, Any]:
        """What ``verify --manifest --json`` prints."""
        return {
            "manifest": str(self.manifest),
            "passed": self.passed,
            "reason": self.reason,
            "outputs": [each.to_json() for each in self.outputs],
            "inputs": [each.to_json() for each in self.inputs],
        }


def verify_manifest(
    manifest: Path | str,
    *,
    against: Path | str | None = None,
    adapters: Sequence[Path | str] = (),
    progress: Progress = no_progress,
    cancel: threading.Event | None = None,
) -> ManifestReport:
    """Hashes every file of a sidecar again.

    Args:
        manifest: the sidecar, or the output that it lies beside or in.
        against: folder or file of the model that the output was made from; without it its files are not looked for.
        adapters: folders of the adapters that were merged, found by their names, or tried in turn where none has it.
        progress: told the bytes that have been read.
        cancel: set from another thread, stops the work.

    Raises:
        InputError: not a sidecar of this program, that of another file, or a file cannot be read.
        CancelledError: `cancel` was set.
    """
    path = _find(Path(manifest))
    contents = read_json(path)
    outputs, sources = _read(contents, path)
    folder, whole = path.parent, path.name == _IN_FOLDER
    _check_owner(path, outputs)
    model, folders = None if against is None else Path(against), [Path(each) for each in adapters]
    total, done = sum(each.nbytes for each in (*outputs, *(sources if model or folders else ()))), 0
    progress = cancellable(progress, cancel)

    def read(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress("hash", min(done, total), total)

    found = [_compared(each, inside(folder, each.name), read) for each in outputs]
    if whole:
        found += _unexpected(folder, {each.name for each in outputs})
    return ManifestReport(path, tuple(found), tuple(_source(each, model, folders, read) for each in sources))


def changed_weights(artifact: Path, progress: Progress = no_progress) -> str:
    """Says which file of weights is not the one that the sidecar beside it speaks of.

    Args:
        artifact: GGUF file, ONNX model or folder.
        progress: told the bytes that have been read.

    Returns:
        In words; "" where all are, or where no sidecar that can be read lies there.
    """
    try:
        report = verify_manifest(artifact.parent if artifact.suffix == ".onnx" else artifact, progress=progress)
    except InputError:
        return ""
    changed = [each.name for each in report.outputs if each.state == "different" and each.name.endswith(_WEIGHTS)]
    return f"{changed[0]}: not the bytes that were written, says {report.manifest.name}" if changed else ""


def _find(path: Path) -> Path:
    """Gives the sidecar, of an output the one beside it or in it."""
    if path.is_dir():
        path = path / _IN_FOLDER
    elif not path.name.endswith((_SUFFIX, _IN_FOLDER)):
        first = _PART.fullmatch(path.name)
        own = sidecar_path(path)
        path = own if first is None or own.exists() else sidecar_path(path.with_name(f"{first[1]}-00001{first[2]}"))
    with open_regular(path):
        return path


def _check_owner(path: Path, outputs: Sequence[ManifestFile]) -> None:
    """Checks that a sidecar speaks of the file that it lies beside: another's would pass for one that nobody looks at.

    Raises:
        InputError: it speaks of others.
    """
    owner = path.name.removesuffix(_SUFFIX)
    if owner not in (path.name, *(each.name for each in outputs)):
        raise InputError(
            f"{path}: it speaks of {shown(outputs[0].name)}, not of {shown(owner)}: files and sidecars keep the names"
            " with which they were written"
        )


def _read(contents: Any, path: Path) -> tuple[list[ManifestFile], list[ManifestFile]]:
    """Checks everything that is used of a sidecar."""
    said = [contents.get(key) for key in _KIND] if isinstance(contents, dict) else None
    if said != list(_KIND.values()):
        raise InputError(f"{path}: not a sidecar of quantpress: wanted an in-toto statement with schema {SCHEMA}")
    outputs, inputs = (_files(contents.get(key), key, path) for key in ("outputs", "inputs"))
    if not outputs:
        raise InputError(f"{path}: outputs: the sidecar speaks of no file")
    subject = contents.get("subject")
    pairs = [(each.name, each.sha256) for each in outputs]
    if not isinstance(subject, list) or [_subject(each, path) for each in subject] != pairs:
        raise InputError(f"{path}: subject and outputs do not speak of the same files")
    return outputs, inputs


def _subject(entry: Any, path: Path) -> tuple[Any, Any]:
    digest = entry.get("digest") if isinstance(entry, dict) else None
    if not isinstance(digest, dict):
        raise InputError(f"{path}: subject: wanted a name and a digest, found {shown(entry)}")
    return entry.get("name"), digest.get("sha256")


def _files(entries: Any, key: str, path: Path) -> list[ManifestFile]:
    if not isinstance(entries, list) or len(entries) > _MOST_FILES:
        raise InputError(f"{path}: {key}: wanted a list of at most {_MOST_FILES} files, found {shown(entries)}")
    files = [_file(entry, key, path) for entry in entries]
    if key == "outputs" and len({each.name for each in files}) != len(files):
        raise InputError(f"{path}: {key}: a file is named twice")
    return files


def _file(entry: Any, key: str, path: Path) -> ManifestFile:
    values = entry if isinstance(entry, Mapping) else {}
    name, digest, nbytes = (values.get(field) for field in ("name", "sha256", "bytes"))
    if not isinstance(name, str) or not name or not name.isprintable():
        raise InputError(f"{path}: {key}: {shown(name)} is not a file name")
    if not isinstance(digest, str) or not _HASH.fullmatch(digest):
        raise InputError(f"{path}: {key}: {name}: sha256 must be 64 hexadecimal digits, found {shown(digest)}")
    if type(nbytes) is not int or nbytes < 0:
        raise InputError(f"{path}: {key}: {name}: bytes must be a number of bytes, found {shown(nbytes)}")
    check_name(path, name)
    return ManifestFile(name, digest, nbytes, "missing")


def _compared(file: ManifestFile, path: Path, on_read: Callable[[int], object] | None = None) -> ManifestFile:
    """Hashes one file, unless its size tells already that it is another."""
    try:
        nbytes = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return file
    except OSError as error:
        raise InputError(f"{path}: cannot be read for its hash: {error.strerror}") from error
    with open_regular(path):  # a pipe would be waited for
        pass
    if nbytes != file.nbytes:
        return ManifestFile(file.name, file.sha256, file.nbytes, "different")
    found, _ = hash_file(path, on_read=on_read)
    state = "same" if found == file.sha256 else "different"
    return ManifestFile(file.name, file.sha256, file.nbytes, state, found)


def _unexpected(folder: Path, known: set[str]) -> list[ManifestFile]:
    """Names what lies in an output folder and is none of its outputs."""
    names = (
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    )
    more = sorted(name for name in names if name not in known and name != _IN_FOLDER)
    return [ManifestFile(name, "", 0, "unexpected") for name in more]


def _source(
    file: ManifestFile, against: Path | None, adapters: Sequence[Path], on_read: Callable[[int], object]
) -> ManifestFile:
    """Looks for an input where it should lie: in the model's folder, or in that of its adapter."""
    folder, _, rest = file.name.rpartition("/")
    named = [each for each in adapters if folder and each.resolve().name == folder]
    places = [inside(each, rest) for each in (named or adapters) if folder]
    if against is not None and against.is_file():
        places = [against, *places] if against.name == file.name else places
        if not folder and not places:
            places = [inside(against.parent, file.name)]  # another part of a file that is split
    elif against is not None and (not folder or not named):
        places = [inside(against, file.name), *places]
    found = [_compared(file, place, on_read) for place in places if place.exists()]
    if not found:
        return file if places else dataclasses.replace(file, state="not looked for")
    return next((each for each in found if each.state == "same"), found[0])
