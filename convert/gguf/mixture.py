"""Which type each tensor of a GGUF file gets.

The rules are those of llama.cpp: for f32, f16, bf16 and q8_0 what its converter does (conversion/base.py,
prepare_tensors), for the other types what llama-quantize does (src/llama-quant.cpp, llama_tensor_get_type). What a rule
says may depend on the tensors before it, so all of a file are chosen together.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from quantpress.convert.arch.spec import Role
from quantpress.convert.checkpoint import LazyTensor
from quantpress.convert.gguf.file_types import ALIASES, FILE_TYPES
from quantpress.convert.gguf.mixture_rules import (
    BASE,
    FALLBACKS,
    NEEDS_IMPORTANCE,
    Category,
    ModelFacts,
    Place,
    category_of,
    rule_type,
)
from quantpress.quant.errors import UsageError
from quantpress.quant.ggml.codec import QUANTIZED
from quantpress.quant.ggml.types import GGML_TYPES, ggml_type

__all__ = ["AUTO", "FLOATS", "Choice", "Matrix", "Mixture", "TypeOptions", "resolve_outtype", "type_name"]

AUTO = "AUTO"
FLOATS = ("F32", "F16", "BF16")
_CONVERTER_TYPES = (*FLOATS, "Q8_0")  # one type for every matrix; the others follow the rules of llama-quantize
_TENSOR_TYPES = (*FLOATS, *QUANTIZED)
_QUANTIZABLE = (Role.EMBEDDING, Role.HEAD, Role.LINEAR)
_ROUTER = "ffn_gate_inp.weight"  # llama.cpp's converter and llama-quantize leave it in F32
_LAYER = re.compile(r"blk\.(\d+)\.")
_ENDS = (Category.HEAD, Category.EMBEDDING)
_COUNTED = (Category.VALUES, Category.DOWN)


@dataclass(frozen=True, slots=True)
class TypeOptions:
    """What a user asked for; names of types in any case.

    Attributes:
        outtype: one of `FILE_TYPES` or `ALIASES`, or "auto" for the 16-bit type of the first matrix.
        tensor_types: regular expression and type; the first that is found in a tensor's GGUF name wins.
        output_tensor_type: type of output.weight, or of the embedding where that is the head as well.
        token_embedding_type: type of token_embd.weight.
        leave_output_tensor: output.weight keeps the type it is stored in.
        pure: every matrix gets the type that `outtype` is named after.
    """

    outtype: str = "auto"
    tensor_types: tuple[tuple[str, str], ...] = ()
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    leave_output_tensor: bool = False
    pure: bool = False


@dataclass(frozen=True, slots=True)
class Matrix:
    """A tensor to choose a type for.

    Attributes:
        name: in GGUF.
        role: what it is for.
        shape: outermost dimension first, as in the file: (N, K), or (E, N, K) for experts.
        stored: type it is stored in, a key of `DTYPES`.
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    stored: str


@dataclass(frozen=True, slots=True)
class Choice:
    """A type, why it is not the one that was asked for, and whether it is garbage without an importance matrix."""

    type: str
    note: str = ""
    needs_importance: bool = False


def type_name(text: str, option: str) -> str:
    """Gives the canonical name of a type that a tensor can be written in.

    Raises:
        UsageError: there is no such type, or no quantizer for it; `option` says where it was given.
    """
    name = text.strip().upper()
    if name in _TENSOR_TYPES:
        return name
    known = ", ".join(name.lower() for name in _TENSOR_TYPES)
    if name in FILE_TYPES:
        raise UsageError(f"{option}: {text!r} is a mixture of types; a tensor has one of {known}")
    if name in GGML_TYPES:
        raise UsageError(f"{option}: type {text!r} cannot be written yet; choose one of {known}")
    raise UsageError(f"{option}: type {text!r} is not known; choose one of {known}")


def resolve_outtype(outtype: str, tensors: Iterable[LazyTensor]) -> str:
    """Gives the type that --outtype means for these tensors; "auto" is the 16-bit type that comes first, or F16.

    Raises:
        UsageError: there is no such type, or it cannot be written.
    """
    name = outtype.strip().upper()
    if name != AUTO:
        name = ALIASES.get(name, name)
        if name not in FILE_TYPES:
            known = ", ".join(name.lower() for name in FILE_TYPES)
            raise UsageError(
                f"--outtype: type {outtype!r} is not known or cannot be written yet; choose one of {known}"
            )
        return name
    matrices = (tensor.dtype for tensor in tensors if len(tensor.shape) > 1)
    return next((dtype for dtype in matrices if dtype in ("F16", "BF16")), "F16")


