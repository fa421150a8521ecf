"""Tokenizers of checkpoints: ids, special tokens, BOS and EOS, and files that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer as Library

from quantpress.convert.tokenizer import Tokenizer, TokenizerFiles, adds_bos_eos
from quantpress.quant.errors import InputError


def folder(path: Path, *names: str) -> TokenizerFiles:
    """Tokenizer files of a folder: those named, or all."""
    chosen = [path / name for name in names] or [one for one in path.iterdir() if one.suffix in (".json", ".model")]
    return TokenizerFiles({one.name: one.read_bytes() for one in chosen})


def template(*parts: str) -> dict[str, Any]:
    steps = [{"Sequence": {"id": "A"}} if part == "A" else {"SpecialToken": {"id": part}} for part in parts]
    return {"type": "TemplateProcessing", "single": steps, "pair": [], "special_tokens": {}}


def bare(post_processor: object = None, **config: Any) -> TokenizerFiles:
    tokenizer = {"model": {"type": "BPE", "vocab": {}, "merges": []}, "post_processor": post_processor}
    files = {"tokenizer.json": json.dumps(tokenizer).encode(), "tokenizer_config.json": json.dumps(config).encode()}
    return TokenizerFiles(files, "ck")


@pytest.mark.parametrize("model", ["stories260k-hf", "glasslm-en-hf", "mix6m-hf"])
def test_ids_are_those_of_the_tokenizers_library(shared: Path, model: str) -> None:
    path = shared / "models" / model
    tokenizer, library = Tokenizer(folder(path)), Library.from_file(str(path / "tokenizer.json"))
    text = (shared / "text" / "alice.txt").read_text(encoding="utf-8")[:20_000]
    ids = tokenizer.encode(text, special=True)
    assert ids.dtype == np.int32
    assert ids.tolist() == library.encode(text, add_special_tokens=False).ids
    assert tokenizer.size == library.get_vocab_size()


def test_ids_and_special_tokens_are_those_of_transformers(shared: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path = shared / "models" / "stories260k-hf"
    tokenizer, theirs = Tokenizer(folder(path)), transformers.AutoTokenizer.from_pretrained(path)
    text = "Once upon a time, <s> there was</s>"
    assert tokenizer.encode(text, special=True).tolist() == theirs.encode(text, add_special_tokens=False)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert tokenizer.unk_id == theirs.unk_token_id
    assert tokenizer.pad_id is theirs.pad_token_id is None
    assert theirs.encode("a")[0] == tokenizer.bos_id
    assert (tokenizer.add_bos, tokenizer.add_eos) == (True, False)


def test_special_tokens_in_text_are_characters_unless_asked_for(shared: Path) -> None:
    tokenizer = Tokenizer(folder(shared / "models" / "mix6m-hf"))
    assert tokenizer.encode("<|endoftext|>", special=True).tolist() == [0]
    plain = tokenizer.encode("<|endoftext|>", special=False).tolist()
    assert len(plain) > 1
    assert tokenizer.decode(plain) == "<|endoftext|>"
    assert tokenizer.encode("<|endoftext|>", special=True).tolist() == [0]  # the switch does not stick


def test_tokenizer_model_alone_is_read_by_sentencepiece(shared: Path) -> None:
    path = shared / "models" / "stories260k-hf"
    tokenizer = Tokenizer(folder(path, "tokenizer.model"))
    library = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
    text = "Lily's  dog ran. ünïcödé\n"
    assert tokenizer.encode(text, special=False).tolist() == library.encode(text)
    assert tokenizer.encode("a<s>b", special=True).tolist() == [*library.encode("a"), 1, *library.encode("b")]
    assert 1 not in tokenizer.encode("a<s>b", special=False)
    assert tokenizer.decode([*library.encode("Lily ran"), 2]) == "Lily ran"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos, tokenizer.size) == (1, 2, True, 512)


def test_vocab_and_merges_alone_are_the_same_byte_level_bpe(shared: Path) -> None:
    path = shared / "models" / "mix6m-hf"
    model = json.loads((path / "tokenizer.json").read_text())["model"]
    merges = "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in model["merges"])
    slow = TokenizerFiles({"vocab.json": json.dumps(model["vocab"]).encode(), "merges.txt": merges.encode()})
    text = (shared / "text" / "alice.txt").read_text(encoding="utf-8")[:20_000]
    assert (
        Tokenizer(slow).encode(text, special=True).tolist()
        == Tokenizer(folder(path)).encode(text, special=True).tolist()
    )
    unknown = {**slow.files, "tokenizer_config.json": b'{"tokenizer_class": "OddTokenizer"}'}
    with pytest.raises(InputError, match="how OddTokenizer splits text is not known"):
        Tokenizer(TokenizerFiles(unknown))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (bare(), (False, False)),
        (bare(tokenizer_class="LlamaTokenizerFast"), (True, False)),
        (bare(tokenizer_class="GemmaTokenizer"), (True, False)),
        (bare(template("A")), (False, False)),
        (bare(template("<s>", "A")), (True, False)),
        (bare(template("<s>", "A", "</s>")), (True, True)),
        (bare(template("<s>", "A", "</s>"), add_eos_token=False), (True, False)),
        (bare(template("<s>", "A"), add_bos_token=False), (False, False)),
        (bare({"type": "Sequence", "processors": [{"type": "ByteLevel"}, template("<s>", "A")]}), (True, False)),
    ],
)
def test_bos_and_eos_by_default(files: TokenizerFiles, expected: tuple[bool, bool]) -> None:
    assert adds_bos_eos(files) == expected


def test_added_tokens_of_the_config_are_part_of_the_tokenizer(shared: Path) -> None:
    path = shared / "models" / "mix6m-hf"
    config = {"added_tokens_decoder": {"2048": {"content": "<|user|>", "special": True}}, "pad_token": "<|user|>"}
    files = TokenizerFiles({**folder(path).files, "tokenizer_config.json": json.dumps(config).encode()})
    tokenizer = Tokenizer(files)
    assert tokenizer.encode("a<|user|>", special=True).tolist()[-1] == 2048
    assert (tokenizer.size, tokenizer.pad_id) == (2049, 2048)


def test_an_added_token_whose_id_leaves_a_gap_is_refused(shared: Path) -> None:
    path = shared / "models" / "mix6m-hf"
    files = TokenizerFiles({**folder(path).files, "added_tokens.json": b'{"<|user|>": 3000}'}, "ck")
    with pytest.raises(InputError, match=r"ck/tokenizer\.json: added token '<\|user\|>' is said to have id 3000"):
        Tokenizer(files)


def test_jinja_file_wins_over_the_template_in_the_config() -> None:
    files = TokenizerFiles({"tokenizer_config.json": b'{"chat_template": "old"}', "chat_template.jinja": b"new"})
    assert files.chat_templates == {"default": "new"}


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("tokenizer.json", b"[" * 100, "nested deeper"),
        ("tokenizer.json", b"{}", "'model' is missing"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}', "not a tokenizer"),
        ("tokenizer.json", b'{"model": {}, "added_tokens": [{"id": -1, "content": "x"}]}', "no valid id"),
        ("tokenizer_config.json", b"[]", "JSON object expected"),
        ("added_tokens.json", b'{"x": 1, "x": 2}', "twice"),
        ("tokenizer.model", b"nonsense", "not a SentencePiece model"),
        ("chat_template.jinja", b"\xff", "not UTF-8"),
    ],
)
def test_damaged_files_are_refused_by_name(name: str, data: bytes, message: str) -> None:
    whole = b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'
    files = {name: data} if name == "tokenizer.model" else {"tokenizer.json": whole, name: data}
    with pytest.raises(InputError, match=message) as caught:
        Tokenizer(TokenizerFiles(files, "ck"))
    assert f"ck/{name}" in str(caught.value)
