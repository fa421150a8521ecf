"""Which launch parameters a product gets: what was measured on this GPU, else what ships, else arithmetic.

Nothing is measured here and nothing is read at import. `choose` looks at three places, in this order: the file that
`quantpress bench kernels --tune` wrote for this GPU, the file beside this one whose name is a word of the GPU's name
("h200" of "NVIDIA H200"), and `default_launch`. Within a file it wants a row of the same kind, bits and number of input
rows; if none has the very shape, the row of the nearest shape stands for it, as long as it is near (`_FARTHEST`).

The files that ship are not measured yet. For 16 bits they say 2048 rows: there dequantizing four bits (2.5 bytes a
weight at 4.3 TB/s) takes a tenth of cuBLAS's time (2 x 2048 operations a weight at 790 TFLOP/s). For float32, 32 rows:
kernels multiply it outside the tensor cores, as cuBLAS does with less to unpack.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from quantpress.kernels.launch import BUCKETS, Launch, Problem, bucket
from quantpress.kernels.tuning.tables import Table, Tuned, TuningError, read_table

__all__ = [
    "MANY",
    "TuningError",
    "choose",
    "default_launch",
    "device_file",
    "forget",
    "shipped_file",
    "tuned_rows_in",
]

MANY = 4096
"""The number of input rows that stands for all above the greatest bucket."""

_SHIPPED = Path(__file__).parent
_FARTHEST = 2.0  # how often a shape may be doubled or halved, outputs and columns together, to stand for another one
_OTHER_GROUPS = 0.5  # what another size of groups adds to that distance, for each doubling


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
    if problem.kind == "w8a8":
        from quantpress.kernels.int8.product import int8_launch

        return int8_launch(problem)
    if problem.kind == "nf4":
        from quantpress.kernels.nf4.matmul import nf4_launch

        return nf4_launch(problem)
    if problem.rows_in <= _vector_rows(problem):
        from quantpress.kernels.gemv import gemv_launch

        return gemv_launch(problem)
    from quantpress.kernels.tiled import tiled_launch

    return tiled_launch(problem)


def _vector_rows(problem: Problem) -> int:
    """Gives up to how many input rows the vector kernel is the better one, by instructions for a weight.

    Of 4 bits and fewer it takes 9 at 4 rows, where memory leaves 4.9; tiles on tensor cores take 3 to 5 whatever the
    rows. A weight of 8 bits leaves twice as many. Tiles of float32, and of groups that cut through them, have no tensor
    cores.
    """
    least = 32 if problem.bits == 3 else 16
    apart = problem.group_size < problem.columns and math.gcd(problem.group_size, 128) < least
    return 4 if problem.bits == 8 or problem.dtype == "float32" or apart else 2


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


@functools.lru_cache(maxsize=4096)
def _chosen(problem: Problem, device_name: str) -> Launch:
    tables = _tables(device_name, device_file(device_name))
    for table in tables:
        row = _nearest(problem, table.launches)
        if row is not None:
            return _fitted(problem, row)
    for table in tables:
        if problem.kind == "packed" and problem.rows_in >= table.dense_from.get(problem.dtype, math.inf):
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
