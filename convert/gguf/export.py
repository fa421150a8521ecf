"""From a checkpoint to a GGUF file, in bounded memory.

`write_gguf` reads every weight once, in chunks of rows that threads check, reorder and encode while the file is written
in order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from quantpress.convert.checkpoint import Array, LazyTensor
from quantpress.convert.gguf.codes import CodeRows
from quantpress.convert.gguf.container import MetadataValue
from quantpress.convert.gguf.encode import Encoded, encode_rows, relative_error, sampled_error
from quantpress.convert.gguf.planned import PlannedTensor, TensorPlan
from quantpress.convert.gguf.split import SplitOptions, part_paths, split_files
from quantpress.convert.gguf.stream import in_order
from quantpress.convert.gguf.writer import write_parts
from quantpress.convert.hashed_output import Written
from quantpress.convert.row_order import ReadRows
from quantpress.quant.errors import InputError, LayoutError
from quantpress.quant.floats import count_nonfinite
from quantpress.quant.ggml.search import searcher

__all__ = ["TensorOutcome", "WriteResult", "write_gguf"]

_SAMPLED_CHUNKS = 4  # the error is measured in one chunk of so many

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class TensorOutcome:
    """A tensor that was written; `relative_error` is the root mean square error over the root mean square.

    It is measured on about eight rows of every fourth chunk of a million values, on all values of vectors. `kept`: the
    source was quantized, and these are its codes.
    """

    name: str
    type: str
    nbytes: int
    relative_error: float | None
    kept: bool = False


@dataclass(frozen=True, slots=True)
class WriteResult:
    """A GGUF model that was written.

    Attributes:
        files: path -> hash and bytes, of each part in order; one where the model is not split.
        tensors: what became of each.
    """

    files: Mapping[Path, Written]
    tensors: tuple[TensorOutcome, ...]

    @property
    def path(self) -> Path:
        """The file that runtimes open: the only one or the first part."""
        return next(iter(self.files))

    @property
    def sha256(self) -> str:
        """SHA-256 of that file in hexadecimal."""
        return self.files[self.path].sha256

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files.values())


def write_gguf(
    path: Path | str,
    metadata: Mapping[str, MetadataValue],
    plan: TensorPlan,
    *,
    threads: int,
    split: SplitOptions | None = None,
    force: bool = False,
    held: bool = False,
    allow_nonfinite: bool = False,
    measure_error: bool = True,
    device: str = "cpu",
    progress: Progress = lambda _phase, _done, _total: None,
) -> WriteResult:
    """Writes a GGUF file, or all parts of one, atomically, reading every weight once.

    Args:
        path: the output; where it is split the name of it as a whole, `model.gguf`, or of its first part.
        metadata: pairs in the order of the file.
        plan: what `plan_tensors` gave.
        threads: that read and encode; the bytes do not depend on it.
        split: where to begin another file; None for a single one.
        force: replace existing files.
        held: the caller has the lock of the whole output already, see `held_output` and `whole_path`.
        allow_nonfinite: write NaN and infinities instead of refusing them.
        measure_error: measure the error of each tensor on a sample of its rows.
        device: where to search for scales, see `on_device`; the bytes do not depend on it.
        progress: told the bytes that are written.

    Raises:
        InputError: a tensor holds NaN or infinities, or values its type cannot hold; or it cannot be read.
        UsageError, BusyError, OutputError: see `atomic_file`, `split_files` and `check_parts`.
    """
    errors = [[0.0, 0.0] for _ in plan.tensors]
    kept = [tensor.keeps_codes for tensor in plan.tensors]
    encode = partial(_encode, allow_nonfinite=allow_nonfinite, device=device)
    total = sum(tensor.nbytes for tensor in plan.tensors)
    if device == "cpu":
        _load_searches(plan)

    def chunks() -> Iterator[tuple[int, Array]]:
        done = 0
        for number, encoded in in_order(_tasks(plan, encode, measure_error), threads=threads, window=2 * threads + 2):
            errors[number][0] += encoded.squared_error
            errors[number][1] += encoded.squared_values
            kept[number] &= encoded.kept
            yield number, encoded.data
            done += encoded.data.nbytes
            progress("write", done, total)

    plans = split_files(plan.file(metadata), split)
    place = Path(path) if split is None else part_paths(Path(path), len(plans))[0]
    files = write_parts(place, plans, chunks(), force=force, held=held)
    outcomes = tuple(
        TensorOutcome(t.name, t.type, t.nbytes, relative_error(*sums) if measure_error else None, codes)
        for t, sums, codes in zip(plan.tensors, errors, kept, strict=True)
    )
    return WriteResult(files, outcomes)


def _load_searches(plan: TensorPlan) -> None:
    """Loads what searches the types first: once numba is there, types that numpy encodes are encoded by it too."""
    values: dict[tuple[str, bool], int] = {}
    for tensor in plan.tensors:
        key = (tensor.type, tensor.importance is not None)
        values[key] = values.get(key, 0) + math.prod(tensor.shape)
    for (kind, weighted), count in values.items():
        searcher(kind, weighted=weighted, values=count)


def _tasks(
    plan: TensorPlan, encode: Callable[..., Encoded], measure_error: bool
) -> Iterator[Callable[[], tuple[int, Encoded]]]:
    parts = ((number, part) for number, tensor in enumerate(plan.tensors) for part in tensor.parts())
    for number, tensor in parts:
        read, codes = tensor.reader(), tensor.code_rows()
        for chunk, (start, stop) in enumerate(tensor.row_ranges()):
            sample = measure_error and chunk % _SAMPLED_CHUNKS == 0
            yield partial(_numbered, number, partial(encode, tensor, read, codes, start, stop, sample=sample))


def _numbered(number: int, task: Callable[[], Encoded]) -> tuple[int, Encoded]:
    return number, task()


def _encode(
    tensor: PlannedTensor,
    read: ReadRows,
    codes: CodeRows | None,
    start: int,
    stop: int,
    *,
    sample: bool,
    allow_nonfinite: bool,
    device: str,
) -> Encoded:
    if codes is not None and (blocks := codes.blocks(start, stop)) is not None:
        return Encoded(blocks, 0.0, 0.0, kept=True)
    if tensor.blocks is not None:
        return _found_before(tensor, tensor.blocks, read, start, stop, sample=sample)
    rows = read(start, stop)
    where = f"{tensor.source.source}: tensor {tensor.source.name!r}"
    if not allow_nonfinite and count_nonfinite(rows):
        bad = sum(count_nonfinite(read(*part)) for part in tensor.row_ranges())
        raise InputError(
            f"{where}: {bad} of {tensor.source.size} values are NaN or infinite; "
            "the checkpoint is damaged (--allow-nonfinite writes them anyway)"
        )
    try:
        return encode_rows(
            rows, tensor.type, offset=tensor.offset, sample=sample, importance=tensor.importance, device=device
        )
    except LayoutError as error:
        raise InputError(f"{where}: {error}; choose another type, for this tensor with --tensor-type") from error


def _found_before(
    tensor: PlannedTensor, blocks: LazyTensor, read: ReadRows, start: int, stop: int, *, sample: bool
) -> Encoded:
    """Gives blocks that a method found, and what they cost against the source where that is measured."""
    data = np.ascontiguousarray(tensor.order.read(blocks.read_rows, start, stop))
    if not sample:
        return Encoded(data, 0.0, 0.0)
    return Encoded(data, *sampled_error(read(start, stop), data, tensor.type))
