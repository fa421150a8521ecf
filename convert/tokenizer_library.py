"""The `tokenizers` library with one tokenizer loaded: what it raises, panics too, becomes errors of our own."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from threading import Lock
from typing import Any

from quantpress.convert.files import shown
from quantpress.convert.tokenizer_files import TokenizerFiles
from quantpress.convert.tokenizer_steps import check_steps
from quantpress.quant.errors import InputError

__all__ = ["CANNOT_CUT", "HuggingFace", "library_errors"]

CANNOT_CUT = "the tokenizer cannot cut this text"

_PANIC = "PanicException"  # of PyO3; derived from BaseException, and no module has it to be imported from

_MAX_SIZE = 1 << 31  # ids are int32 in every runtime


@contextlib.contextmanager
def library_errors(where: str, what: str) -> Iterator[None]:
    """Turns whatever the library does with a stranger's file into an error that names the file.

    Args:
        where: the file.
        what: cannot be done with it, for the message.

    Raises:
        InputError: the library raised something, or panicked.
    """
    try:
        yield
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{where}: {what}: {shown(str(error), 200)}") from error
    except BaseException as error:
        if type(error).__name__ != _PANIC:
            raise
        raise InputError(f"{where}: {what}: {shown(str(error), 200)}") from error


class HuggingFace:
    """A tokenizer.json in the library.

    Attributes:
        size: number of ids, one more than the greatest.
    """

    def __init__(self, files: TokenizerFiles, tokenizer_json: Mapping[str, Any]) -> None:
        """Loads it.

        Raises:
            InputError: the library does not read it, or gives added tokens other ids.
        """
        from tokenizers import Tokenizer as Library

        self._where = where = files.where("tokenizer.json")
        check_steps(tokenizer_json, where)
        with library_errors(where, "not a tokenizer"):
            self._library = Library.from_str(json.dumps(tokenizer_json, ensure_ascii=False))
            self._library.no_padding()
            self._library.no_truncation()
        for token in files.added_tokens:
            if self._library.token_to_id(token["content"]) != token["id"]:
                found = self._library.token_to_id(token["content"])
                raise InputError(
                    f"{where}: added token {shown(token['content'])} is said to have id {token['id']} but gets "
                    f"{found}; ids of added tokens must follow the vocabulary without gaps"
                )
        self.size = 1 + max(self._library.get_vocab(with_added_tokens=True).values(), default=-1)
        if self.size > _MAX_SIZE:
            raise InputError(f"{where}: a token has the id {self.size - 1}, wanted ids below {_MAX_SIZE}")
        self._lock = Lock()

    def encode(self, text: str, *, special: bool) -> Sequence[int]:
        """Gives the ids of a text without what the template adds."""
        with self._lock, self._errors():  # the switch belongs to the tokenizer, not to the call
            self._library.encode_special_tokens = not special
            ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        return ids

    def encode_in_template(self, text: str) -> Sequence[int]:
        """Gives the ids of a text, special tokens read, with what the template adds."""
        with self._lock, self._errors():
            self._library.encode_special_tokens = False
            ids: list[int] = self._library.encode(text).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Gives the text of ids."""
        with self._errors():
            return str(self._library.decode(ids, skip_special_tokens=False))

    def token_id(self, token: str) -> int | None:
        """Gives the id of a token's text."""
        found: int | None = self._library.token_to_id(token)
        return found

    def _errors(self) -> contextlib.AbstractContextManager[None]:
        return library_errors(self._where, CANNOT_CUT)
