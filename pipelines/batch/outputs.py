"""Outputs that earlier runs have written: what the cache says of them, and whether they still stand as they were."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantpress.convert.atomic import write_file
from quantpress.convert.json_reader import read_json
from quantpress.pipelines.batch.chain import FileHashes
from quantpress.pipelines.batch.remote import is_url, remote_state
from quantpress.pipelines.batch.results import OutputResult
from quantpress.pipelines.cache.keys import key_of
from quantpress.pipelines.sidecar import sidecar_path, write_sidecar
from quantpress.quant.errors import InputError

if TYPE_CHECKING:
    from quantpress.pipelines.cache.store import Cache, Making

__all__ = ["OUTPUT", "Standing", "find_standing", "keep", "output_material", "place_of", "restore"]

OUTPUT = "output"
"""Kind of the cache's entries that speak of outputs."""

_SIDECAR = "sidecar.json"


@dataclass(frozen=True, slots=True)
class Standing:
    """An output that stands as an earlier run has left it.

    Attributes:
        record: what the cache says: "path", "stage", "kind", "ftype", "judged_as", "outputs", "verdict" (the proof's
            key or None), "remote".
        sidecar: contents of the sidecar.
    """

    record: Mapping[str, Any]
    sidecar: Mapping[str, Any]

    def result(self, state: str) -> OutputResult:
        """Gives what the batch's results say of it."""
        names = ("stage", "path", "kind", "ftype")
        nbytes = sum(int(output["bytes"]) for output in self.record["outputs"])
        return OutputResult(**{name: self.record[name] for name in names}, nbytes=nbytes, state=state,
                            sidecar=self.sidecar)  # fmt: skip


def place_of(path: str, cache: Path) -> str:
    """Names an output's place for its key: relative to the cache, so that a folder that is moved keeps its results."""
    return path if is_url(path) else os.path.relpath(path, cache)


def output_material(material: Mapping[str, Any], path: str, cache: Path) -> dict[str, Any]:
    """Gives the material of an output's key: what is written, and where to."""
    return {"work": material, "place": place_of(path, cache)}


def find_standing(cache: Cache, material: Mapping[str, Any], path: str, hashes: FileHashes) -> Standing | None:
    """Gives an output that is there, whole and unchanged; None where there is work to do."""
    entry = cache.find(key_of(material), hold=False)
    if entry is None or not (entry.folder / _SIDECAR).is_file():
        return None
    record = {**entry.record, "path": path}
    if not (_stands_remotely if is_url(path) else _stands)(record, path, hashes):
        return None
    return Standing(record, json.loads((entry.folder / _SIDECAR).read_bytes()))


def _stands(record: Mapping[str, Any], path: str, hashes: FileHashes) -> bool:
    folder = Path(path) if record["folder"] else Path(path).parent  # several files may make one output
    wanted = {folder / each["name"]: (each["sha256"], each["bytes"]) for each in record["outputs"]}
    if not all(file.is_file() and file.stat().st_size == size for file, (_, size) in wanted.items()):
        return False
    found = hashes.hashes(list(wanted))
    return all(tuple(found[file]) == identity for file, identity in wanted.items())


def _stands_remotely(record: Mapping[str, Any], path: str, hashes: FileHashes) -> bool:
    del hashes
    return record.get("remote") is not None and remote_state(path) == record["remote"]


def restore(standing: Standing) -> None:
    """Writes the sidecar anew where it was lost or changed."""
    path = standing.record["path"]
    if is_url(path):
        return
    place = sidecar_path(Path(path))
    wanted = json.dumps(standing.sidecar, sort_keys=True)
    try:
        if json.dumps(read_json(place), sort_keys=True) == wanted:
            return
    except InputError:
        pass  # lost, or no longer JSON
    write_sidecar(Path(path), standing.sidecar)


def keep(making: Making, record: Mapping[str, Any], sidecar: Mapping[str, Any]) -> Standing:
    """Keeps what was written for later runs."""
    write_file(making.folder / _SIDECAR, json.dumps(sidecar).encode(), force=True)
    making.commit({name: value for name, value in record.items() if name != "path"})
    return Standing(record, sidecar)
