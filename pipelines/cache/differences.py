"""Tells two materials of keys apart in words: an option, a package, an input, or what stands before."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from quantpress.convert.files import shown
from quantpress.pipelines.cache.keys import canonical

__all__ = ["differences"]

_HASH = re.compile(r"[0-9a-f]{64}")
_SHOWN = 60  # characters of a value
_MISSING = object()


def differences(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """Gives one phrase for each difference, what is nearest to the work first.

    Known parts are called by their names: "stage" (name, version, options), "environment" (device, Python, packages),
    "files" and "tokenizer" (names with hashes), "input" and "work" (a material inside). Others by their path.

    Args:
        old: plain values (see `keys.plain`).
        new: the same, of the work that is to be done.
        where: what phrases begin with: "gptq: " for the stage before.
    """
    for name in sorted(old.keys() | new.keys(), key=_order):
        before, after = old.get(name, _MISSING), new.get(name, _MISSING)
        if not _same(before, after):
            yield from list(_part(name, before, after, where)) or [f"{where}{name} changed"]


def _part(name: str, before: Any, after: Any, where: str) -> Iterator[str]:
    """What differs in a part; nothing where only its form does: no files as a list, then as a mapping."""
    if name in _PARTS and isinstance(before, Mapping) and isinstance(after, Mapping):
        yield from _PARTS[name](before, after, where)
    elif name in ("files", "tokenizer") and _MISSING not in (before, after):
        yield from _files(before, after, where)
    elif name == "input" and _MISSING not in (before, after):
        yield f"{where}what stands before it changed"
    else:
        yield from _value(f"{where}{name}", before, after)


def _order(name: str) -> tuple[int, str]:
    """The work's own options first, then the software, what stands before it last."""
    known = ("work", "stage", "judge", "environment")
    return (known.index(name) if name in known else 9 if name == "input" else 5, name)


def _same(before: Any, after: Any) -> bool:
    if before is _MISSING or after is _MISSING:
        return before is after
    return canonical(before) == canonical(after)  # 1 and 1.0, and 1 and true, are not the same


def _stage(old: Mapping[str, Any], new: Mapping[str, Any], where: str) -> Iterator[str]:
    if not _same(old.get("name", _MISSING), new.get("name", _MISSING)):
        yield f"{where}stage {old.get('name')} -> {new.get('name')}"
        return
    if not _same(old.get("version", _MISSING), new.get("version", _MISSING)):
        yield f"{where}stage {new.get('name')}: version {old.get('version')} -> {new.get('version')}"
    for name in sorted((old.keys() | new.keys()) - {"name", "version"}):
        before, after = old.get(name, _MISSING), new.get(name, _MISSING)
        prefix = f"{where}option" if name == "options" else f"{where}{name}"
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            for option in sorted(before.keys() | after.keys()):
                yield from _value(f"{prefix} {option}", before.get(option, _MISSING), after.get(option, _MISSING))
        else:
            yield from _value(prefix, before, after)


def _environment(old: Mapping[str, Any], new: Mapping[str, Any], where: str) -> Iterator[str]:
    flat = []
    for environment in (old, new):
        packages = environment.get("packages")
        others = {name: value for name, value in environment.items() if name != "packages"}
        flat.append({**others, **packages} if isinstance(packages, Mapping) else dict(environment))
    for name in sorted(flat[0].keys() | flat[1].keys()):
        before, after = flat[0].get(name, "none"), flat[1].get(name, "none")
        if not _same(before, after):
            yield f"{where}{name} {_text(before)} -> {_text(after)}"


def _before(old: Mapping[str, Any], new: Mapping[str, Any], where: str) -> Iterator[str]:
    """What stands before; phrases name its stage, of which the work itself is not."""
    del where
    stages = [value.get("stage") for value in (old, new)]
    names = [stage.get("name") if isinstance(stage, Mapping) else None for stage in stages]
    if _same(*names):
        yield from differences(old, new, f"{names[1]}: " if names[1] else "")
    else:
        kinds = [f"stage {name}" if name else "the model itself" for name in names]
        yield f"before it stands {kinds[1]}, it was {kinds[0]}"


def _files(old: Any, new: Any, where: str) -> Iterator[str]:
    before, after = _hashes(old), _hashes(new)
    if before is None or after is None:
        yield from _value(f"{where}files", old, new)
        return
    for name in sorted(before.keys() | after.keys()):
        if name not in before:
            yield f"input {name} is new"
        elif name not in after:
            yield f"input {name} is gone"
        elif not _same(before[name], after[name]):
            yield f"input {name} changed"


def _hashes(files: Any) -> dict[str, list[Any]] | None:
    """Name -> what is said of it; files are a mapping, or rows of a name and a hash, or mappings with "name"."""
    if isinstance(files, Mapping):
        return {str(name): [value] for name, value in files.items()}
    if not isinstance(files, Sequence) or isinstance(files, str):
        return None
    found: dict[str, list[Any]] = {}
    for row in files:
        if isinstance(row, Mapping) and "name" in row:
            found.setdefault(str(row["name"]), []).append({key: row[key] for key in row if key != "name"})
        elif isinstance(row, Sequence) and not isinstance(row, str) and len(row) > 1:
            found.setdefault(str(row[0]), []).append(list(row[1:]))
        else:
            return None
    return found


def _value(name: str, before: Any, after: Any) -> Iterator[str]:
    """One value, or what differs inside of two mappings or of two lists of one length."""
    if _same(before, after):
        return
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for inner in sorted(before.keys() | after.keys()):
            yield from _value(f"{name}.{inner}", before.get(inner, _MISSING), after.get(inner, _MISSING))
    elif _is_hash(before) and _is_hash(after):
        yield f"{name}: contents changed"
    elif before is _MISSING:
        yield f"{name}: new, {_text(after)}"
    elif after is _MISSING:
        yield f"{name}: gone, was {_text(before)}"
    else:
        yield f"{name}: {_text(before)} -> {_text(after)}"


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and _HASH.fullmatch(value) is not None


def _text(value: Any) -> str:
    """A value as it may stand in a line: plain texts without quotation marks."""
    if _is_hash(value):
        return "other contents"
    if isinstance(value, str) and value and value.isprintable() and len(value) <= _SHOWN:
        return value
    return shown(value, _SHOWN)


_PARTS = {"stage": _stage, "environment": _environment, "input": _before, "work": differences}
