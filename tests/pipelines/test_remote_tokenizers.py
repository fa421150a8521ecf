"""Checkpoints with the tokenizer files that are published: text is cut in llama.cpp as here, through a whole export."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quantpress as qp
from quantpress.convert.gguf.container import plain_metadata
from quantpress.convert.gguf.reader import open_gguf_file
from quantpress.convert.open import open_checkpoint
from quantpress.convert.tokenizer import Tokenizer, TokenizerFiles
from quantpress.convert.tokenizer_tiktoken import byte_letters
from quantpress.pipelines.llama_cpp import LlamaCppRuntime
from quantpress.pipelines.llama_cpp_find import find_llama_cpp
from tests.families.chatglm import write_chatglm
from tests.families.remote import write_qwen

pytestmark = pytest.mark.skipif(find_llama_cpp() is None, reason="llama.cpp is not installed")
TEXTS = (
    "Once upon a time, there was a little girl named Lily. She loved 12345 things!\n\n  And \t ö 你好 🐉?",
    " They'll've said so\r\n\r\n",
    "<|user|> is text here",
)
MARKED = ("[gMASK]sop<|user|>\nOnce upon a time<|assistant|>", "philosophy<|observation|>")
CHAT = ("<|im_start|>user\nOnce upon a time<|im_end|>\n<|endoftext|>", "<|extra_7|>x")


def tokenizer_of(folder: Path) -> Tokenizer:
    checkpoint = open_checkpoint(folder)
    return Tokenizer(TokenizerFiles(checkpoint.tokenizer_files, name=checkpoint.name))


def cut_alike(folder: Path, file: Path, texts: tuple[str, ...], marked: tuple[str, ...]) -> None:
    """Exports, and cuts texts in llama.cpp, by the source's tokenizer, and by the one that is rebuilt from the file."""
    qp.export_gguf(folder, file, outtype="f32", verify=False, threads=1)
    own, rebuilt = tokenizer_of(folder), tokenizer_of(file)
    with LlamaCppRuntime(file, context=16, threads=1) as runtime:
        for special, some in ((False, texts), (True, marked)):
            for text in some:
                wanted = own.encode(text, special=special).tolist()
                found = runtime.tokenize(text, add_special=True, parse_special=special)  # no BOS is added
                assert found.tolist() == wanted, text
                assert rebuilt.encode(text, special=special).tolist() == wanted, text


def replaced(folder: Path, settings: dict[str, Any], name: str, data: bytes) -> None:
    """Puts the published kind of tokenizer files in the place of tokenizer.json."""
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / name).write_bytes(data)


def test_chatglms_sentencepiece_and_special_tokens(shared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_chatglm(folder, {"padded_vocab_size": 544, "vocab_size": 544, "eos_token_id": 2})
    model = (shared / "models" / "stories260k-llama2c" / "tok512.model").read_bytes()
    replaced(folder, {"tokenizer_class": "ChatGLMTokenizer"}, "tokenizer.model", model)
    single = tuple(text.strip().replace("  ", " ") for text in TEXTS)  # it drops other spaces
    cut_alike(folder, tmp_path / "model.gguf", single, MARKED)


@pytest.mark.parametrize("family", ["qwen", "glm-4"])
def test_tiktokens_vocabulary(family: str, shared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    metadata = plain_metadata(open_gguf_file(shared / "gguf-vocabs" / "ggml-vocab-gpt-2.gguf").metadata)
    byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    tokens = [bytes(byte_of[letter] for letter in text) for text in metadata["tokenizer.ggml.tokens"][:3000]]
    data = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    if family == "qwen":
        write_qwen(folder, {"vocab_size": 3300})
        replaced(folder, {"tokenizer_class": "QWenTokenizer"}, "qwen.tiktoken", data)
        cut_alike(folder, tmp_path / "model.gguf", TEXTS, CHAT)
        return
    write_chatglm(folder, {"padded_vocab_size": 3300, "vocab_size": 3300, "eos_token_id": [3000, 3001]})
    named = ["<|endoftext|>", "<|user|>", "[gMASK]", "sop", "<|assistant|>", "<|observation|>"]
    decoder = {str(number): {"content": text, "special": True} for number, text in enumerate(named, 3000)}
    settings = {"tokenizer_class": "ChatGLM4Tokenizer", "added_tokens_decoder": decoder, "eos_token": named[0]}
    replaced(folder, settings, "tokenizer.model", data)
    cut_alike(folder, tmp_path / "model.gguf", TEXTS, MARKED)


def test_a_merged_model_keeps_the_files(shared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_chatglm(folder, {"padded_vocab_size": 544, "vocab_size": 544, "eos_token_id": 2})
    model = shared / "models" / "stories260k-llama2c" / "tok512.model"
    replaced(folder, {"tokenizer_class": "ChatGLMTokenizer"}, "tokenizer.model", model.read_bytes())
    qp.export_safetensors(folder, tmp_path / "out", verify=False)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == model.read_bytes()
    ids = tokenizer_of(tmp_path / "out").encode("Once upon<|user|>", special=True)
    np.testing.assert_array_equal(ids, tokenizer_of(folder).encode("Once upon<|user|>", special=True))