class Mixture:
    """The rules for one file, with the user's options checked.

    Args:
        options: what was asked for.
        outtype: what `resolve_outtype` made of `options.outtype`.
        model: what the rules ask of it.
        importance: whether an importance matrix is given; some rules ask for that.

    Raises:
        UsageError: an option names an unknown type or no regular expression.
    """

    def __init__(self, options: TypeOptions, outtype: str, model: ModelFacts, *, importance: bool = False) -> None:
        self.outtype, self.model, self.importance = outtype, model, importance
        self.base = BASE.get(outtype, outtype)
        self._options = options
        self._head = options.output_tensor_type and type_name(options.output_tensor_type, "--output-tensor-type")
        self._embedding = options.token_embedding_type and type_name(
            options.token_embedding_type, "--token-embedding-type"
        )
        self._patterns = [_pattern(pattern, kind) for pattern, kind in options.tensor_types]

    def choose(self, matrices: Sequence[Matrix]) -> dict[str, Choice]:
        """Gives the type of every tensor of a file, by its name.

        Args:
            matrices: all of them, also the vectors, in any order.

        Raises:
            UsageError: a pattern is found in no name of a matrix.
        """
        self._check_used(matrices)
        categories = {matrix.name: category_of(matrix.name) for matrix in matrices}
        values = sum(category is Category.VALUES for category in categories.values())
        state = _Walk(Category.HEAD not in categories.values(), values)
        choices = {}
        for matrix in sorted(matrices, key=_llama_cpp_order):
            choices[matrix.name] = self._choose(matrix, categories[matrix.name], state)
        return choices

    def _choose(self, matrix: Matrix, category: Category, state: _Walk) -> Choice:
        # Every runtime reads vectors, norms, learned positions and routers as float32 only.
        if not _is_matrix(matrix):
            return Choice("F32")
        choice = self._wanted(matrix, category, state)
        note, width = choice.note, matrix.shape[-1]
        kind = _fitting(choice.type, width)
        if kind != choice.type:
            size = ggml_type(choice.type).block_size
            note = f"rows of {width} values do not divide into blocks of {size} of {choice.type}: written as {kind}"
        elif self.outtype == "MXFP4_MOE" and not note and kind == "Q8_0" and self.model.experts < 2:
            note = "a model without experts: MXFP4_MOE writes Q8_0, as in llama-quantize"
        needs = category not in _ENDS and NEEDS_IMPORTANCE.get(self.outtype) == kind
        return Choice(kind, note, needs)

    def _wanted(self, matrix: Matrix, category: Category, state: _Walk) -> Choice:
        if matrix.role is Role.EMBEDDING and self._embedding:
            return Choice(self._embedding)
        if matrix.role is Role.HEAD and self._options.leave_output_tensor:
            return Choice(_as_stored(matrix.stored), "left as it is stored")
        if matrix.role is Role.HEAD and self._head:
            return Choice(self._head)
        if self.outtype not in _CONVERTER_TYPES and math.prod(matrix.shape[:-1]) == 1:
            return Choice(_as_stored(matrix.stored), "llama-quantize leaves a matrix of one row as it is stored")
        # A tensor that is named is not counted by the rules.
        manual = next((kind for pattern, kind in self._patterns if pattern.search(matrix.name)), None)
        if manual:
            return Choice(manual)
        is_head = category is Category.HEAD or (category is Category.EMBEDDING and state.tied)
        if self._options.pure:
            ignored = bool(is_head and self._head)
            return Choice(self.base, "--pure: --output-tensor-type does not reach a tied embedding" if ignored else "")
        if is_head:
            return Choice(self._head or self._head_type())
        return Choice(self.base if self.outtype in _CONVERTER_TYPES else self._by_rules(matrix, category, state))

    def _head_type(self) -> str:
        if self.outtype in _CONVERTER_TYPES:
            return self.outtype
        return "Q8_0" if self.model.falcon or self.outtype == "MXFP4_MOE" else "Q6_K"

    def _by_rules(self, matrix: Matrix, category: Category, state: _Walk) -> str:
        """Follows llama_tensor_get_type_impl for what is not the head."""
        if self.outtype == "MXFP4_MOE":
            return "MXFP4" if len(matrix.shape) == 3 and matrix.shape[0] > 1 else "Q8_0"
        index, count = state.counted[category], self.model.layers
        if category in _COUNTED:
            state.counted[category] += 1
        if category is Category.VALUES:
            count = state.values
        elif self.model.experts > 1 and (found := _LAYER.match(matrix.name)):
            index = int(found[1])  # layers have several such matrices, or none
        kind = rule_type(self.outtype, category, Place(index, count, self.model, self.importance)) or self.base
        if category is Category.VALUES and self.model.large and kind in ("Q3_K", "Q4_K"):
            kind = "Q5_K"
        if category in (Category.VALUES, Category.KEYS) and self.model.experts == 8:
            kind = "Q8_0"
        return kind

    def _check_used(self, matrices: Sequence[Matrix]) -> None:
        names = [matrix.name for matrix in matrices if _is_matrix(matrix)]
        for pattern, _ in self._patterns:
            if not any(pattern.search(name) for name in names):
                raise UsageError(f"--tensor-type: {pattern.pattern!r} is found in no name of a matrix")


class _Walk:
    """What the rules know of a file while its tensors are gone through: is it tied, and how many were there before."""

    def __init__(self, tied: bool, values: int) -> None:
        self.tied, self.values = tied, values
        self.counted: Counter[Category] = Counter()


def _llama_cpp_order(matrix: Matrix) -> tuple[int, str]:
    """By layer and name; what belongs to no layer comes first (llama_model_loader, weight_name_comparer)."""
    found = _LAYER.match(matrix.name)
    return int(found[1]) if found else -1, matrix.name


def _is_matrix(matrix: Matrix) -> bool:
    return matrix.role in _QUANTIZABLE and len(matrix.shape) > 1 and _ROUTER not in matrix.name


def _fitting(kind: str, width: int) -> str:
    """Gives the type itself, or what llama-quantize takes where rows do not divide into its blocks."""
    if width % ggml_type(kind).block_size == 0:
        return kind
    smaller = FALLBACKS.get(kind, kind)
    return "F16" if width % ggml_type(smaller).block_size else smaller


def _as_stored(stored: str) -> str:
    return {"F16": "F16", "BF16": "BF16"}.get(stored, "F32")


def _pattern(pattern: str, kind: str) -> tuple[re.Pattern[str], str]:
    try:
        return re.compile(pattern), type_name(kind, f"--tensor-type {pattern}")
    except re.error as error:
        raise UsageError(f"--tensor-type: {pattern!r} is not a regular expression: {error}") from error
