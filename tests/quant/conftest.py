"""libggml as an oracle: the C library that llama.cpp runs, reached through xllamacpp's extension module."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from quantpress.quant.ggml.types import GGMLType, row_bytes


@dataclass(frozen=True, slots=True)
class LibGGML:
    """A few functions of the library on numpy arrays."""

    library: ctypes.CDLL

    def quantize(
        self, kind: GGMLType, rows: NDArray[np.float32], importance: NDArray[np.float32] | None = None
    ) -> NDArray[np.uint8]:
        rows = np.ascontiguousarray(rows, np.float32)
        weight = None if importance is None else np.ascontiguousarray(importance, np.float32)
        out = np.empty((len(rows), row_bytes(kind, rows.shape[1])), np.uint8)
        function = self.library.ggml_quantize_chunk
        function.restype = ctypes.c_size_t
        function.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
        written = function(
            kind.type_id,
            rows.ctypes.data,
            out.ctypes.data,
            0,
            *rows.shape,
            None if weight is None else weight.ctypes.data,
        )
        assert written == out.nbytes
        return out

    def dequantize(self, kind: GGMLType, data: NDArray[np.uint8], columns: int) -> NDArray[np.float32]:
        data = np.ascontiguousarray(data)
        out = np.empty((len(data), columns), np.float32)
        suffix = kind.name.replace("_K", "_k").lower().replace("_k", "_K")
        self._convert(f"dequantize_row_{suffix}", data, out)
        return out

    def to_bfloat16(self, values: NDArray[np.float32]) -> NDArray[np.uint16]:
        out = np.empty(values.size, np.uint16)
        self._convert("ggml_fp32_to_bf16_row_ref", values, out)
        return out

    def to_float16(self, values: NDArray[np.float32]) -> NDArray[np.uint16]:
        out = np.empty(values.size, np.uint16)
        self._convert("ggml_fp32_to_fp16_row", values, out)
        return out

    def describe(self, type_id: int) -> tuple[str, int, int]:
        """Name, weights per block, bytes per block."""
        name, block, size = (getattr(self.library, f"ggml_{what}") for what in ("type_name", "blck_size", "type_size"))
        name.restype, block.restype, size.restype = ctypes.c_char_p, ctypes.c_int64, ctypes.c_size_t
        return name(type_id).decode(), block(type_id), size(type_id)

    def _convert(self, name: str, source: NDArray[Any], target: NDArray[Any]) -> None:
        function: Callable[..., None] = getattr(self.library, name)
        pointers = ctypes.c_void_p(source.ctypes.data), ctypes.c_void_p(target.ctypes.data)
        function(*pointers, ctypes.c_int64(target.size))


@pytest.fixture(scope="session")
def libggml() -> LibGGML:
    """The library named by QUANTPRESS_LIBGGML, else the one inside xllamacpp."""
    path = os.environ.get("QUANTPRESS_LIBGGML")
    if path is None:
        spec = importlib.util.find_spec("xllamacpp")
        if spec is None or spec.origin is None:
            pytest.skip("libggml is not here: install the extra llama-cpp, or set QUANTPRESS_LIBGGML")
        path = str(next(Path(spec.origin).parent.glob("xllamacpp.*.so")))
    return LibGGML(ctypes.CDLL(path))
