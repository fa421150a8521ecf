"""Checks what the metadata of a GGUF file says of its tokenizer, before tokenizer files are made of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from quantpress.convert.files import shown
from quantpress.quant.errors import InputError

__all__ = ["check_vocabulary"]

_PREFIX = "tokenizer."
_Check = Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, int) for one in value)


def _are_scores(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, (int, float)) and math.isfinite(one) for one in value)


_WANTED: Mapping[str, tuple[_Check, str]] = {
    "tokenizer.ggml.model": (_is_text, "a text"),
    "tokenizer.ggml.pre": (_is_text, "a text"),
    "tokenizer.ggml.tokens": (_are_texts, "an array of texts"),
    "tokenizer.ggml.merges": (_are_texts, "an array of texts"),
    "tokenizer.ggml.token_type": (_are_numbers, "an array of integers"),
    "tokenizer.ggml.scores": (_are_scores, "an array of finite numbers"),
    "tokenizer.ggml.add_bos_token": (_is_number, "true or false"),
    "tokenizer.ggml.add_eos_token": (_is_number, "true or false"),
    "tokenizer.ggml.add_space_prefix": (_is_number, "true or false"),
    "tokenizer.ggml.remove_extra_whitespaces": (_is_number, "true or false"),
}
_ID = (_is_number, "the id of a token")
_TEMPLATE = (_is_text, "a text")


def check_vocabulary(metadata: Mapping[str, Any], name: str) -> None:
    """Checks types, and that tokens and merges are texts that JSON can hold.

    Args:
        metadata: GGUF keys and plain values.
        name: the file, for messages.

    Raises:
        InputError: a value is of another type, or a text is not UTF-8.
    """
    for key, value in metadata.items():
        if not key.startswith(_PREFIX):
            continue
        is_id, is_template = key.endswith("_token_id"), key.startswith("tokenizer.chat_template")
        wanted = _ID if is_id else _TEMPLATE if is_template else _WANTED.get(key)
        # some files list the names of their templates beside them
        if wanted is not None and not wanted[0](value) and not (is_template and _are_texts(value)):
            raise InputError(f"{name}: metadata {key} is {shown(value)}, wanted {wanted[1]}")
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
        _check_utf8(metadata.get(key) or [], f"{name}: {key}")


def _check_utf8(texts: list[str], what: str) -> None:
    try:
        "".join(texts).encode()  # all at once: a vocabulary has hundreds of thousands
    except UnicodeEncodeError:
        wrong = next(text for text in texts if not _is_utf8(text))
        raise InputError(f"{what} holds {shown(wrong)}, which is not UTF-8, as tokenizer files have to be") from None


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
