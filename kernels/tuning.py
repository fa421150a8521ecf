"""Which launch parameters a product gets: what was measured on this GPU, else what ships, else arithmetic.

Nothing is measured here and nothing is read at import. `choose` looks at three places, in this order: the file that
`quantpress bench kernels --tune` wrote for this GPU, the file of `tuned/` whose name is a word of the GPU's name
("h200" of "NVIDIA H200"), and `default_launch`. Within a file it wants a row of the same kind, bits and number of input
rows; if none has the very shape, the row of the nearest shape stands for it, as long as it is near (`_FARTHEST`).

Such a file is JSON: {"format": 1, "gpu": name, "measured": bool, "made_by": {...}, "dense_from": {...}, "launches": [
{"kind", "bits", "group_size", "dtype", "symmetric", "rows_in", "rows", "columns", "microseconds", "launch": {...}}]}.
`dense_from` says for each type from how many input rows on the weight is dequantized for cuBLAS where no row decides.
The files that ship are not measured yet. For 16 bits they say 2048 rows: there dequantizing four bits (2.5 bytes a
weight at 4.3 TB/s) takes a tenth of cuBLAS's time (2 x 2048 operations a weight at 790 TFLOP/s). For float32, 32 rows:
kernels multiply it outside the tensor cores, as cuBLAS does with less to unpack.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from quantpress.kernels.launch import BUCKETS, Launch, Problem, bucket

__all__ = [
    "MANY",
    "Table",
    "Tuned",
    "TuningError",
    "choose",
    "default_launch",
    "device_file",
    "forget",
    "merged",
    "read_table",
    "shipped_file",
    "tuned_rows_in",
    "write_table",
]

MANY = 4096
"""The number of input rows that stands for all above the greatest bucket."""

_FORMAT = 1
_MOST_BYTES = 16 << 20  # of a file; a row takes about 250
_SHIPPED = Path(__file__).with_name("tuned")
_KERNELS = ("gemv", "tiled", "dense")
_FARTHEST = 2.0  # how often a shape may be doubled or halved, outputs and columns together, to stand for another one
_OTHER_GROUPS = 0.5  # what another size of groups adds to that distance, for each doubling
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


def choose(problem: Problem, device_name: str) -> Launch:
    """Gives the launch parameters of a product.

    Args:
        problem: the product.
        device_name: of the GPU, as `torch.cuda.get_device_name` gives it; "" where there is none.

    Raises:
        TuningError: a file is there and cannot be used; its message names the file.
    """
    return _chosen(replace(problem, rows_in=tuned_rows_in(problem.rows_in)), device_name)


def tuned_rows_in(rows_in: int) -> int:
    """Gives the number of input rows whose launch parameters such a product gets."""
    return bucket(rows_in) if rows_in <= BUCKETS[-1] else MANY


def default_launch(problem: Problem) -> Launch:
    """Gives the launch parameters that the kernels choose by arithmetic, measuring nothing."""
    if problem.rows_in <= 4:
        from quantpress.kernels.gemv import gemv_launch

        return gemv_launch(problem)
    from quantpress.kernels.tiled import tiled_launch

    return tiled_launch(problem)


def device_file(device_name: str) -> Path:
    """Gives the place of the file for a GPU: $XDG_CACHE_HOME or ~/.cache, quantpress/kernels/<gpu>.json."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    # the specification of base directories says that a relative path is to be ignored
    cache = Path(given) if given and Path(given).is_absolute() else Path.home() / ".cache"
    return cache / "quantpress" / "kernels" / f"{'-'.join(_words(device_name)) or 'unnamed'}.json"


def shipped_file(device_name: str) -> Path:
    """Gives the file of this package for a GPU: the one of its family, or the one for all."""
    words = _words(device_name)
    family = sorted(path for path in _SHIPPED.glob("*.json") if path.stem in words)
    return family[0] if family else _SHIPPED / "default.json"


def forget() -> None:
    """Lets the next `choose` read the files again."""
    _chosen.cache_clear()
    _tables.cache_clear()


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


@functools.lru_cache(maxsize=4096)
def _chosen(problem: Problem, device_name: str) -> Launch:
    tables = _tables(device_name, device_file(device_name))
    for table in tables:
        row = _nearest(problem, table.launches)
        if row is not None:
            return _fitted(problem, row)
    for table in tables:
        if problem.rows_in >= table.dense_from.get(problem.dtype, math.inf):
            return Launch("dense")
    return default_launch(problem)


@functools.lru_cache(maxsize=16)
def _tables(device_name: str, own: Path) -> tuple[Table, ...]:
    shipped = read_table(shipped_file(device_name))
    return (read_table(own), shipped) if device_name and own.exists() else (shipped,)


def _fitted(problem: Problem, row: Tuned) -> Launch:
    """Gives the launch of a row for another shape: K is split so that about as many programs run."""
    launch = row.launch
    if launch.split_k == 1 or (problem.rows, problem.columns) == (row.problem.rows, row.problem.columns):
        return launch
    found, wanted = (math.ceil(each.rows / launch.block_n) for each in (row.problem, problem))
    most = math.ceil(problem.columns / launch.block_k)
    split_k = max(1, min(round(launch.split_k * found / wanted), most))
    # the tiled kernel's sums are shared by a power of two of programs
    return replace(launch, split_k=split_k if launch.kernel == "gemv" else 1 << (split_k.bit_length() - 1))


def _nearest(problem: Problem, rows: Iterable[Tuned]) -> Tuned | None:
    near = [(_distance(problem, row.problem), number, row) for number, row in enumerate(rows)]
    distance, _, row = min(near, default=(math.inf, 0, None), key=lambda each: each[:2])
    return row if distance <= _FARTHEST else None


def _distance(wanted: Problem, found: Problem) -> float:
    """How far a shape is from another one; infinite where its launch parameters say nothing about it."""
    same = (wanted.kind, wanted.bits, wanted.rows_in) == (found.kind, found.bits, found.rows_in)
    if not same or (wanted.dtype == "float32") != (found.dtype == "float32"):
        return math.inf
    # parameters of long groups reach past the end of short ones, and take the slow path there
    whole_rows = [each.group_size >= each.columns for each in (wanted, found)]
    if not whole_rows[0] and (whole_rows[1] or found.group_size > wanted.group_size):
        return math.inf
    shape = _doublings(wanted.rows, found.rows) + _doublings(wanted.columns, found.columns)
    groups = 0.0 if all(whole_rows) else _doublings(wanted.group_size, found.group_size)
    others = (wanted.dtype != found.dtype) + (wanted.symmetric != found.symmetric)
    return shape + _OTHER_GROUPS * groups + others / 1024  # these decide only between rows that are else as near


def _doublings(one: int, other: int) -> float:
    return abs(math.log2(one / other))


def _words(device_name: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", device_name.lower()[:128])


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
