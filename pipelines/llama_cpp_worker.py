"""A process of its own that runs llama.cpp through ctypes and answers requests on its standard streams.

It is started by path (``python -I -S llama_cpp_worker.py``) and imports nothing but the standard library, so that
it starts in milliseconds and so that an abort, a segmentation fault or a hang inside the library ends this process
and never the one that asked. Requests and replies are frames: 4 bytes little-endian length, that many bytes of JSON
with a key ``nbytes``, then ``nbytes`` raw bytes. Numbers in raw bytes are native int32 and float32.

Function signatures: llama.cpp include/llama.h and ggml/include/ggml-backend.h. The parameter structures are opaque
here (``llama_cpp_layouts`` explains why): more bytes than any release needs are passed by value as the last
argument, of which the library reads its own size.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import struct
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

_PARAMS_NBYTES = 1024  # the largest parameter structure so far has 168 bytes
_GUARD_SECONDS = 1.0  # how soon an orphan notices that its parent is gone


class _Params(ctypes.Structure):
    _fields_ = (("blob", ctypes.c_ubyte * _PARAMS_NBYTES),)


class _Batch(ctypes.Structure):
    """``llama_batch``; unchanged since November 2024."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")),
    )


_SETTINGS = ("n_ctx", "n_batch", "n_ubatch", "n_threads", "n_threads_batch")
_POINTER, _INT, _TEXT, _BOOL = ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p, ctypes.c_bool
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    **dict.fromkeys(("llama_model_default_params", "llama_context_default_params"), (_Params, [])),
    "llama_model_load_from_file": (_POINTER, [_TEXT, _Params]),
    "llama_init_from_model": (_POINTER, [_POINTER, _Params]),
    "llama_model_desc": (_INT, [_POINTER, _TEXT, ctypes.c_size_t]),
    "llama_model_meta_val_str": (_INT, [_POINTER, _TEXT, _TEXT, ctypes.c_size_t]),
    "llama_model_n_params": (ctypes.c_uint64, [_POINTER]),
    "llama_vocab_is_eog": (_BOOL, [_POINTER, _INT]),
    "llama_tokenize": (_INT, [_POINTER, _TEXT, _INT, _POINTER, _INT, _BOOL, _BOOL]),
    "llama_detokenize": (_INT, [_POINTER, _POINTER, _INT, _POINTER, _INT, _BOOL, _BOOL]),
    **dict.fromkeys(("llama_decode", "llama_encode"), (_INT, [_POINTER, _Batch])),
    "llama_set_embeddings": (None, [_POINTER, _BOOL]),
    "llama_get_embeddings_seq": (_POINTER, [_POINTER, _INT]),
    **dict.fromkeys(("llama_get_logits", "llama_get_embeddings", "llama_model_get_vocab"), (_POINTER, [_POINTER])),
    **dict.fromkeys(("llama_vocab_get_add_bos", "llama_vocab_get_add_eos"), (_BOOL, [_POINTER])),
    **{f"llama_vocab_{name}": (_INT, [_POINTER]) for name in ("n_tokens", "bos", "eos")},
    **{f"llama_{name}": (_INT, [_POINTER]) for name in ("model_n_ctx_train", "model_n_embd", *_SETTINGS)},
}
_OPERATIONS = ("open", "load", "context", "tokenize", "detokenize", "encode", "logits", "generate", "embed")
_Reply = tuple[dict[str, Any], bytes | memoryview]


