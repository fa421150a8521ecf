"""Where the few parameters we set live inside llama.cpp's parameter structures, for every release since 2025.

``llama_model_params`` and ``llama_context_params`` (include/llama.h) gain and lose fields between releases and carry
no version. The structures are therefore handled as bytes: the library fills in its own defaults, the known field
orders are compared with those defaults (context 512, batch 2048, micro-batch 512, 4 threads, F16 cache ...), and
only the layout whose every default is where it should be is used. When none fits, the library is refused: a wrong
offset would silently change what is measured.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from quantpress.quant.errors import OutputError

__all__ = ["context_params", "model_params"]

_POINTER_NBYTES = 8  # 32-bit platforms are not supported
_GGML_TYPE_F32 = 0
_GGML_TYPE_F16 = 1
_FLASH_ATTENTION_OFF = 0
_SPLIT_BY_LAYER = 1


@dataclass(frozen=True, slots=True)
class _Field:
    """One 4-byte scalar: its name, struct code and the defaults that releases give it."""

    name: str
    code: str
    defaults: tuple[float, ...]


def _ints(*pairs: tuple[str, tuple[int, ...]]) -> tuple[_Field, ...]:
    return tuple(_Field(name, "i", defaults) for name, defaults in pairs)


def _floats(*pairs: tuple[str, tuple[float, ...]]) -> tuple[_Field, ...]:
    return tuple(_Field(name, "f", defaults) for name, defaults in pairs)


def _match(blob: bytes, start: int, fields: tuple[_Field, ...]) -> dict[str, int] | None:
    """Offsets by field name when every default is in its place, else None."""
    offsets = {}
    for index, field in enumerate(fields):
        offset = start + 4 * index
        (value,) = struct.unpack_from("<" + field.code, blob, offset)
        if value not in field.defaults:
            return None
        offsets[field.name] = offset
    return offsets


def _align(offset: int) -> int:
    return -(-offset // _POINTER_NBYTES) * _POINTER_NBYTES


def _nulls(blob: bytes, start: int, count: int) -> bool:
    return not any(blob[start : start + count * _POINTER_NBYTES])


_SIZES = _ints(("n_ctx", (512,)), ("n_batch", (2048,)), ("n_ubatch", (512,)), ("n_seq_max", (1,)))
# Fields that 2026 releases added one after another, in this order.
_COUNTS = _ints(("n_rs_seq", (0,)), ("n_outputs_max", (0,)), ("n_outputs_max_per_seq", (0, 1)))
_THREADS = _ints(("n_threads", (4,)), ("n_threads_batch", (4,)))
_CONTEXT_TYPE = _ints(("ctx_type", (0,)))
_ENUMS = _ints(("rope_scaling_type", (-1,)), ("pooling_type", (-1,)), ("attention_type", (-1,)))
_FLASH = _ints(("flash_attn_type", (-1,)))  # until August 2025 a boolean at the end whose default is off
_ROPE = (
    *_floats(
        ("rope_freq_base", (0.0,)),
        ("rope_freq_scale", (0.0,)),
        ("yarn_ext_factor", (-1.0,)),
        ("yarn_attn_factor", (1.0, -1.0)),
        ("yarn_beta_fast", (32.0, -1.0)),
        ("yarn_beta_slow", (1.0, -1.0)),
    ),
    *_ints(("yarn_orig_ctx", (0,))),
    *_floats(("defrag_thold", (-1.0, 0.0))),
)
_CACHE = _ints(("type_k", (_GGML_TYPE_F16,)), ("type_v", (_GGML_TYPE_F16,)))


def _context_layouts(blob: bytes) -> Iterator[dict[str, int]]:
    """Every known field order of llama_context_params that the defaults agree with."""
    for counts, has_type, has_flash in itertools.product(range(len(_COUNTS) + 1), (False, True), (False, True)):
        head = _SIZES + _COUNTS[:counts] + _THREADS + (_CONTEXT_TYPE if has_type else ()) + _ENUMS
        head += (_FLASH if has_flash else ()) + _ROPE
        offsets = _match(blob, 0, head)
        callbacks = _align(4 * len(head))  # cb_eval and its user data
        cache = _match(blob, callbacks + 2 * _POINTER_NBYTES, _CACHE)
        if offsets is not None and cache is not None and _nulls(blob, callbacks, 2):
            yield offsets | cache


def context_params(defaults: bytes, *, context: int, batch: int, threads: int, pooling: int | None = None) -> bytes:
    """Set what a reproducible, float32-exact run needs in the library's own default context parameters.

    Both caches are F32 and flash attention is off, for an F16 cache rounds keys and values and flash attention
    does so whatever the cache, which a comparison of model files must not see. Mean KL divergence of stories260K in
    F32 to its source: 3e-12 so, 3e-6 with an F16 cache, 2e-6 with flash attention over an F32 cache.

    Args:
        defaults: bytes of ``llama_context_default_params()``, at least 256.
        context: positions the cache holds.
        batch: tokens per ``llama_decode``; also the micro-batch.
        threads: CPU threads.
        pooling: llama.cpp's number of a pooling in place of the file's; 0 for none.

    Returns:
        the same number of bytes, ready to be passed by value.

    Raises:
        OutputError: no known layout fits the defaults.
    """
    offsets = _only(list(_context_layouts(defaults)), "llama_context_params", defaults)
    values = {"n_ctx": context, "n_batch": batch, "n_ubatch": batch, "n_threads": threads}
    values |= {"n_threads_batch": threads, "type_k": _GGML_TYPE_F32, "type_v": _GGML_TYPE_F32}
    if pooling is not None:
        values["pooling_type"] = pooling
    if "flash_attn_type" in offsets:
        values["flash_attn_type"] = _FLASH_ATTENTION_OFF
    return _patch(defaults, {offsets[name]: value for name, value in values.items()})


_GPU_LAYERS = _ints(("n_gpu_layers", (-1, 0, 99, 999)), ("split_mode", (_SPLIT_BY_LAYER,)))
_LOADING = _ints(("load_mode", (-1, 0, 1)), ("lazy_mode", (0, 1, 2)))  # 2026; booleans before
_MAIN_GPU = _ints(("main_gpu", (0,)))
# vocab_only and the booleans after it; None where releases differ.
_BOOLEANS_WITH_LOAD_MODE: tuple[int | None, ...] = (0, 0, 1, 0)  # vocab_only, check, extra bufts, no_host
_BOOLEANS_WITH_MMAP: tuple[int | None, ...] = (0, 1, None, 0)  # vocab_only, use_mmap, direct I/O or mlock, ...


def _model_layouts(blob: bytes) -> Iterator[dict[str, int]]:
    """Every known field order of llama_model_params that the defaults agree with."""
    for pointers, loading, tail in itertools.product((1, 2), range(len(_LOADING) + 1), (4, 5)):
        ints = _GPU_LAYERS + _LOADING[:loading] + _MAIN_GPU
        start = pointers * _POINTER_NBYTES
        offsets = _match(blob, start, ints)
        after = _align(start + 4 * len(ints))  # tensor_split, progress callback and data, kv_overrides
        booleans = after + tail * _POINTER_NBYTES
        wanted = _BOOLEANS_WITH_LOAD_MODE if loading else _BOOLEANS_WITH_MMAP
        found = blob[booleans : booleans + len(wanted)]
        flags = all(want in (None, have) for want, have in zip(wanted, found, strict=True))
        if offsets is not None and flags and _nulls(blob, 0, pointers) and _nulls(blob, after, tail):
            yield offsets | {"devices": 0, "vocab_only": booleans}


def model_params(defaults: bytes, *, vocab_only: bool) -> tuple[bytes, int]:
    """Set "no GPU layers" and ``vocab_only`` in the library's own default model parameters.

    Args:
        defaults: bytes of ``llama_model_default_params()``, at least 256.
        vocab_only: load the tokenizer but no weights.

    Returns:
        the bytes to pass by value, and the offset of the ``devices`` pointer, which the process that owns the
        memory points to an empty list so that no accelerator takes part.

    Raises:
        OutputError: no known layout fits the defaults.
    """
    offsets = _only(list(_model_layouts(defaults)), "llama_model_params", defaults)
    blob = bytearray(_patch(defaults, {offsets["n_gpu_layers"]: 0}))
    blob[offsets["vocab_only"]] = vocab_only
    return bytes(blob), offsets["devices"]


def _only(layouts: list[dict[str, int]], name: str, blob: bytes) -> dict[str, int]:
    if len(layouts) != 1:
        words = struct.unpack_from("<12i", blob)
        raise OutputError(
            f"llama.cpp: the defaults of {name} fit {len(layouts)} known layouts, wanted exactly 1 "
            f"(they begin {words}); install another version, for example xllamacpp or llama-cpp-python"
        )
    return layouts[0]


def _patch(blob: bytes, values: Mapping[int, int]) -> bytes:
    changed = bytearray(blob)
    for offset, value in values.items():
        struct.pack_into("<i", changed, offset, value)
    return bytes(changed)
