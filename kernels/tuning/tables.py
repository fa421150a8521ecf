"""Files of launch parameters: what a line says, read with care and written whole.

Such a file is JSON: {"format": 1, "gpu": name, "measured": bool, "made_by": {...}, "dense_from": {...}, "launches": [
{"kind", "bits", "group_size", "dtype", "symmetric", "rows_in", "rows", "columns", "microseconds", "launch": {...}}]}.
`dense_from` says for each type from how many input rows on the weight is dequantized for cuBLAS where no row decides.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from quantpress.kernels.launch import Launch, Problem

__all__ = ["Table", "Tuned", "TuningError", "merged", "read_table", "write_table"]

_FORMAT = 1
_MOST_BYTES = 16 << 20  # of a file; a row takes about 250
_KERNELS = ("gemv", "tiled", "dense")
_GREATEST = {"block_m": 512, "block_n": 1024, "block_k": 4096, "split_k": 1024, "warps": 32, "stages": 16}
_POWERS = ("block_m", "block_n", "block_k", "warps")  # Triton's tiles and warps come in powers of two


class TuningError(ValueError):
    """A file of launch parameters is damaged or of another version."""


@dataclass(frozen=True, slots=True)
class Tuned:
    """A row of a file: the launch of one product.

    Attributes:
        problem: with `rows_in` as tuned (see `tuned_rows_in`).
        launch: the best that was found.
        microseconds: median time of one launch, None where it was not measured.
    """

    problem: Problem
    launch: Launch
    microseconds: float | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """A file.

    Attributes:
        gpu: name of the device as CUDA gives it, or the family that a shipped file is for.
        measured: whether its rows were timed.
        launches: rows.
        dense_from: type of input -> rows of input from which on the weight is dequantized for cuBLAS.
        made_by: name -> version or commit.
    """

    gpu: str
    measured: bool
    launches: tuple[Tuned, ...] = ()
    dense_from: Mapping[str, int] = field(default_factory=dict)
    made_by: Mapping[str, str] = field(default_factory=dict)


def read_table(path: Path) -> Table:
    """Reads a file.

    Raises:
        TuningError: it cannot be read, is no such file, or holds launch parameters that no kernel takes.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES + 1)
        if len(text) > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES} bytes")
        return _table(json.loads(text))
    except (OSError, ValueError, RecursionError) as error:
        raise TuningError(
            f"{path}: not a table of launch parameters ({error}); remove it, or write it anew with "
            "`quantpress bench kernels --tune`"
        ) from error


def write_table(path: Path, table: Table) -> None:
    """Writes a file, whole or not at all; one row a line.

    Raises:
        OSError: it cannot be written.
    """
    head = {
        "format": _FORMAT, "gpu": table.gpu, "measured": table.measured, "made_by": dict(table.made_by),
        "dense_from": dict(table.dense_from),
    }  # fmt: skip
    rows = ",".join("\n  " + json.dumps(_row_to_json(row)) for row in table.launches)
    text = f'{json.dumps(head, indent=1)[:-2]},\n "launches": [{rows}]\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def merged(old: Iterable[Tuned], new: Iterable[Tuned]) -> tuple[Tuned, ...]:
    """Gives the rows of both; where both have a product, that of `new`."""
    return tuple({row.problem: row for row in (*old, *new)}.values())


def _table(found: Any) -> Table:
    if not isinstance(found, dict) or not isinstance(found.get("launches"), list):
        raise ValueError('wanted an object with "launches"')
    if found.get("format") != _FORMAT:
        raise ValueError(f"format {found.get('format')!r:.40}, wanted {_FORMAT}")
    gpu, measured = found.get("gpu"), found.get("measured")
    if not isinstance(gpu, str) or not isinstance(measured, bool):
        raise ValueError('wanted a text "gpu" and true or false as "measured"')
    dense, made_by = found.get("dense_from", {}), found.get("made_by", {})
    if not isinstance(dense, dict) or not all(type(rows) is int and rows > 0 for rows in dense.values()):
        raise ValueError('"dense_from" wants a number of rows for each type')
    if not isinstance(made_by, dict) or not all(isinstance(value, str) for value in made_by.values()):
        raise ValueError('"made_by" wants texts')
    return Table(gpu, measured, tuple(map(_row, found["launches"])), dense, made_by)


def _row(found: Any) -> Tuned:
    if not isinstance(found, dict) or not isinstance(found.get("launch"), dict):
        raise ValueError('a row wants an object "launch"')
    time = found.get("microseconds")
    if time is not None and (type(time) not in (int, float) or not 0 < time < math.inf):
        raise ValueError(f"microseconds {time!r:.40}")
    problem = {each.name: found.get(each.name) for each in fields(Problem)}
    for name, value in problem.items():
        wanted = bool if name == "symmetric" else str if name in ("dtype", "kind") else int
        if type(value) is not wanted or (wanted is int and not 0 < value < 1 << 31):  # type: ignore[operator]
            raise ValueError(f"{name} {value!r:.40} of a row")
    return Tuned(Problem(**problem), _launch(found["launch"]), time)  # type: ignore[arg-type]


def _launch(found: Mapping[str, Any]) -> Launch:
    if found.get("kernel") not in _KERNELS or not set(found) <= {"kernel", *_GREATEST}:
        raise ValueError(f"launch {dict(found)!r:.120}")
    for name, greatest in _GREATEST.items():
        value = found.get(name, 1)
        if type(value) is not int or not 1 <= value <= greatest or (name in _POWERS and value & (value - 1)):
            raise ValueError(f"{name} {value!r:.40} of a launch")
    return Launch(**found)


def _row_to_json(row: Tuned) -> dict[str, Any]:
    record: dict[str, Any] = asdict(row.problem)
    if row.microseconds is not None:
        record["microseconds"] = round(row.microseconds, 3)
    return record | {"launch": asdict(row.launch)}
