"""What a GGUF file will hold: every tensor of it, and where its values come from. Touches no weight."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Layout, Role
from quantpress.convert.checkpoint import Array, LazyTensor
from quantpress.convert.gguf.codes import codes_note
from quantpress.convert.gguf.heads import by_heads
from quantpress.convert.gguf.mixture import Choice, Matrix, Mixture, TypeOptions, resolve_outtype
from quantpress.convert.gguf.mixture_rules import ModelFacts
from quantpress.convert.gguf.planned import OfExperts, PlannedTensor, TensorPlan
from quantpress.convert.gguf.positions import from_first
from quantpress.convert.gguf.rows import row_order
from quantpress.convert.gguf.scaled import scaled
from quantpress.convert.gguf.stacks import is_stack, router_vector, stack_experts
from quantpress.convert.preflight import Binding
from quantpress.quant.errors import InputError, UsageError
from quantpress.quant.ggml.from_codes import FROM_CODES
from quantpress.quant.ggml.types import ggml_type, row_bytes

if TYPE_CHECKING:
    from quantpress.convert.gguf.importance import ImportanceMatrix
    from quantpress.convert.quantized import LazyQuantized

__all__ = ["PlannedTensor", "TensorPlan", "plan_tensors"]

_NO_CODES: Mapping[str, LazyQuantized] = MappingProxyType({})
_NO_BLOCKS: Mapping[str, LazyTensor] = MappingProxyType({})


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
        bindings: the table bound to a checkpoint, in the order of the file; experts one by one or as `stack_experts`
            gives them.
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
    found = _with_head(list(map(router_vector, stack_experts(bindings))), arch, hyper)
    rows = [scaled(from_first(by_heads(binding, hyper), hyper), hyper) for binding in found]
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
    """Gives what the rules ask of a model."""
    experts = 0 if hyper.experts is None else hyper.experts.count
    return ModelFacts(arch.gguf, hyper.layers, hyper.heads, hyper.kv_heads, experts)


def _matrix(binding: Binding) -> Matrix:
    row, layer, tensor = binding
    shape = (*tensor.shape[:-2], *tensor.shape[:-3:-1]) if _transposed(binding) else tensor.shape
    return Matrix(row.gguf.format(layer=layer), row.role, shape, tensor.dtype)


def _transposed(binding: Binding) -> bool:
    row, _, tensor = binding
    return row.layout is Layout.TRANSPOSED and len(tensor.shape) == 2 + is_stack(binding)


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
    known = {} if row.offset or row.gguf_heads else quantized
    codes = known.get(tensor.name)  # of the first expert: all are quantized alike
    note = choice.note or ("" if codes is None else codes_note(codes.form, choice.type))
    if choice.type not in FROM_CODES:
        known = {}
    planned = PlannedTensor(
        matrix.name, shape, choice.type, nbytes, note, tensor, row_order(arch, row, hyper), _transposed(binding),
        row.offset, importance=weights,
    )  # fmt: skip
    if is_stack(binding):
        return replace(planned, experts=OfExperts(known, blocks))
    return replace(planned, codes=known.get(tensor.name), blocks=blocks.get(tensor.name))
