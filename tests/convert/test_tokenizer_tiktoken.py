"""tiktoken's vocabulary files: ids against tiktoken's algorithm written out, merges against GPT-2's own list."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.gguf.container import plain_metadata
from quantpress.convert.gguf.reader import open_gguf_file
from quantpress.convert.gguf.vocab import plan_vocab
from quantpress.convert.token_count import count_tokens
from quantpress.convert.tokenizer import Tokenizer, TokenizerFiles
from quantpress.convert.tokenizer_tiktoken import byte_letters, looks_like_tiktoken, read_ranks, tiktoken_json
from quantpress.quant.errors import InputError

# split of tokenization_qwen.py; GLM-4's takes up to three digits at once
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GLM4 = QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
HARD = (
    "They'll've said: I'M 12345 years old!!\n\n  \t so  what?  ",
    "Ünïcödé, 你好，世界！ 🐉🐉 \r\n\r\n x",
    "",
    " ",
    "\n",
)


def written(ranks: Mapping[bytes, int]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


def gpt2(shared: Path) -> tuple[dict[bytes, int], list[str]]:
    """GPT-2's vocabulary, in which ranks are ids too, and its list of merges."""
    file = open_gguf_file(shared / "gguf-vocabs" / "ggml-vocab-gpt-2.gguf")
    metadata: dict[str, Any] = plain_metadata(file.metadata)
    byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    texts = metadata["tokenizer.ggml.tokens"][:-1]  # the last is <|endoftext|>
    ranks = {bytes(byte_of[letter] for letter in text): rank for rank, text in enumerate(texts)}
    return ranks, list(metadata["tokenizer.ggml.merges"])


def small_ranks(shared: Path, count: int = 2000) -> dict[bytes, int]:
    """The first tokens of GPT-2: bytes and what is made of them, no token of tokens that are missing."""
    return dict(list(gpt2(shared)[0].items())[:count])


