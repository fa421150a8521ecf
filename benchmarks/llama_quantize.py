"""llama-quantize as a program: `llama_model_quantize` of a llama.cpp library, for benchmarks beside it.

    python benchmarks/llama_quantize.py LIBRARY IN.gguf OUT.gguf FTYPE [--threads N] [--imatrix FILE.gguf]

LIBRARY is libllama.so of llama.cpp 0.5.0 (the parameters' layout is that of its llama.h); FTYPE is a name as
llama-quantize takes it. An importance matrix is read by the `gguf` package: sums over counts, as llama-quantize does.
"""

from __future__ import annotations

import argparse
import ctypes as c
from pathlib import Path

import numpy as np

FTYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12,
    "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "Q2_K_S": 21, "IQ4_NL": 25,
    "IQ4_XS": 30, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37, "MXFP4_MOE": 38,
}  # fmt: skip


class Parameters(c.Structure):
    """llama_model_quantize_params."""

    _fields_ = [
        ("nthread", c.c_int32),
        ("ftype", c.c_int),
        ("output_tensor_type", c.c_int),
        ("token_embedding_type", c.c_int),
        *((name, c.c_bool) for name in ("allow_requantize", "quantize_output_tensor", "only_copy", "pure")),
        *((name, c.c_bool) for name in ("keep_split", "dry_run")),
        *((name, c.c_void_p) for name in ("imatrix", "kv_overrides", "tensor_types", "prune_layers")),
        ("max_buf_size", c.c_size_t),
    ]


class Entry(c.Structure):
    """llama_model_imatrix_data."""

    _fields_ = [("name", c.c_char_p), ("data", c.POINTER(c.c_float)), ("size", c.c_size_t)]


def load(library: Path) -> c.CDLL:
    """Loads a library with its backends, without its log."""
    for name in ("libggml.so", "libggml-base.so"):
        if (library.parent / name).exists():
            c.CDLL(str(library.parent / name), mode=c.RTLD_GLOBAL)
    found = c.CDLL(str(library), mode=c.RTLD_GLOBAL)
    found.llama_model_quantize_default_params.restype = Parameters
    found.llama_model_quantize.argtypes = [c.c_char_p, c.c_char_p, c.POINTER(Parameters)]
    found.llama_model_quantize.restype = c.c_uint32
    return found


def importance(path: Path) -> tuple[object, list[object]]:
    """Reads an importance matrix: the entries as C wants them, and what must live as long."""
    import gguf

    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    entries, kept = [], []
    for name, sums in tensors.items():
        if name.endswith(".in_sum2"):
            stem = name.removesuffix(".in_sum2")
            counts = np.asarray(tensors[f"{stem}.counts"], np.float32).reshape(-1, 1)
            rows = np.asarray(sums, np.float32).reshape(len(counts), -1)
            values = np.where(counts > 0, rows / np.maximum(counts, 1), np.float32(1)).astype(np.float32).reshape(-1)
            kept.append(values)
            entries.append(Entry(stem.encode(), values.ctypes.data_as(c.POINTER(c.c_float)), values.size))
    array = (Entry * (len(entries) + 1))(*entries, Entry(None, None, 0))
    return array, [array, *kept]


def quantize(
    library: Path, source: Path, target: Path, ftype: str, threads: int = 1, imatrix: Path | None = None
) -> None:
    """Quantizes a file.

    Raises:
        SystemExit: llama.cpp could not.
    """
    found = load(library)
    found.llama_backend_init()
    parameters = found.llama_model_quantize_default_params()
    parameters.nthread, parameters.ftype = threads, FTYPES[ftype.upper()]
    kept: list[object] = []
    if imatrix is not None:
        array, kept = importance(imatrix)
        parameters.imatrix = c.cast(array, c.c_void_p)  # type: ignore[arg-type]
    if found.llama_model_quantize(str(source).encode(), str(target).encode(), c.byref(parameters)):
        raise SystemExit(f"llama.cpp could not write {target} as {ftype}")
    del kept


def main() -> None:
    """Does what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("ftype")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--imatrix", type=Path)
    given = parser.parse_args()
    quantize(given.library, given.source, given.target, given.ftype, given.threads, given.imatrix)


if __name__ == "__main__":
    main()
