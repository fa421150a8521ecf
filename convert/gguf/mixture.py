"""Which type each tensor of a GGUF file gets.

The rules are those of llama.cpp: for f32, f16, bf16 and q8_0 what its converter does (conversion/base.py,
prepare_tensors), for the other types what llama-quantize does (src/llama-quant.cpp, llama_tensor_get_type).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from quantpress.convert.arch.spec import Role
from quantpress.convert.checkpoint import LazyTensor
from quantpress.convert.gguf.file_types import FILE_TYPES
from quantpress.quant.errors import UsageError
from quantpress.quant.ggml.types import ggml_type

AUTO = "AUTO"
FLOATS = ("F32", "F16", "BF16")
_CONVERTER_TYPES = (*FLOATS, "Q8_0")  # one type for every matrix; the others keep the head finer
_QUANTIZABLE = (Role.EMBEDDING, Role.HEAD, Role.LINEAR)
_K_BLOCK = 256  # values of a Q6_K block


@dataclass(frozen=True, slots=True)
class TypeOptions:
    """What a user asked for; names of types in any case.

    Attributes:
        outtype: one of `FILE_TYPES`, or "auto" for the 16-bit type of the first matrix.
        tensor_types: regular expression and type; the first that is found in a tensor's GGUF name wins.
        output_tensor_type: type of output.weight, or of the embedding where that is the head as well.
        token_embedding_type: type of token_embd.weight.
        leave_output_tensor: output.weight keeps the type it is stored in.
        pure: every matrix gets `outtype`.
    """

    outtype: str = "auto"
    tensor_types: tuple[tuple[str, str], ...] = ()
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    leave_output_tensor: bool = False
    pure: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """A type, and why it is not the one that was asked for."""

    type: str
    note: str = ""


def type_name(text: str, option: str) -> str:
    """Gives the canonical name of a type that can be written.

    Raises:
        UsageError: there is no such type; `option` says where it was given.
    """
    name = text.strip().upper()
    if name not in FILE_TYPES:
        known = ", ".join(name.lower() for name in FILE_TYPES)
        raise UsageError(f"{option}: type {text!r} is not known or cannot be written yet; choose one of {known}")
    return name


def resolve_outtype(outtype: str, tensors: Iterable[LazyTensor]) -> str:
    """Gives the type that --outtype means for these tensors; "auto" is the 16-bit type that comes first, or F16."""
    if outtype.strip().upper() != AUTO:
        return type_name(outtype, "--outtype")
    matrices = (tensor.dtype for tensor in tensors if len(tensor.shape) > 1)
    return next((dtype for dtype in matrices if dtype in ("F16", "BF16")), "F16")


class Mixture:
    """The rules for one file, with the user's options checked.

    Args:
        options: what was asked for.
        outtype: what `resolve_outtype` made of `options.outtype`.
        tied: the file will hold no output.weight, so the embedding is the head as well.

    Raises:
        UsageError: an option names an unknown type or no regular expression.
    """

    def __init__(self, options: TypeOptions, outtype: str, *, tied: bool) -> None:
        self.outtype, self.tied = outtype, tied
        self._options = options
        self._head = options.output_tensor_type and type_name(options.output_tensor_type, "--output-tensor-type")
        self._embedding = options.token_embedding_type and type_name(
            options.token_embedding_type, "--token-embedding-type"
        )
        self._patterns = [_pattern(pattern, kind) for pattern, kind in options.tensor_types]
        self._unused = {pattern.pattern for pattern, _ in self._patterns}

    def choose(self, name: str, role: Role, shape: Sequence[int], stored: str) -> Choice:
        """Gives the type of a tensor.

        Args:
            name: in GGUF.
            role: what it is for.
            shape: outermost dimension first, as in the file.
            stored: type it is stored in, a key of `DTYPES`.
        """
        # Every runtime reads vectors, norms and learned positions as float32 only.
        if role not in _QUANTIZABLE or len(shape) < 2:
            return Choice("F32")
        choice = self._wanted(name, role, shape[-1], stored)
        block = ggml_type(choice.type).block_size
        if shape[-1] % block:
            return Choice(
                "F16",
                f"rows of {shape[-1]} values do not divide into blocks of {block} of {choice.type}: written as F16",
            )
        return choice

    def check_used(self) -> None:
        """Refuses patterns that met no tensor.

        Raises:
            UsageError: naming the first of them.
        """
        for pattern, _ in self._patterns:
            if pattern.pattern in self._unused:
                raise UsageError(f"--tensor-type: {pattern.pattern!r} is found in no name of a matrix")

    def _wanted(self, name: str, role: Role, width: int, stored: str) -> Choice:
        is_head = role is Role.HEAD or (role is Role.EMBEDDING and self.tied)
        manual = self._matched(name)
        if role is Role.EMBEDDING and self._embedding:
            return Choice(self._embedding)
        if role is Role.HEAD and self._head:
            return Choice(self._head)
        if role is Role.HEAD and self._options.leave_output_tensor:
            return Choice(_as_stored(stored), "left as it is stored")
        if manual:
            return Choice(manual)
        if is_head and self._head:
            return Choice(self._head)
        if is_head and self.outtype not in _CONVERTER_TYPES and not self._options.pure:
            return _head_choice(width)
        return Choice(self.outtype)

    def _matched(self, name: str) -> str:
        found = ""
        for pattern, kind in self._patterns:
            if pattern.search(name):
                self._unused.discard(pattern.pattern)
                found = found or kind
        return found


def _head_choice(width: int) -> Choice:
    """What llama-quantize makes of the head: Q6_K, or Q8_0 where its rows do not divide into blocks of 256."""
    if width % _K_BLOCK:
        return Choice("Q8_0")
    return Choice("Q8_0", "llama-quantize would write Q6_K, which cannot be written yet; Q8_0 is larger and finer")


def _as_stored(stored: str) -> str:
    return {"F16": "F16", "BF16": "BF16"}.get(stored, "F32")


def _pattern(pattern: str, kind: str) -> tuple[re.Pattern[str], str]:
    try:
        return re.compile(pattern), type_name(kind, f"--tensor-type {pattern}")
    except re.error as error:
        raise UsageError(f"--tensor-type: {pattern!r} is not a regular expression: {error}") from error
