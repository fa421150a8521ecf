"""The one thing every stage takes and gives: a mapping from names to tensors that are read only when asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from quantpress.quant.errors import InputError

if TYPE_CHECKING:
    from quantpress.convert.gguf.importance import ImportanceMatrix
    from quantpress.convert.lora.ledger import Adapted
    from quantpress.convert.quantized import CodesOrigin, LazyQuantized

Array = npt.NDArray[Any]

# safetensors' names of storage types -> the numpy type that holds them
DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "F64": np.dtype(np.float64),
        "F32": np.dtype(np.float32),
        "F16": np.dtype(np.float16),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
        "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
        "I64": np.dtype(np.int64),
        "I32": np.dtype(np.int32),
        "I16": np.dtype(np.int16),
        "I8": np.dtype(np.int8),
        "U64": np.dtype(np.uint64),
        "U32": np.dtype(np.uint32),
        "U16": np.dtype(np.uint16),
        "U8": np.dtype(np.uint8),
        "BOOL": np.dtype(np.bool_),
    }
)


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor whose name, shape and type are known and whose values are read on demand.

    Attributes:
        name: name in the checkpoint, Hugging Face's spelling.
        shape: outermost dimension first; `()` for a scalar.
        dtype: type of the values that `read` gives, a key of `DTYPES`.
        source: the file the values come from, for messages.
        read_rows: `(start, stop)` -> C-contiguous array of rows `[start, stop)` of the first dimension (a scalar has
            one row and is given as shape `()`). May be called twice, in any order and from several threads.
        wide_rows: the same rows in float32, before they were rounded to `dtype`; None where nothing was rounded. A
            merged tensor has it, so that what is computed from the merge is rounded once.
        inner: number in the first dimension -> what lies there as a tensor of its own, whose rows can be read; None
            where the file cannot give it so, or the tensor has fewer than three dimensions.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    source: str
    read_rows: Callable[[int, int], Array] = field(repr=False)
    wide_rows: Callable[[int, int], Array] | None = field(default=None, repr=False)
    inner: Callable[[int], LazyTensor] | None = field(default=None, repr=False)

    @property
    def rows(self) -> int:
        """Length of the first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the values that `read` gives."""
        return self.size * DTYPES[self.dtype].itemsize

    def read(self) -> Array:
        """Gives the whole tensor in its storage type."""
        return self.read_rows(0, self.rows)

    def exact_rows(self, start: int, stop: int) -> Array:
        """Gives rows as exact as they are known, in float32 or in the storage type."""
        return (self.wide_rows or self.read_rows)(start, stop)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that a checkpoint was opened from, with its size when it was opened."""

    path: Path
    nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """A model that is open but not read.

    Attributes:
        name: what to call the model: its folder, file or Hub id.
        config: contents of config.json (for a GGUF source: rebuilt in the same form).
        tensors: Hugging Face name -> tensor, in the order of the table of its family where that is known.
        tokenizer_files: file name -> bytes of tokenizer.json, tokenizer.model, tokenizer_config.json,
            special_tokens_map.json, added_tokens.json, vocab.json, merges.txt, chat_template.jinja and the like.
        generation_config: contents of generation_config.json, or empty.
        files: every file that was opened, for hashing and for the sidecar.
        metadata: GGUF metadata to keep when the source is a GGUF file (`general.*`, `tokenizer.*`), else empty.
            Values are `(type, value)` pairs as convert/gguf/container.py writes them.
        storage_types: name -> type in the file, for tensors that are stored in another type than `read` gives (the
            block types of a GGUF source).
        format: "safetensors", "torch" (weights-only .bin) or "gguf".
        quantized: name of a weight -> its codes, for the weights of a GPTQ, AWQ or compressed-tensors checkpoint;
            `tensors` has the same weights as the numbers they stand for.
        adapted: what adapters were merged into which base, and the ledger of their tensors; None where none were.
        codes_origin: how `quantized` was made, where that was done in this run; None for what was opened from files.
        importance: what errors in the columns of weights cost, where a stage measured it; GGUF's types are chosen and
            searched with it.
    """

    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, LazyTensor]
    tokenizer_files: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[SourceFile, ...] = ()
    metadata: Mapping[str, tuple[str, Any]] = field(default_factory=dict, repr=False)
    storage_types: Mapping[str, str] = field(default_factory=dict, repr=False)
    format: str = "safetensors"
    quantized: Mapping[str, LazyQuantized] = field(default_factory=dict, repr=False)
    adapted: Adapted | None = field(default=None, repr=False)
    codes_origin: CodesOrigin | None = field(default=None, repr=False)
    importance: ImportanceMatrix | None = field(default=None, repr=False)

    @property
    def parameters(self) -> int:
        """Number of values in all tensors."""
        return sum(tensor.size for tensor in self.tensors.values())

    def tensor(self, name: str) -> LazyTensor:
        """Gives a tensor by its Hugging Face name.

        Raises:
            InputError: there is no such tensor.
        """
        try:
            return self.tensors[name]
        except KeyError:
            raise InputError(f"{self.name}: tensor {name!r} is missing") from None
