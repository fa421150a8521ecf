"""Made-up tokenizer files of every kind: through the tokenizer itself and through the plan of a GGUF vocabulary.

tokenizers is Rust and sentencepiece is C++: what either of them cannot bear has to be met before it gets there.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from quantpress.convert.files import inside
from quantpress.convert.gguf.vocab import plan_vocab
from quantpress.convert.hf_folder import Folder, read_tokenizer_files
from quantpress.convert.token_count import count_tokens
from quantpress.convert.tokenizer import Tokenizer
from quantpress.convert.tokenizer_files import TokenizerFiles
from quantpress.convert.tokenizer_tiktoken import byte_letters
from quantpress.quant.errors import InputError
from tests.fuzz.table_folder import llama_folder
from tests.fuzz.target import Target
from tests.fuzz.tokenizer_seeds import sentencepiece_seeds, tokenizer_json_seeds
from tests.tiny import VOCABULARY

__all__ = ["TARGETS"]

_TEXT = "The press takes 12 models;\n  naïve ones, 中文 and <|endoftext|> too.\x00"
_WORDS = (
    b'"Regex": "(a+)+b"', b'"type": "Unigram"', b'"type": "WordPiece"', b'"type": "ByteLevel"', b'"type": "Metaspace"',
    b'"type": "Precompiled", "precompiled_charsmap": ""', b'"type": "Replace"', b'"unk_id"', b'"ignore_merges": true',
    b'"byte_fallback": true', b'"dropout": 1.0', b'"added_tokens"', b'"id": 4294967295', b'"id": -1', b'"merges": []',
    b'"type": "Sequence"', b'"type": "TemplateProcessing"', b'"type": "RobertaProcessing"', b'"single": [1, 2]',
    b'"\\u2581"', b'"\\u0000"', b'""', b'"prepend_scheme": "first"', b'"type": "Strip"', b'"type": "Digits"',
    b'"max_input_chars_per_word": 0', b'"continuing_subword_prefix": "##"', b'"end_of_word_suffix": "</w>"',
)  # fmt: skip


def parse_tokenizer(folder: Path) -> object:
    """Reads the tokenizer's files of a folder, cuts a text with them and plans a vocabulary."""
    read = Folder(folder)
    files = read_tokenizer_files(read)
    for name in ("config.json", "generation_config.json"):
        if inside(folder, name).exists() and (data := read.read(name, 1 << 20)) is not None:
            files[name] = data
    found = TokenizerFiles(files, name=folder.name)
    refused: InputError | None = None
    try:
        plan: object = plan_vocab(found, vocab_size=VOCABULARY + 192, model_type="llama")
    except InputError as error:  # what GGUF cannot say, a tokenizer can
        refused, plan = error, None
    tokenizer = Tokenizer(found)
    for special in (False, True):
        ids = tokenizer.encode(_TEXT, special=special)
        tokenizer.decode(ids[:64].tolist())
    tokenizer.encode_in_template(_TEXT)
    if refused is not None:
        raise refused
    return plan


def _parse_counted(folder: Path) -> object:
    """Counts the tokens of a folder first, as every command does."""
    from quantpress.convert.open import open_checkpoint

    count_tokens(open_checkpoint(folder))
    return parse_tokenizer(folder)


def _only(*names: str, **contents: Any) -> Callable[[Path], None]:
    """Gives what makes a folder with a config.json and these tokenizer files."""

    def prepare(folder: Path) -> None:
        llama_folder(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if name not in names:
                (folder / name).unlink()
        for name, content in contents.items():
            (folder / f"{name}.json").write_text(json.dumps(content))

    return prepare


def _config_seeds() -> Mapping[str, bytes]:
    good: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>", "add_bos_token": True,
        "eos_token": {"content": "<|endoftext|>", "lstrip": False, "special": True, "__type": "AddedToken"},
        "chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}", "model_max_length": 1e30,
        "added_tokens_decoder": {
            "0": {"content": "<|endoftext|>", "special": True}, "320": {"content": "<|im_start|>", "special": True},
            "321": {"content": "<tool>", "special": False, "lstrip": True},
        },
    }  # fmt: skip
    odd = {
        "templates": {"chat_template": [{"name": "default", "template": "{{ 1 }}"}, {"name": "tool use"}, 3]},
        "squared": {"added_tokens_decoder": {"²": {"content": "x"}}},
        "digits": {"added_tokens_decoder": {"9" * 5000: {"content": "x"}}},
        "gap": {"added_tokens_decoder": {"400": {"content": "x"}}}, "minus": {"added_tokens_decoder": {"-1": {}}},
        "class": {"tokenizer_class": ["x"]}, "long-class": {"tokenizer_class": "x" * 9000}, "none": {},
        "code": {"chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}", "auto_map": {"A": "b.py"}},
    }  # fmt: skip
    return {name: json.dumps(value).encode() for name, value in {"good": good, **odd}.items()}


