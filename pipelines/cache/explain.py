"""Says why a stage runs again: what is different from what it was asked for the last time."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantpress.convert.atomic import output_errors
from quantpress.pipelines.cache.differences import differences
from quantpress.pipelines.cache.keys import key_of, plain
from quantpress.pipelines.cache.sealed import read_sealed, replace_sealed
from quantpress.pipelines.cache.store import Cache
from quantpress.quant.errors import InputError

__all__ = ["FIRST", "GONE", "STOPPED", "History"]

FIRST = "first run"
STOPPED = "an earlier run was stopped before it finished"
GONE = "its entry was pruned, damaged or removed"
_MOST = 20  # reasons; more differences mean another thing altogether


class History:
    """What was asked for last, by label; a label is "JOB/STAGE" or whatever else names a piece of work for a user."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def why(self, label: str, material: Mapping[str, Any]) -> tuple[str, ...]:
        """Says why work that is not in the cache is to be done.

        Args:
            label: what the work is called.
            material: what its key is made of (see `keys.key_of`), nested: with "stage", "environment", "input".

        Returns:
            At least one reason, each a short phrase: "option bits: 4 -> 3", "input model.safetensors changed".
        """
        begun = (STOPPED,) if self._cache.was_begun(key_of(material)) else ()
        last = self._last(label)
        if last is None:
            return begun or (FIRST,)
        if last == plain(material):
            return begun or (GONE,)
        found = list(dict.fromkeys(differences(last, plain(material))))
        if len(found) > _MOST:
            found[_MOST - 1 :] = [f"and {len(found) - _MOST + 1} more differences"]
        return (*begun, *found)

    def remember(self, label: str, material: Mapping[str, Any]) -> None:
        """Keeps the material of work that is finished.

        Raises:
            OutputError: the cache folder cannot be written.
        """
        self._cache.layout.create()
        path = self._path(label)
        with output_errors(path):
            path.parent.mkdir(exist_ok=True)
        if self._last(label) != plain(material):
            replace_sealed(path, {"label": label, "material": material})

    def labels(self) -> dict[str, list[str]]:
        """Gives the labels that were last remembered, by the key of their material."""
        found: dict[str, list[str]] = {}
        folder = self._cache.layout.labels
        for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
            with contextlib.suppress(InputError, LookupError, TypeError):
                value = read_sealed(path)
                found.setdefault(key_of(value["material"]), []).append(str(value["label"]))
        return {key: sorted(labels) for key, labels in found.items()}

    def _last(self, label: str) -> Mapping[str, Any] | None:
        try:
            value = read_sealed(self._path(label))
        except InputError:
            return None
        found = value.get("material") if isinstance(value, Mapping) and value.get("label") == label else None
        return found if isinstance(found, Mapping) else None

    def _path(self, label: str) -> Path:
        name = hashlib.sha256(label.encode("utf-8", "surrogatepass")).hexdigest()[:40]
        return self._cache.layout.labels / f"{name}.json"