def joined(ranks: Mapping[bytes, int], piece: bytes) -> list[int]:
    """tiktoken's `byte_pair_merge` as it is described: the lowest rank of two neighbours first, the leftmost first."""
    if piece in ranks:
        return [ranks[piece]]
    parts = [bytes((byte,)) for byte in piece]
    while True:
        pairs = [(ranks[a + b], at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def brute_force(ranks: Mapping[bytes, int], split: str, text: str) -> list[int]:
    regex = pytest.importorskip("regex")
    return [one for piece in regex.findall(split, text) for one in joined(ranks, piece.encode())]


def files_of(data: bytes, tokenizer_class: str, *, name: str = "qwen.tiktoken", **config: Any) -> TokenizerFiles:
    settings = {"tokenizer_class": tokenizer_class, **config}
    return TokenizerFiles({name: data, "tokenizer_config.json": json.dumps(settings).encode()}, name="model")


def test_merges_are_those_that_the_vocabulary_was_trained_with(shared: Path) -> None:
    ranks, merges = gpt2(shared)
    found = tiktoken_json(written(ranks), split=QWEN, nfc=False, where="file")
    assert [" ".join(pair) for pair in found["model"]["merges"]] == merges
    assert found["model"]["ignore_merges"] is False


@pytest.mark.parametrize(
    ("tokenizer_class", "name", "split"),
    [
        ("QWenTokenizer", "qwen.tiktoken", QWEN),
        ("ChatGLM4Tokenizer", "tokenizer.model", GLM4),
        ("ChatGLMTokenizer", "tokenizer.model", GLM4),
    ],
)
def test_ids_are_those_of_tiktoken(shared: Path, tokenizer_class: str, name: str, split: str) -> None:
    ranks = small_ranks(shared)
    tokenizer = Tokenizer(files_of(written(ranks), tokenizer_class, name=name))
    lines = (shared / "text" / "alice.txt").read_text(encoding="utf-8").split("\n\n")[:40]
    for text in [*lines, *HARD]:
        assert tokenizer.encode(text, special=False).tolist() == brute_force(ranks, split, text), text
    assert (tokenizer.add_bos, tokenizer.add_eos) == (False, False)


def test_a_token_that_joining_never_makes_is_found_where_it_is_a_piece(shared: Path) -> None:
    ranks = small_ranks(shared, 300)
    ranks |= {b"zzzz": 300, b"qjxv": 301}  # no two tokens together are either of them
    tokenizer = Tokenizer(files_of(written(ranks), "QWenTokenizer"))
    for text in ("zzzz qjxv azzzz", "qjxv", "zzzzz"):
        assert tokenizer.encode(text, special=False).tolist() == brute_force(ranks, QWEN, text)


def test_qwens_special_tokens_follow_the_vocabulary(shared: Path) -> None:
    data = written(small_ranks(shared))
    tokenizer = Tokenizer(files_of(data, "QWenTokenizer"))
    assert tokenizer.encode("<|endoftext|><|im_start|><|im_end|><|extra_0|>", special=True).tolist() == [
        2000, 2001, 2002, 2003,
    ]  # fmt: skip
    assert tokenizer.token_id("<|extra_204|>") == 2207
    assert tokenizer.size == 2208
    assert 2001 not in tokenizer.encode("<|im_start|>", special=False)


def test_glm4s_special_tokens_are_those_of_its_configuration(shared: Path) -> None:
    decoder = {"2003": {"content": "[gMASK]", "special": True}, "2005": {"content": "<sop>", "special": True}}
    decoder |= {str(place): {"content": f"<|{place}|>", "special": True} for place in (2000, 2001, 2002, 2004)}
    data = written(small_ranks(shared))
    files = files_of(data, "ChatGLM4Tokenizer", name="tokenizer.model", added_tokens_decoder=decoder)
    assert Tokenizer(files).encode("[gMASK]<sop>", special=True).tolist() == [2003, 2005]


def test_the_number_of_ids_needs_no_merges(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantpress.convert.tokenizer_remote.tiktoken_json", None)
    files = files_of(written(small_ranks(shared)), "QWenTokenizer")
    assert count_tokens(Checkpoint(name="m", config={}, tensors={}, tokenizer_files=files.files)) == 2208


def test_gguf_has_the_split_and_the_merges(shared: Path) -> None:
    data = written(small_ranks(shared))
    qwen = plan_vocab(files_of(data, "QWenTokenizer"), vocab_size=2300, model_type="qwen").metadata
    assert qwen["tokenizer.ggml.pre"] == ("string", "qwen2")
    assert qwen["tokenizer.ggml.merges"][1] == gpt2(shared)[1][: 2000 - 256]
    assert qwen["tokenizer.ggml.tokens"][1][2001] == "<|im_start|>"
    assert qwen["tokenizer.ggml.add_bos_token"] == ("bool", False)


def test_a_class_that_nobody_knows_is_refused(shared: Path) -> None:
    with pytest.raises(InputError, match="how 'OtherTokenizer' does it is not known"):
        Tokenizer(files_of(written(small_ranks(shared, 256)), "OtherTokenizer"))


BYTES = {bytes((byte,)): byte for byte in range(256)}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (written({token: rank for token, rank in BYTES.items() if rank != 7}), "byte 7 is no token"),
        (written(BYTES) + b"YWI= 255\n", "two tokens have the same rank"),
        (written(BYTES) + b"YQ== 256\n", "line 257: token .* is there twice"),
        (written(BYTES) + b"YWI=\n", "line 257: .* is not a token"),
        (written(BYTES) + b"YW!= 256\n", "line 257: .* is not a token"),
        (written(BYTES) + b"YWI= -1\n", "line 257: .* is not a token"),
        (written(BYTES) + b"YWI= 256 1\n", "line 257: .* is not a token"),
        (written(BYTES) + b"YWI= 99999999999\n", "line 257: .* is not a token"),
        (written(BYTES) + b"YWI= " + b"9" * 5000 + b"\n", "line 257: .* is not a token"),
    ],
)
def test_a_damaged_file_is_refused_by_its_line(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=f"model/qwen.tiktoken: {message}") as caught:
        read_ranks(data, where="model/qwen.tiktoken")
    assert len(str(caught.value)) < 400


def test_sentencepiece_is_not_taken_for_tiktoken(shared: Path) -> None:
    model = (shared / "models" / "stories260k-llama2c" / "tok512.model").read_bytes()
    assert not looks_like_tiktoken(model)
    assert looks_like_tiktoken(written(BYTES))
    assert looks_like_tiktoken(written(BYTES).replace(b"\n", b"\r\n"))