class Engine:
    """The library, one model and one context: everything a worker holds."""

    def __init__(self) -> None:
        self._libraries: list[ctypes.CDLL] = []
        self._model: int | None = None
        self._vocab: int | None = None
        self._context: int | None = None
        self._no_devices = (ctypes.c_void_p * 1)()  # an empty NULL-terminated list; must outlive the model

    def _function(self, name: str, restype: Any, argtypes: list[Any]) -> Any:
        for library in self._libraries:
            function = getattr(library, name, None)
            if function is not None:
                function.restype, function.argtypes = restype, argtypes
                return function
        return None

    def _call(self, name: str, *arguments: Any) -> Any:
        return self._function(name, *_SIGNATURES[name])(*arguments)

    def open(self, request: dict[str, Any], _: bytes) -> Iterator[_Reply]:
        """Load the library and its CPU backends; answer with the default parameters."""
        path = Path(request["library"])
        self._libraries = _load_libraries(path)
        missing = [name for name, types in _SIGNATURES.items() if self._function(name, *types) is None]
        if missing:
            raise RuntimeError(f"{path.name} lacks {missing[0]}; llama.cpp of January 2025 or later is needed")
        self._call("llama_backend_init")
        devices = self._function("ggml_backend_dev_count", ctypes.c_size_t, [])
        load_from = self._function("ggml_backend_load_all_from_path", None, [_TEXT])
        if devices is not None and devices() == 0 and load_from is not None:
            load_from(os.fsencode(path.parent))
        if devices is not None and devices() == 0:
            raise RuntimeError(f"{path.name} has no CPU backend beside it (libggml-cpu*)")
        version = self._function("llama_version", _TEXT, []) or self._function("ggml_version", _TEXT, [])
        blobs = [bytes(self._call(f"llama_{kind}_default_params").blob) for kind in ("model", "context")]
        yield {"ok": True, "version": version().decode() if version is not None else ""}, b"".join(blobs)

    def load(self, request: dict[str, Any], blob: bytes) -> Iterator[_Reply]:
        """Load a model with the given parameters; answer with what it says of itself."""
        params = _Params.from_buffer_copy(blob)
        address = struct.pack("<Q", ctypes.addressof(self._no_devices))
        ctypes.memmove(ctypes.addressof(params) + request["devices_offset"], address, len(address))
        self._model = self._call("llama_model_load_from_file", os.fsencode(request["path"]), params)
        if not self._model:
            raise RuntimeError("llama.cpp cannot load it")
        vocab = self._vocab = self._call("llama_model_get_vocab", self._model)
        info: dict[str, Any] = {"ok": True, "description": self._text("llama_model_desc")}
        info["file_type"] = self._text("llama_model_meta_val_str", b"general.file_type")
        info |= {name: self._call(f"llama_model_{name}", self._model) for name in ("n_params", "n_ctx_train", "n_embd")}
        info["n_vocab"] = self._call("llama_vocab_n_tokens", vocab)
        for name in ("bos", "eos", "get_add_bos", "get_add_eos"):
            info[name.removeprefix("get_")] = self._call(f"llama_vocab_{name}", vocab)
        yield info, b""

    def _text(self, name: str, *arguments: Any) -> str | None:
        """What a function writes that fills a buffer with text; None when it has nothing to say."""
        buffer = ctypes.create_string_buffer(256)
        length = self._call(name, self._model, *arguments, buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace") if length >= 0 else None

    def context(self, _: dict[str, Any], blob: bytes) -> Iterator[_Reply]:
        """Make the context; answer with what the library took from the parameters."""
        self._context = self._call("llama_init_from_model", self._model, _Params.from_buffer_copy(blob))
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a context for it")
        yield {"ok": True} | {name: self._call(f"llama_{name}", self._context) for name in _SETTINGS}, b""

    def tokenize(self, request: dict[str, Any], text: bytes) -> Iterator[_Reply]:
        """UTF-8 text to int32 token ids."""
        flags = (request["add_special"], request["parse_special"])

        def fill(tokens: Any, room: int) -> Any:
            return self._call("llama_tokenize", self._vocab, text, len(text), tokens, room, *flags)

        yield {"ok": True}, _ask_twice(ctypes.c_int32, len(text) + 16, fill)

    def detokenize(self, request: dict[str, Any], raw: bytes) -> Iterator[_Reply]:
        """int32 token ids to UTF-8 text."""
        tokens = _int32(raw)

        def fill(text: Any, room: int) -> Any:
            flags = (False, request["special"])
            return self._call("llama_detokenize", self._vocab, tokens, len(tokens), text, room, *flags)

        yield {"ok": True}, _ask_twice(ctypes.c_char, 16 * len(tokens) + 64, fill)

    def encode(self, _: dict[str, Any], raw: bytes) -> Iterator[_Reply]:
        """Let the encoder read a text, to which the decoder looks from now on."""
        self._clear()
        self._decode(_int32(raw), 0, len(raw) // 4, range(0), call="llama_encode")
        yield {"ok": True}, b""

    def logits(self, request: dict[str, Any], raw: bytes) -> Iterator[_Reply]:
        """Score one window; every sub-batch answers with its rows, which also says that work goes on."""
        tokens, first = _int32(raw), request["first"]
        batch = self._call("llama_n_batch", self._context)
        self._clear()
        for start in range(0, len(tokens), batch):
            stop = min(start + batch, len(tokens))
            wanted = range(max(first, start), stop)
            self._decode(tokens, start, stop, wanted)
            yield {"rows": len(wanted)}, self._rows(len(wanted)) if wanted else b""
        yield {"ok": True}, b""

    def generate(self, request: dict[str, Any], raw: bytes) -> Iterator[_Reply]:
        """Continue with the likeliest token each time; stop after the first end-of-generation token."""
        tokens = array("i", raw)
        batch = self._call("llama_n_batch", self._context)
        start, end = 0, len(tokens) + request["count"]
        self._clear()
        while len(tokens) < end:
            window = (ctypes.c_int32 * len(tokens)).from_buffer_copy(tokens)
            while start < len(tokens):
                stop = min(start + batch, len(tokens))
                self._decode(window, start, stop, range(len(tokens) - 1, stop))
                start = stop
            row = array("f", bytes(self._rows(1)))
            tokens.append(row.index(max(row)))
            yield {"rows": 0}, b""
            if self._call("llama_vocab_is_eog", self._vocab, tokens[-1]):
                break
        yield {"ok": True}, tokens[len(raw) // 4 :].tobytes()

    def embed(self, request: dict[str, Any], raw: bytes) -> Iterator[_Reply]:
        """Give the last hidden state of each token of a text, or the one vector that the file's pooling makes of it."""
        tokens, width = _int32(raw), self._call("llama_model_n_embd", self._model)
        self._clear()
        self._call("llama_set_embeddings", self._context, True)
        self._decode(tokens, 0, len(tokens), range(len(tokens)))
        if request["pooled"]:
            address = self._call("llama_get_embeddings_seq", self._context, 0)
        else:
            address, width = self._call("llama_get_embeddings", self._context), width * len(tokens)
        yield {"rows": 1}, _floats(address, width, "llama.cpp gives no embeddings")
        yield {"ok": True}, b""

    def _clear(self) -> None:
        """Forget all positions; the function's name changed twice."""
        memory = self._function("llama_get_memory", _POINTER, [_POINTER])
        if memory is not None:
            self._function("llama_memory_clear", None, [_POINTER, _BOOL])(memory(self._context), True)
            return
        older = [self._function(f"llama_kv_{name}_clear", None, [_POINTER]) for name in ("self", "cache")]
        clear = older[0] or older[1]
        if clear is None:
            raise RuntimeError("llama.cpp has none of the functions that clear its memory")
        clear(self._context)

    def _decode(self, tokens: Any, start: int, stop: int, wanted: range, call: str = "llama_decode") -> None:
        count = stop - start
        positions = (ctypes.c_int32 * count)(*range(start, stop))
        sequences = (ctypes.c_int32 * count)(*([1] * count))
        zero = (ctypes.c_int32 * 1)(0)
        ids = (ctypes.c_void_p * count)(*([ctypes.addressof(zero)] * count))
        outputs = (ctypes.c_int8 * count)(*[position in wanted for position in range(start, stop)])
        arrays = [ctypes.addressof(block) for block in (positions, sequences, ids, outputs)]
        batch = _Batch(count, ctypes.addressof(tokens) + 4 * start, None, *arrays)
        status = self._call(call, self._context, batch)
        if status != 0:
            raise RuntimeError(f"{call} returned {status} at positions {start} to {stop - 1}")

    def _rows(self, rows: int) -> memoryview:
        count = rows * self._call("llama_vocab_n_tokens", self._vocab)
        address = self._call("llama_get_logits", self._context)
        return _floats(address, count, "llama.cpp gives no logits; the model is no causal language model")


def _floats(address: int | None, count: int, problem: str) -> memoryview:
    """The library's own memory, as bytes."""
    if not address:
        raise RuntimeError(problem)
    return memoryview((ctypes.c_float * count).from_address(address)).cast("B")


def _ask_twice(item: type[Any], room: int, fill: Callable[[Any, int], Any]) -> bytes:
    """Let llama.cpp fill a buffer; when it is too small, the negative answer says how large it must be."""
    for _ in range(2):
        buffer = (item * room)()
        count = fill(buffer, room)
        if count >= 0:
            return bytes(memoryview(buffer).cast("B")[: count * ctypes.sizeof(item)])
        room = -count
    raise RuntimeError("llama.cpp cannot translate between this text and tokens")


def _int32(raw: bytes) -> Any:
    return (ctypes.c_int32 * (len(raw) // 4)).from_buffer_copy(raw)


def _load_libraries(path: Path) -> list[ctypes.CDLL]:
    """The library, and the ggml libraries beside it when they are separate files.

    ggml comes first where the loader would not find it by itself: a build whose run path is not its own folder.
    """
    beside = sorted(path.parent.glob("*ggml-base*")) + sorted(path.parent.glob("*ggml.*"))
    try:
        loaded = [ctypes.CDLL(str(path))]
    except OSError:
        for sibling in beside:
            ctypes.CDLL(str(sibling), mode=ctypes.RTLD_GLOBAL)
        loaded = [ctypes.CDLL(str(path))]
    if os.name == "nt":  # symbols of dependencies are not visible through the library that needs them
        loaded += [ctypes.CDLL(str(sibling)) for sibling in beside]
    return loaded


def _write_frame(stream: BinaryIO, header: dict[str, Any], payload: bytes | memoryview) -> None:
    text = json.dumps(header | {"nbytes": len(payload)}).encode("ascii")
    stream.write(struct.pack("<I", len(text)) + text)
    stream.write(payload)
    stream.flush()


def _serve(requests: BinaryIO, replies: BinaryIO) -> None:
    engine = Engine()
    while len(prefix := requests.read(4)) == 4:
        request = json.loads(requests.read(*struct.unpack("<I", prefix)))
        payload = requests.read(request["nbytes"])
        operation = getattr(engine, _OPERATIONS[_OPERATIONS.index(request["op"])])
        try:
            for header, raw in operation(request, payload):
                _write_frame(replies, header, raw)
        except (RuntimeError, OSError) as error:
            _write_frame(replies, {"ok": False, "error": str(error)}, b"")


def _watch_parent(parent: int) -> None:
    """End with the parent even while the library computes or hangs."""
    while os.getppid() == parent:
        time.sleep(_GUARD_SECONDS)
    os._exit(1)


def main() -> None:
    """Serve until the requests end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not land between two frames
    if os.name != "nt":
        threading.Thread(target=_watch_parent, args=(os.getppid(),), daemon=True).start()
    try:
        _serve(sys.stdin.buffer, replies)
    except BrokenPipeError:
        os._exit(1)  # nobody reads any more
    os._exit(0)  # skips the library's own tear-down, which has crashed in some releases


if __name__ == "__main__":
    main()
