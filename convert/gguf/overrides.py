"""What a user sets in the metadata by hand: `--metadata FILE` and `--override-kv KEY=TYPE:VALUE`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from quantpress.convert.files import shown
from quantpress.convert.gguf.container import SCALARS, MetadataValue
from quantpress.convert.gguf.general import SAMPLING, Metadata, described
from quantpress.convert.json_reader import read_json
from quantpress.quant.errors import InputError, UsageError

# gguf package, constants.Keys.General: what describes a model and not a file
_TEXTS = (
    *("name", "author", "version", "organization", "finetune", "basename", "description", "quantized_by"),
    *("size_label", "license", "license.name", "license.link", "url", "doi", "uuid", "repo_url"),
    *("source.url", "source.doi", "source.uuid", "source.repo_url"),
)
_LISTS = ("tags", "languages")
_DESCRIBED = {"base_models": "base_model", "datasets": "dataset"}
_FIELDS = ("name", "author", "version", "organization", "description", "url", "doi", "uuid", "repo_url")
_FIXED = ("general.alignment", "general.architecture")


def read_metadata_file(path: Path | str) -> Metadata:
    """Reads a JSON object of `general.*` keys, in the form llama.cpp's converter takes with --metadata.

    Raises:
        InputError: the file cannot be read, a key is unknown, or a value has the wrong form.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: a JSON object of general.* keys is wanted, found {shown(content)}")
    metadata: Metadata = {}
    for key, value in content.items():
        metadata |= _checked_pair(path, key, value)
    return metadata


def _checked_pair(path: Path | str, key: str, value: Any) -> Metadata:
    try:
        return _pair(key, value)
    except (TypeError, KeyError):
        raise InputError(f"{path}: {shown(key)} is unknown or cannot be {shown(value)}") from None


def _pair(key: str, value: Any) -> Metadata:
    """Gives the pairs of one entry.

    Raises:
        KeyError: the key is unknown.
        TypeError: the value does not fit it.
    """
    start, _, rest = key.partition(".")
    if start != "general":
        raise KeyError(key)
    if rest.startswith("sampling."):
        kind = {f"sampling.{gguf}": kind for gguf, kind in SAMPLING.values()}[rest]
        return {key: (kind, _sampling_value(kind, value))}
    if rest in _TEXTS:
        return {key: ("string", _text(value))}
    if rest in _LISTS:
        return {key: ("array[string]", [_text(text) for text in _list(value)])}
    kind = _DESCRIBED[rest]
    return described(kind, [_described_entry(entry) for entry in _list(value)])


def _sampling_value(kind: str, value: Any) -> Any:
    if kind == "string":
        return _text(value)
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind == "float32" else int):
        raise TypeError(value)
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(value)
    return value


def _described_entry(entry: Any) -> dict[str, str]:
    if not isinstance(entry, dict) or not set(entry) <= set(_FIELDS):
        raise TypeError(entry)
    return {field: _text(text) for field, text in entry.items()}


def override(metadata: Mapping[str, MetadataValue], settings: Sequence[str]) -> Metadata:
    """Gives metadata with some values set by hand.

    Args:
        metadata: pairs in the order of the file; a new key goes to the end.
        settings: `KEY=TYPE:VALUE` with TYPE one of int, float, bool and str, as llama.cpp's --override-kv.

    Raises:
        UsageError: a setting has another form, its value does not fit its type, or the key holds another type.
    """
    changed = dict(metadata)
    for setting in settings:
        key, equals, typed = setting.partition("=")
        kind, colon, text = typed.partition(":")
        if not (key and equals and colon):
            raise UsageError(f"--override-kv: {setting!r} is not of the form KEY=TYPE:VALUE")
        if key in _FIXED or key.startswith("split."):
            raise UsageError(f"--override-kv: {key} follows from the model and the file, it cannot be set")
        changed[key] = _parsed(setting, kind, text, changed.get(key))
    return changed


def _parsed(setting: str, kind: str, text: str, present: MetadataValue | None) -> MetadataValue:
    try:
        value = _PARSERS[kind](text)
    except (KeyError, ValueError):
        raise UsageError(
            f"--override-kv: {setting!r} has no value of its type; int:1, float:0.5, bool:true and str:text are values"
        ) from None
    held = present[0] if present else _new_type(kind, value)
    if kind != _setting_type(held) or (kind == "int" and not _fits(held, value)):
        raise UsageError(f"--override-kv: {setting!r} does not fit the key's type in GGUF, {held}")
    return held, value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


_PARSERS: Mapping[str, Callable[[str], Any]] = MappingProxyType(
    {"int": int, "float": _finite, "bool": {"true": True, "false": False}.__getitem__, "str": str}
)


def _new_type(kind: str, value: Any) -> str:
    if kind == "int":
        return "uint32" if _fits("uint32", value) else "int64"
    return {"float": "float32", "bool": "bool"}.get(kind, "string")


def _fits(held: str, value: int) -> bool:
    limits = np.iinfo(SCALARS[held][1])
    return int(limits.min) <= value <= int(limits.max)


def _setting_type(held: str) -> str:
    """Gives the name that --override-kv has for a GGUF type; arrays have none."""
    if held in ("string", "bool"):
        return {"string": "str", "bool": "bool"}[held]
    return "float" if held.startswith("float") else "" if held.startswith("array") else "int"
