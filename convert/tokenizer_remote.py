"""Tokenizers whose classes come with the checkpoint: what their code adds to the files, which is all that is needed.

Sources: tokenization_chatglm.py of ChatGLM2, ChatGLM3 and GLM-4-9b, tokenization_qwen.py of Qwen; none of them is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from quantpress.convert.files import shown
from quantpress.convert.gguf.vocab_sentencepiece import read_sentencepiece
from quantpress.convert.tokenizer_tiktoken import count_ranks, looks_like_tiktoken, tiktoken_json
from quantpress.quant.errors import InputError

__all__ = ["RemoteTokenizer", "class_tokens", "remote_json", "remote_tokenizer", "tiktoken_file"]

_TIKTOKEN_FILES = ("qwen.tiktoken", "tokenizer.model")

_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GLM4_SPLIT = _QWEN_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
_QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205)))
_CHATGLM2_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
_CHATGLM3_TOKENS = (*_CHATGLM2_TOKENS, "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")


@dataclass(frozen=True, slots=True)
class RemoteTokenizer:
    """What the code of a tokenizer's class says.

    Attributes:
        split: expression whose matches are merged, where the vocabulary is tiktoken's.
        nfc: text is put into Unicode NFC first.
        tokens: special tokens that follow the vocabulary's last id.
    """

    split: str
    nfc: bool = False
    tokens: tuple[str, ...] = ()


_GLM4 = RemoteTokenizer(_GLM4_SPLIT)  # its special tokens are in tokenizer_config.json
_KNOWN: Mapping[str, RemoteTokenizer] = MappingProxyType(
    {
        "ChatGLM4Tokenizer": _GLM4,
        "QWenTokenizer": RemoteTokenizer(_QWEN_SPLIT, nfc=True, tokens=_QWEN_TOKENS),
    }
)


def remote_tokenizer(name: str, model: str, *, tiktoken: bool) -> RemoteTokenizer | None:
    """Gives what is known of a class; None for any other. None of these puts BOS before a text.

    Args:
        name: `tokenizer_class` of tokenizer_config.json.
        model: `_name_or_path` of config.json: ChatGLM2 and 3 have the same class, and ChatGLM2 no tokens for roles.
        tiktoken: the vocabulary is tiktoken's, as that of those GLM-4 whose class is called like ChatGLM's.
    """
    if name != "ChatGLMTokenizer":
        return _KNOWN.get(name)
    if tiktoken:
        return _GLM4
    return RemoteTokenizer("", tokens=_CHATGLM2_TOKENS if "chatglm2" in model.lower() else _CHATGLM3_TOKENS)


def tiktoken_file(files: Mapping[str, bytes]) -> str | None:
    """Gives the name of the file that holds a vocabulary in tiktoken's form, if one does."""
    return next((name for name in _TIKTOKEN_FILES if name in files and looks_like_tiktoken(files[name])), None)


def remote_json(form: RemoteTokenizer | None, name: str, data: bytes, *, where: str) -> dict[str, Any]:
    """Gives what tiktoken's file and the class's code stand for as a tokenizer.json, without added tokens.

    Args:
        form: what is known of the class.
        name: of the class, for messages.
        data: contents of the file.
        where: the file, for messages.

    Raises:
        InputError: the class is not known, or the file is damaged.
    """
    if form is None:
        raise InputError(
            f"{where}: a vocabulary in tiktoken's form does not say how text is split, and how {shown(name)} does it "
            "is not known; save tokenizer.json with transformers (a fast tokenizer)"
        )
    return tiktoken_json(data, split=form.split, nfc=form.nfc, where=where)


def class_tokens(form: RemoteTokenizer | None, files: Mapping[str, bytes], *, where: str) -> dict[int, str]:
    """Gives the special tokens that a class puts behind the vocabulary of its file: id -> text.

    Raises:
        InputError: the file is damaged.
    """
    if form is None or not form.tokens:
        return {}
    name = tiktoken_file(files)
    if name is not None:
        first = count_ranks(files[name])
    elif "tokenizer.model" in files:
        first = len(read_sentencepiece(files["tokenizer.model"], where=where).pieces)
    else:
        return {}
    return dict(enumerate(form.tokens, first))