def _map_seeds() -> Mapping[str, bytes]:
    good = {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|endoftext|>"}, "additional_special_tokens": []}
    odd: dict[str, Any] = {"number": {"bos_token": 5}, "unknown": {"pad_token": "<pad>"}, "list": {"eos_token": ["x"]}}
    return {name: json.dumps(value).encode() for name, value in {"good": good, **odd}.items()}


def _added_seeds() -> Mapping[str, bytes]:
    values: dict[str, Any] = {
        "good": {"<tool>": 320, "<call>": 321}, "gap": {"<tool>": 400}, "text": {"<tool>": "320"}, "empty": {"": 320},
        "twice": {"<a>": 320, "<b>": 320}, "large": {"<a>": 1 << 31}, "bool": {"<a>": True}, "there": {"Ġ": 7},
    }  # fmt: skip
    return {name: json.dumps(value).encode() for name, value in values.items()}


def _template_seeds() -> Mapping[str, bytes]:
    return {
        "good": b"{% for message in messages %}<|im_start|>{{ message.role }}{{ message.content }}{% endfor %}",
        "broken": b"{% for x in %}{{", "latin": b"\xff\xfe{{ x }}", "zero": b"a\0b", "empty": b"",
        "code": b"{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "loop": b"{% for i in range(10**12) %}x{% endfor %}",
    }  # fmt: skip


def _vocab_seeds() -> Mapping[str, bytes]:
    letters = {letter: one for one, letter in enumerate(byte_letters())}
    good = {**letters, "th": 256, "the": 257, "<|endoftext|>": 258}
    values: dict[str, Any] = {
        "good": good, "gap": {**good, "x1": 300}, "twice": {**good, "x1": 5}, "text": {**good, "x": "5"},
        "minus": {**good, "x1": -1}, "large": {**good, "x1": 1 << 40}, "half": {**letters, "th": 0.5}, "none": {},
        "without": {key: value for key, value in good.items() if key != "th"}, "wide": {**good, "x1": (1 << 32) - 1},
    }  # fmt: skip
    return {name: json.dumps(value).encode() for name, value in values.items()}


def _with_merges(folder: Path) -> None:
    _only(tokenizer_config={"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"})(folder)
    (folder / "merges.txt").write_bytes(_merges_seeds()["good"])
    (folder / "vocab.json").write_bytes(_vocab_seeds()["good"])


def _merges_seeds() -> Mapping[str, bytes]:
    return {
        "good": b"#version: 0.2\nt h\nth e\n", "unknown": b"t h\nx yz\n", "three": b"t h e\n", "twice": b"t h\nt h\n",
        "empty": b"", "latin": b"\xe9 t\n", "separators": "t\x85h e\u2028t h\n".encode(), "spaces": b"t  h\n \n",
        "self": b"t h\nth e\nthe the\n",
    }  # fmt: skip


def _with_vocab_txt(folder: Path) -> None:
    _only(tokenizer_config={"tokenizer_class": "BertTokenizer"})(folder)
    (folder / "vocab.txt").write_bytes(_txt_seeds()["good"])


def _txt_seeds() -> Mapping[str, bytes]:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "press", "##es", *"abcdefghijklmnopqrstuvwxyz"]
    return {
        "good": "\n".join(pieces).encode() + b"\n", "windows": "\r\n".join(pieces).encode(), "none": b"",
        "twice": "\n".join([*pieces, "the", "the"]).encode(), "bare": b"the\npress\n", "latin": b"[PAD]\n\xff\n",
        "blank": "\n".join([*pieces, "", "", "##"]).encode(), "space": "\n".join([*pieces, "▁the", "a b"]).encode(),
    }  # fmt: skip


def _with_tiktoken(folder: Path) -> None:
    _only(tokenizer_config={"tokenizer_class": "QWenTokenizer"})(folder)
    (folder / "qwen.tiktoken").write_bytes(_tiktoken_seeds()["good"])


def _tiktoken_seeds() -> Mapping[str, bytes]:
    tokens = [bytes((byte,)) for byte in range(256)] + [b"th", b"the", b" t", b" th", b" the"]
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    good = b"".join(lines)
    return {
        "good": good, "huge-rank": good + b"YWI= 9999999999\n", "gap": good + b"YWI= 290\n",
        "many": good + b"YWI= 2000000\n",
        "twice": good + b"dGg= 261\n", "same": good + b"YWI= 3\n", "short": good[:1000], "bad64": good + b"YW= 261\n",
        "long": good + base64.b64encode(b"a" * 2000) + b" 261\n",
        "run": good + b"\n\n  \n", "unmade": good + b"eHl6 261\n",
    }  # fmt: skip


def _with_spiece(folder: Path) -> None:
    _only(tokenizer_config={"tokenizer_class": "T5Tokenizer", "extra_ids": 4})(folder)


_BPE, _UNIGRAM = partial(sentencepiece_seeds, "bpe"), partial(sentencepiece_seeds, "unigram")

TARGETS: tuple[Target, ...] = (
    Target("tokenizer-json", "tokenizer.json", llama_folder, _parse_counted, tokenizer_json_seeds, _WORDS),
    Target("tokenizer-config", "tokenizer_config.json", llama_folder, _parse_counted, _config_seeds, _WORDS),
    Target("special-tokens-map", "special_tokens_map.json", _only("tokenizer.json"), parse_tokenizer, _map_seeds),
    Target("added-tokens", "added_tokens.json", llama_folder, _parse_counted, _added_seeds),
    Target("chat-template", "chat_template.jinja", llama_folder, parse_tokenizer, _template_seeds),
    Target("vocab-json", "vocab.json", _with_merges, _parse_counted, _vocab_seeds),
    Target("merges-txt", "merges.txt", _with_merges, _parse_counted, _merges_seeds, (b"\x1c", b"\r", b"\x85")),
    Target("vocab-txt", "vocab.txt", _with_vocab_txt, _parse_counted, _txt_seeds, (b"##", b"[UNK]", b"\n\n", b"\r")),
    Target("tiktoken", "qwen.tiktoken", _with_tiktoken, _parse_counted, _tiktoken_seeds, (b"YWI= 999\n", b"\r\n")),
    Target("sentencepiece", "tokenizer.model", _only(), _parse_counted, _BPE, max_len=1 << 14),
    Target("sentencepiece-unigram", "spiece.model", _with_spiece, _parse_counted, _UNIGRAM, max_len=1 << 14),
)  # fmt: skip
