"""Offsets inside llama.cpp's parameter structures, against ctypes structures with the fields of several releases."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from quantpress.pipelines.llama_cpp_layouts import context_params, model_params
from quantpress.quant.errors import OutputError

INT, F, P, B = ctypes.c_int32, ctypes.c_float, ctypes.c_void_p, ctypes.c_bool
SIZES = [("n_ctx", INT, 512), ("n_batch", INT, 2048), ("n_ubatch", INT, 512), ("n_seq_max", INT, 1)]
THREADS = [("n_threads", INT, 4), ("n_threads_batch", INT, 4)]
ENUMS = [("rope_scaling_type", INT, -1), ("pooling_type", INT, -1), ("attention_type", INT, -1)]
FLASH = [("flash_attn_type", INT, -1)]


def rope(attn: float, fast: float, slow: float) -> list[tuple[str, Any, Any]]:
    names = (
        "rope_freq_base",
        "rope_freq_scale",
        "yarn_ext_factor",
        "yarn_attn_factor",
        "yarn_beta_fast",
        "yarn_beta_slow",
    )
    values = (0.0, 0.0, -1.0, attn, fast, slow)
    floats = [(name, F, value) for name, value in zip(names, values, strict=True)]
    return [*floats, ("yarn_orig_ctx", INT, 0), ("defrag_thold", F, -1.0)]


CACHE = [("cb_eval", P, None), ("cb_eval_user_data", P, None), ("type_k", INT, 1), ("type_v", INT, 1)]
ABORT = [("abort_callback", P, None), ("abort_callback_data", P, None)]
# include/llama.h at b4500 (January 2025), b6400 (September 2025), a 2026 build before v0.5.0, v0.5.0, after it.
CONTEXTS = {
    "b4500": [
        *SIZES, *THREADS, *ENUMS, *rope(1.0, 32.0, 1.0), *CACHE,
        ("logits_all", B, False), ("embeddings", B, False), ("offload_kqv", B, True), ("flash_attn", B, False),
        ("no_perf", B, True), *ABORT,
    ],
    "b6400": [
        *SIZES, *THREADS, *ENUMS, *FLASH, *rope(-1.0, -1.0, -1.0), *CACHE, *ABORT,
        ("embeddings", B, False), ("offload_kqv", B, True), ("no_perf", B, True), ("op_offload", B, True),
        ("swa_full", B, True), ("kv_unified", B, False),
    ],
    "2026": [
        *SIZES, ("n_rs_seq", INT, 0), ("n_outputs_max", INT, 0), *THREADS, ("ctx_type", INT, 0), *ENUMS, *FLASH,
        *rope(-1.0, -1.0, -1.0), *CACHE, *ABORT, ("embeddings", B, False), ("offload_kqv", B, True),
    ],
    "v0.5.0": [
        *SIZES, ("n_rs_seq", INT, 0), ("n_outputs_max", INT, 0), ("n_outputs_max_per_seq", INT, 1), *THREADS,
        ("ctx_type", INT, 0), *ENUMS, *FLASH, *rope(-1.0, -1.0, -1.0), *CACHE, *ABORT, ("embeddings", B, False),
        ("offload_kqv", B, True), ("no_perf", B, True), ("op_offload", B, True), ("swa_full", B, True),
        ("kv_unified", B, False), ("samplers", P, None), ("n_samplers", ctypes.c_size_t, 0), ("ctx_other", P, None),
    ],
}  # fmt: skip
POINTERS = [("tensor_split", P, None), ("progress", P, None), ("progress_data", P, None), ("kv_overrides", P, None)]
MMAP = [("vocab_only", B, False), ("use_mmap", B, True)]
EXTRA = [("check_tensors", B, False), ("use_extra_bufts", B, True), ("no_host", B, False), ("no_alloc", B, False)]
HEAD = [("devices", P, None), ("tensor_buft_overrides", P, None)]
MODELS = {
    "b4500": [
        ("devices", P, None), ("n_gpu_layers", INT, 0), ("split_mode", INT, 1), ("main_gpu", INT, 0), *POINTERS, *MMAP,
        ("use_mlock", B, False), ("check_tensors", B, False),
    ],
    "b6400": [
        *HEAD, ("n_gpu_layers", INT, 999), ("split_mode", INT, 1), ("main_gpu", INT, 0), *POINTERS, *MMAP,
        ("use_mlock", B, False), *EXTRA,
    ],
    "direct I/O": [
        *HEAD, ("n_gpu_layers", INT, -1), ("split_mode", INT, 1), ("main_gpu", INT, 0), *POINTERS, *MMAP,
        ("use_direct_io", B, True), ("use_mlock", B, False), *EXTRA,
    ],
    "load mode": [
        *HEAD, ("n_gpu_layers", INT, -1), ("split_mode", INT, 1), ("load_mode", INT, 1), ("main_gpu", INT, 0),
        *POINTERS, ("vocab_only", B, False), *EXTRA,
    ],
    "v0.5.0": [
        *HEAD, ("n_gpu_layers", INT, -1), ("split_mode", INT, 1), ("load_mode", INT, -1), ("lazy_mode", INT, 1),
        ("main_gpu", INT, 0), *POINTERS, ("vocab_only", B, False), *EXTRA, ("load_mtp", B, False),
    ],
}  # fmt: skip


def structure(fields: list[tuple[str, Any, Any]]) -> tuple[type[ctypes.Structure], bytes]:
    """A structure with these fields, and its bytes with the defaults, followed by what a stack may hold."""
    kind = type("Params", (ctypes.Structure,), {"_fields_": [(name, code) for name, code, _ in fields]})
    return kind, bytes(kind(*(default for _, _, default in fields))) + b"\xa5" * 700


def values(kind: type[ctypes.Structure], blob: bytes) -> dict[str, Any]:
    filled = kind.from_buffer_copy(blob)
    return {name: getattr(filled, name) for name, *_ in kind._fields_}


@pytest.mark.parametrize("release", CONTEXTS)
def test_context_fields_are_set_and_no_other_byte_changes(release: str) -> None:
    kind, blob = structure(CONTEXTS[release])
    changed = context_params(blob, context=300, batch=128, threads=7)
    expected = values(kind, blob) | {"n_ctx": 300, "n_batch": 128, "n_ubatch": 128, "type_k": 0, "type_v": 0}
    expected |= {"n_threads": 7, "n_threads_batch": 7}
    if "flash_attn_type" in expected:
        expected["flash_attn_type"] = 0
    assert values(kind, changed) == expected
    assert changed[ctypes.sizeof(kind) :] == blob[ctypes.sizeof(kind) :]
    assert len(changed) == len(blob)


@pytest.mark.parametrize("release", MODELS)
@pytest.mark.parametrize("vocab_only", [False, True])
def test_model_fields_are_set_and_no_other_byte_changes(release: str, vocab_only: bool) -> None:
    kind, blob = structure(MODELS[release])
    changed, devices = model_params(blob, vocab_only=vocab_only)
    assert values(kind, changed) == values(kind, blob) | {"n_gpu_layers": 0, "vocab_only": vocab_only}
    assert devices == kind.devices.offset
    assert changed[ctypes.sizeof(kind) :] == blob[ctypes.sizeof(kind) :]


@pytest.mark.parametrize("release", CONTEXTS)
def test_a_default_that_is_not_where_it_should_be_refuses_the_library(release: str) -> None:
    fields = CONTEXTS[release]
    for name in ("n_ctx", "n_threads", "pooling_type", "yarn_ext_factor", "type_v"):
        other = [(field, code, 77 if field == name else default) for field, code, default in fields]
        with pytest.raises(OutputError, match=r"llama_context_params fit 0 known layouts.*install"):
            context_params(structure(other)[1], context=300, batch=128, threads=7)
    inserted = [*fields[:6], ("new_field", INT, 3), *fields[6:]]
    with pytest.raises(OutputError, match="fit 0"):
        context_params(structure(inserted)[1], context=300, batch=128, threads=7)


@pytest.mark.parametrize("release", MODELS)
def test_an_unknown_model_field_refuses_the_library(release: str) -> None:
    fields = MODELS[release]
    place = [name for name, *_ in fields].index("main_gpu")
    for inserted in ([("new_field", INT, 5)], [("one", P, 1)]):
        with pytest.raises(OutputError, match=r"llama_model_params fit 0 known layouts"):
            model_params(structure([*fields[:place], *inserted, *fields[place:]])[1], vocab_only=False)


def test_a_pointer_that_a_later_release_adds_after_the_cache_types_does_no_harm() -> None:
    """llama.cpp 0.6 put 8 bytes there."""
    place = [name for name, *_ in CONTEXTS["v0.5.0"]].index("abort_callback")
    fields = [*CONTEXTS["v0.5.0"][:place], ("new_pointer", P, None), *CONTEXTS["v0.5.0"][place:]]
    kind, blob = structure(fields)
    assert values(kind, context_params(blob, context=300, batch=128, threads=7))["type_k"] == 0
