"""From a checkpoint to the tensors of a GGUF file: what each will be, and then their bytes, in bounded memory.

`plan_tensors` touches no weight. `write_gguf` reads every weight once, in chunks of rows that threads check, reorder
and encode while the file is written in order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Layout, Role
from quantpress.convert.checkpoint import Array, LazyTensor
from quantpress.convert.gguf.codes import CodeRows, codes_note
from quantpress.convert.gguf.container import MetadataValue
from quantpress.convert.gguf.encode import Encoded, encode_rows, relative_error
from quantpress.convert.gguf.file_types import FILE_TYPES
from quantpress.convert.gguf.mixture import Mixture, TypeOptions, resolve_outtype
from quantpress.convert.gguf.rows import IN_PLACE, ReadRows, RowOrder, Transposed, row_order
from quantpress.convert.gguf.stream import in_order
from quantpress.convert.gguf.writer import FilePlan, Slot, write_container
from quantpress.convert.preflight import Binding
from quantpress.quant.errors import InputError, LayoutError
from quantpress.quant.floats import count_nonfinite
from quantpress.quant.ggml.from_codes import FROM_CODES
from quantpress.quant.ggml.types import ggml_type, row_bytes

if TYPE_CHECKING:
    from quantpress.convert.quantized import LazyQuantized

_SAMPLED_CHUNKS = 4  # the error is measured in one chunk of so many
_CHUNK_VALUES = 1 << 20  # values that one task reads and encodes: 2 MB of bf16, and a few MB beside it

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor of the file to be written.

    Attributes:
        name: in GGUF.
        shape: in the file, outermost dimension first.
        type: name of the type it will have.
        nbytes: bytes of its data.
        note: why the type is not the one that was asked for, or empty.
        source: where the values come from.
        order: how the rows are reordered.
        transposed: the source is (K, N) and the file holds (N, K).
        offset: added to every value.
        codes: what the source has them as, where it is quantized and the type may hold the codes as they are.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    nbytes: int
    note: str
    source: LazyTensor = field(repr=False)
    order: RowOrder = field(default=IN_PLACE, repr=False)
    transposed: bool = False
    offset: float = 0.0
    codes: LazyQuantized | None = field(default=None, repr=False)

    def code_rows(self) -> CodeRows | None:
        """Gives what reads rows as blocks with the source's codes, or None; it holds the codes while it lives."""
        return None if self.codes is None else CodeRows(self.codes, self.order, self.type)

    def reader(self) -> ReadRows:
        """Gives a function that reads rows as the file holds them; a transposed tensor stays in memory with it."""
        read = Transposed(self.source).read_rows if self.transposed else self.source.exact_rows
        return partial(self.order.read, read)

    def row_ranges(self) -> Iterator[tuple[int, int]]:
        """Gives the rows to be read together; independent of the number of threads."""
        rows = self.shape[0] if self.shape else 1
        step = max(1, _CHUNK_VALUES // max(1, math.prod(self.shape[1:])))
        step = max(1, step // self.order.block) * self.order.block
        return ((start, min(start + step, rows)) for start in range(0, rows, step))


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """Every tensor of a file, in its order, and the type that the file is named after."""

    outtype: str
    tensors: tuple[PlannedTensor, ...]

    @property
    def file_type(self) -> int:
        """llama.cpp's number of the file type."""
        return FILE_TYPES[self.outtype]

    @property
    def parameters(self) -> int:
        """Number of values in the file."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def quantized(self) -> bool:
        """Whether any tensor is stored in blocks."""
        return any(ggml_type(tensor.type).block_size > 1 for tensor in self.tensors)

    def file(self, metadata: Mapping[str, MetadataValue]) -> FilePlan:
        """Gives header and table of the file, for its size and for writing it."""
        slots = [Slot(each.name, each.shape, ggml_type(each.type).type_id, each.nbytes) for each in self.tensors]
        return FilePlan(metadata, slots)


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
    """A GGUF file that was written: SHA-256 in hexadecimal, bytes, and what became of each tensor."""

    sha256: str
    nbytes: int
    tensors: tuple[TensorOutcome, ...]


def plan_tensors(
    bindings: Iterable[Binding],
    arch: ArchSpec,
    hyper: Hyperparameters,
    options: TypeOptions,
    *,
    quantized: Mapping[str, LazyQuantized] = MappingProxyType({}),
) -> TensorPlan:
    """Plans the tensors of a GGUF file without reading a weight.

    Args:
        bindings: the table bound to a checkpoint, in the order of the file.
        arch: the family.
        hyper: its sizes.
        options: which types are asked for.
        quantized: `Checkpoint.quantized`; where a type can hold such codes, they are written as they are.

    Raises:
        UsageError: an option names an unknown type, or a pattern meets no tensor.
        InputError: the head is missing and not tied.
    """
    rows = _with_head(list(bindings), arch, hyper)
    outtype = resolve_outtype(options.outtype, (tensor for _, _, tensor in rows))
    mixture = Mixture(options, outtype, tied=all(row.role is not Role.HEAD for row, _, _ in rows))
    extra = [_plan_extra(name, values) for name, values in arch.gguf_tensors(hyper).items()]
    tensors = (*extra, *(_plan_row(arch, hyper, mixture, binding, quantized) for binding in rows))
    mixture.check_used()
    return TensorPlan(outtype, tensors)


def _with_head(bindings: list[Binding], arch: ArchSpec, hyper: Hyperparameters) -> list[Binding]:
    """Drops or adds the head as llama.cpp's graph for this architecture wants it."""
    if arch.gguf_head == "never" or (arch.gguf_head == "optional" and hyper.tied):
        return [binding for binding in bindings if binding[0].role is not Role.HEAD]
    if any(row.role is Role.HEAD for row, _, _ in bindings):
        return bindings
    embedding = next(tensor for row, _, tensor in bindings if row.role is Role.EMBEDDING)
    head = next((row for row in arch.tensors if row.role is Role.HEAD), None)
    if head is None or not hyper.tied:
        raise InputError(f"{embedding.source}: the head is missing and config.json does not say that it is tied")
    return [*bindings, (head, -1, embedding)]


def _plan_extra(name: str, values: tuple[float, ...]) -> PlannedTensor:
    array = np.asarray(values, np.float32)
    tensor = LazyTensor(name, array.shape, "F32", "config.json", lambda start, stop: array[start:stop])
    return PlannedTensor(name, array.shape, "F32", array.nbytes, "", tensor)


def _plan_row(
    arch: ArchSpec, hyper: Hyperparameters, mixture: Mixture, binding: Binding, quantized: Mapping[str, LazyQuantized]
) -> PlannedTensor:
    row, layer, tensor = binding
    name = row.gguf.format(layer=layer)
    transposed = row.layout is Layout.TRANSPOSED and len(tensor.shape) == 2
    shape = tensor.shape[::-1] if transposed else tensor.shape
    choice = mixture.choose(name, row.role, shape, tensor.dtype)
    nbytes = math.prod(shape[:-1]) * row_bytes(ggml_type(choice.type), shape[-1] if shape else 1)
    order = row_order(arch, row, hyper)
    codes = None if row.offset else quantized.get(tensor.name)
    note = choice.note or ("" if codes is None else codes_note(codes.form, choice.type))
    if choice.type not in FROM_CODES:
        codes = None
    return PlannedTensor(name, shape, choice.type, nbytes, note, tensor, order, transposed, row.offset, codes)


def write_gguf(
    path: Path | str,
    metadata: Mapping[str, MetadataValue],
    plan: TensorPlan,
    *,
    threads: int,
    force: bool = False,
    allow_nonfinite: bool = False,
    measure_error: bool = True,
    progress: Progress = lambda _phase, _done, _total: None,
) -> WriteResult:
    """Writes a GGUF file atomically, reading every weight once.

    Args:
        path: the output.
        metadata: pairs in the order of the file.
        plan: what `plan_tensors` gave.
        threads: that read and encode; the bytes do not depend on it.
        force: replace an existing file.
        allow_nonfinite: write NaN and infinities instead of refusing them.
        measure_error: measure the error of each tensor on a sample of its rows.
        progress: told the bytes that are written.

    Raises:
        InputError: a tensor holds NaN or infinities, or values its type cannot hold; or it cannot be read.
        UsageError, BusyError, OutputError: see `atomic_file`.
    """
    errors = [[0.0, 0.0] for _ in plan.tensors]
    kept = [tensor.codes is not None for tensor in plan.tensors]
    encode = partial(_encode, allow_nonfinite=allow_nonfinite)
    total = sum(tensor.nbytes for tensor in plan.tensors)

    def chunks() -> Iterator[tuple[int, Array]]:
        done = 0
        for number, encoded in in_order(_tasks(plan, encode, measure_error), threads=threads, window=2 * threads + 2):
            errors[number][0] += encoded.squared_error
            errors[number][1] += encoded.squared_values
            kept[number] &= encoded.kept
            yield number, encoded.data
            done += encoded.data.nbytes
            progress("write", done, total)

    written = write_container(path, plan.file(metadata), chunks(), force=force)
    outcomes = tuple(
        TensorOutcome(t.name, t.type, t.nbytes, relative_error(*sums) if measure_error else None, codes)
        for t, sums, codes in zip(plan.tensors, errors, kept, strict=True)
    )
    return WriteResult(written.sha256, written.nbytes, outcomes)


def _tasks(
    plan: TensorPlan, encode: Callable[..., Encoded], measure_error: bool
) -> Iterator[Callable[[], tuple[int, Encoded]]]:
    for number, tensor in enumerate(plan.tensors):
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
) -> Encoded:
    if codes is not None and (blocks := codes.blocks(start, stop)) is not None:
        return Encoded(blocks, 0.0, 0.0, kept=True)
    rows = read(start, stop)
    where = f"{tensor.source.source}: tensor {tensor.source.name!r}"
    if not allow_nonfinite and count_nonfinite(rows):
        bad = sum(count_nonfinite(read(*part)) for part in tensor.row_ranges())
        raise InputError(
            f"{where}: {bad} of {tensor.source.size} values are NaN or infinite; "
            "the checkpoint is damaged (--allow-nonfinite writes them anyway)"
        )
    try:
        return encode_rows(rows, tensor.type, offset=tensor.offset, sample=sample)
    except LayoutError as error:
        raise InputError(f"{where}: {error}; choose another type, for this tensor with --tensor-type") from error
