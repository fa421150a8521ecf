"""Worker: loads a vocabulary in llama.cpp and cuts texts with it, through ctypes, in a process of its own.

Argument: the library. Standard input: JSON `[{"gguf": path, "texts": [...], "special": bool}, ...]`. Standard output:
for each job `{"ids": [[...]], "size": n, "add_bos": bool, "add_eos": bool, "bos": id, "eos": id, "eog": [...]}`. A
vocabulary that llama.cpp aborts on kills this process and nothing else.
"""

from __future__ import annotations

import ctypes
import json
import sys


class Params(ctypes.Structure):
    """`llama_model_params` as bytes; larger than any version of it."""

    _fields_ = [("bytes", ctypes.c_ubyte * 512)]


def open_vocab(library: ctypes.CDLL, path: str) -> int:
    """Loads only the vocabulary of a GGUF file; the flags begin where the defaults are 0, 0, 1, 0 (include/llama.h)."""
    library.llama_model_default_params.restype = Params
    params = library.llama_model_default_params()
    flags = next(at for at in range(64, 96, 8) if list(params.bytes[at : at + 4]) == [0, 0, 1, 0])
    params.bytes[flags] = 1  # vocab_only
    library.llama_model_load_from_file.restype = ctypes.c_void_p
    library.llama_model_load_from_file.argtypes = [ctypes.c_char_p, Params]
    model = library.llama_model_load_from_file(path.encode(), params)
    if not model:
        raise SystemExit("llama.cpp did not load the file")
    library.llama_model_get_vocab.restype = ctypes.c_void_p
    library.llama_model_get_vocab.argtypes = [ctypes.c_void_p]
    return int(library.llama_model_get_vocab(model))


def run(library: ctypes.CDLL, gguf: str, texts: list[str], *, special: bool) -> dict[str, object]:
    """Cuts texts with the vocabulary of one file."""
    vocab = ctypes.c_void_p(open_vocab(library, gguf))
    tokenize = library.llama_tokenize
    tokenize.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32]
    tokenize.argtypes += [ctypes.c_bool, ctypes.c_bool]
    ids = []
    for text in texts:
        data = text.encode("utf-8")
        room = (ctypes.c_int32 * (len(data) + 8))()
        count = tokenize(vocab, data, len(data), room, len(room), False, special)
        ids.append(list(room[:count]))
    for name in ("llama_vocab_get_add_bos", "llama_vocab_get_add_eos", "llama_vocab_is_eog"):
        getattr(library, name).restype = ctypes.c_bool
    size = library.llama_vocab_n_tokens(vocab)
    return {
        "ids": ids,
        "size": size,
        "add_bos": library.llama_vocab_get_add_bos(vocab),
        "add_eos": library.llama_vocab_get_add_eos(vocab),
        "bos": library.llama_vocab_bos(vocab),
        "eos": library.llama_vocab_eos(vocab),
        "eog": [one for one in range(size) if library.llama_vocab_is_eog(vocab, one)],
    }


def main() -> None:
    library = ctypes.CDLL(sys.argv[1])
    quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    library.llama_log_set(quiet, None)
    jobs = json.load(sys.stdin)
    json.dump([run(library, job["gguf"], job["texts"], special=job["special"]) for job in jobs], sys.stdout)


if __name__ == "__main__":
    main()
