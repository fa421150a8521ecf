"""What a GGUF file will hold: every tensor of it, and where its values come from. Touches no weight."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Layout, Role
from quantpress.convert.checkpoint import Array, LazyTensor
from quantpress.convert.gguf.codes import CodeRows, codes_note
from quantpress.convert.gguf.container import MetadataValue
from quantpress.convert.gguf.file_types import FILE_TYPES
from quantpress.convert.gguf.mixture import Choice, Matrix, Mixture, TypeOptions, resolve_outtype
from quantpress.convert.gguf.mixture_rules import MODEL_RULES, ModelFacts
from quantpress.convert.gguf.rows import IN_PLACE, ReadRows, RowOrder, Transposed, row_order
from quantpress.convert.gguf.writer import FilePlan, Slot
from quantpress.convert.preflight import Binding
from quantpress.quant.errors import InputError, UsageError
from quantpress.quant.ggml.from_codes import FROM_CODES
from quantpress.quant.ggml.types import ggml_type, row_bytes

if TYPE_CHECKING:
    from quantpress.convert.gguf.importance import ImportanceMatrix
    from quantpress.convert.quantized import LazyQuantized

__all__ = ["PlannedTensor", "TensorPlan", "plan_tensors"]

_CHUNK_VALUES = 1 << 20  # values that one task reads and encodes: 2 MB of bf16, and a few MB beside it
_NO_CODES: Mapping[str, LazyQuantized] = MappingProxyType({})
_NO_BLOCKS: Mapping[str, LazyTensor] = MappingProxyType({})


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
        importance: (E, K) float32, what an error of a column costs, for each expert; None where nothing is known.
        blocks: (N, row bytes) uint8, rows in the order of the source: found before by a method, to be written as they
            are; None where the values are to be encoded.
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
    importance: Array | None = field(default=None, repr=False)
    blocks: LazyTensor | None = field(default=None, repr=False)

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
    """Every tensor of a file, in its order, the type that the file is named after, and whose rules chose the types."""

    outtype: str
    tensors: tuple[PlannedTensor, ...]
    rules: str = MODEL_RULES

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


def plan_tensors(
    bindings: Iterable[Binding],
    arch: ArchSpec,
    hyper: Hyperparameters,
    options: TypeOptions,
    *,
    quantized: Mapping[str, LazyQuantized] = _NO_CODES,
    importance: ImportanceMatrix | None = None,
    blocks: Mapping[str, LazyTensor] = _NO_BLOCKS,
    has_importance: bool | None = None,
) -> TensorPlan:
    """Plans the tensors of a GGUF file without reading a weight.

    Args:
        bindings: the table bound to a checkpoint, in the order of the file.
        arch: the family.
        hyper: its sizes.
        options: which types are asked for.
        quantized: `Checkpoint.quantized`; where a type can hold such codes, they are written as they are.
        importance: what errors cost, by the tensors' names in GGUF.
        blocks: name of a weight in the checkpoint -> its blocks, see `PlannedTensor.blocks`; their type must be the one
            that the mixture gives.
        has_importance: plan as if there were one though it is not here yet, because it is measured later; None:
            whether `importance` is given.

    Raises:
        UsageError: an option names an unknown type, a pattern meets no tensor, or a type needs an importance.
        InputError: the head is missing and not tied.
    """
    rows = _with_head(list(bindings), arch, hyper)
    outtype = resolve_outtype(options.outtype, (tensor for _, _, tensor in rows))
    expected = importance is not None if has_importance is None else has_importance
    mixture = Mixture(options, outtype, _facts(arch, hyper), importance=expected)
    matrices = [_matrix(binding) for binding in rows]
    choices = mixture.choose(matrices)
    planned = [_plan_extra(name, values) for name, values in arch.gguf_tensors(hyper).items()]
    for binding, matrix in zip(rows, matrices, strict=True):
        choice = choices[matrix.name]
        weights = None if importance is None else importance.of(matrix.name, matrix.shape)
        known = weights is not None or binding[2].name in blocks or (importance is None and expected)
        if choice.needs_importance and not known:
            raise _without_importance(outtype, matrix.name, choice.type)
        planned.append(_plan_row(arch, hyper, binding, matrix, choice, quantized, weights, blocks))
    return TensorPlan(outtype, tuple(planned))


def _facts(arch: ArchSpec, hyper: Hyperparameters) -> ModelFacts:
    """Gives what the rules ask of a model; none of the families here has experts."""
    return ModelFacts(arch.gguf, hyper.layers, hyper.heads, hyper.kv_heads)


def _matrix(binding: Binding) -> Matrix:
    row, layer, tensor = binding
    shape = tensor.shape[::-1] if _transposed(binding) else tensor.shape
    return Matrix(row.gguf.format(layer=layer), row.role, shape, tensor.dtype)


def _transposed(binding: Binding) -> bool:
    row, _, tensor = binding
    return row.layout is Layout.TRANSPOSED and len(tensor.shape) == 2


def _without_importance(outtype: str, name: str, kind: str) -> UsageError:
    return UsageError(
        f"--outtype {outtype.lower()}: tensor {name!r} as {kind} is garbage without an importance matrix, and there is "
        "none of it; give one with --imatrix, or choose q2_k"
    )


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
    arch: ArchSpec,
    hyper: Hyperparameters,
    binding: Binding,
    matrix: Matrix,
    choice: Choice,
    quantized: Mapping[str, LazyQuantized],
    weights: Array | None,
    blocks: Mapping[str, LazyTensor],
) -> PlannedTensor:
    row, _, tensor = binding
    shape = matrix.shape
    nbytes = math.prod(shape[:-1]) * row_bytes(ggml_type(choice.type), shape[-1] if shape else 1)
    codes = None if row.offset else quantized.get(tensor.name)
    note = choice.note or ("" if codes is None else codes_note(codes.form, choice.type))
    if choice.type not in FROM_CODES:
        codes = None
    return PlannedTensor(
        matrix.name, shape, choice.type, nbytes, note, tensor, row_order(arch, row, hyper), _transposed(binding),
        row.offset, codes, weights, blocks.get(tensor.name),
    )  # fmt: skip
