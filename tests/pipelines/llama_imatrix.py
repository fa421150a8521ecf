"""What llama.cpp's graph multiplies weights with: a program that collects as llama-imatrix does, through ctypes.

`python -m tests.pipelines.llama_imatrix LIBRARY MODEL.gguf TOKENS.npy OUT.npz`, tokens being (windows, length) int32. A
process of its own, for llama.cpp may abort. The callback that llama.cpp's scheduler offers (`cb_eval` in
`llama_context_params`) is told each tensor after it was computed; see tools/imatrix/imatrix.cpp, `collect_imatrix`.
Sums here are of float64.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.pipelines.llama_cpp_layouts import _context_layouts, context_params, model_params
from quantpress.pipelines.llama_cpp_worker import Engine

_POINTER = 8  # bytes
_NE, _NB = 16, 48  # ggml_tensor: type, buffer, ne[4], nb[4], ...
_BEFORE_NAME = 13  # pointers before the name: src[10], view_src, view_offs, data
_F32 = 0


class Collector:
    """Sums of squares by the names of weights."""

    def __init__(self, library: Any) -> None:
        self.sums: dict[str, NDArray[np.float64]] = {}
        self.counts: dict[str, int] = {}
        self._describe, self._name = library.ggml_op_desc, library.ggml_get_name
        self._describe.restype, self._name.restype = ctypes.c_char_p, ctypes.c_void_p
        self._describe.argtypes = self._name.argtypes = [ctypes.c_void_p]

    def __call__(self, tensor: int, ask: bool, _data: int | None) -> bool:
        if self._describe(tensor) != b"MUL_MAT":
            return not ask
        place = self._name(tensor) - _BEFORE_NAME * _POINTER
        weight, values = struct.unpack("<2Q", ctypes.string_at(place, 2 * _POINTER))
        name = ctypes.string_at(self._name(weight)).decode()
        if not name.startswith("blk.") and name not in ("output.weight", "token_embd.weight"):
            return not ask
        if not ask:
            self._add(name, self._rows(values))
        return True

    def _rows(self, tensor: int) -> NDArray[np.float64]:
        assert ctypes.c_int32.from_address(tensor).value == _F32
        ne = struct.unpack("<4q", ctypes.string_at(tensor + _NE, 32))
        nb = struct.unpack("<4Q", ctypes.string_at(tensor + _NB, 32))
        assert ne[2:] == (1, 1)
        assert nb[:2] == (4, 4 * ne[0])
        (data,) = struct.unpack("<Q", ctypes.string_at(self._name(tensor) - _POINTER, _POINTER))
        raw = ctypes.string_at(data, 4 * ne[0] * ne[1])
        return np.frombuffer(raw, np.float32).reshape(ne[1], ne[0]).astype(np.float64)

    def _add(self, name: str, rows: NDArray[np.float64]) -> None:
        self.sums[name] = self.sums.get(name, 0) + np.square(rows).sum(0)
        self.counts[name] = self.counts.get(name, 0) + len(rows)


def collect(library: Path, model: Path, windows: NDArray[np.int32]) -> Collector:
    """Runs a model in F32 on windows of tokens, each from an empty state."""
    engine = Engine()
    length = windows.shape[1]
    ((_, blobs),) = engine.open({"library": str(library)}, b"")
    defaults = (blobs[: len(blobs) // 2], blobs[len(blobs) // 2 :])
    blob, offset = model_params(defaults[0], vocab_only=False)
    list(engine.load({"path": str(model), "devices_offset": offset}, blob))
    made = bytearray(context_params(defaults[1], context=length, batch=length, threads=1))
    (layout,) = _context_layouts(defaults[1])
    collector = Collector(engine._libraries[0])
    callback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)(collector)
    address = ctypes.cast(callback, ctypes.c_void_p).value
    struct.pack_into("<Q", made, layout["type_k"] - 2 * _POINTER, address)
    list(engine.context({}, bytes(made)))
    for window in windows:
        list(engine.logits({"first": 0}, window.tobytes()))
    return collector


if __name__ == "__main__":
    found = collect(Path(sys.argv[1]), Path(sys.argv[2]), np.load(sys.argv[3]))
    np.savez(sys.argv[4], **found.sums, **{f"counts of {name}": count for name, count in found.counts.items()})
    os._exit(0)  # skips the library's own tear-down, which has crashed in some releases
