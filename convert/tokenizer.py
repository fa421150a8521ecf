"""Text to token ids and back, from whatever tokenizer files a checkpoint has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from quantpress.convert.tokenizer_files import TOKENIZER_FILE_NAMES, TokenizerFiles
from quantpress.convert.tokenizer_library import CANNOT_CUT, HuggingFace, library_errors
from quantpress.quant.errors import InputError

__all__ = ["TOKENIZER_FILE_NAMES", "Tokenizer", "TokenizerFiles", "adds_bos_eos", "special_ids"]

SPECIAL_KINDS = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")

# Classes whose constructor adds BOS when no file says otherwise (transformers: models/llama, models/gemma).
_BOS_CLASSES = frozenset(
    name + suffix for name in ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer") for suffix in ("", "Fast")
)
_SENTENCEPIECE_NAMES = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}  # when only tokenizer.model is there
# what the constructors of tokenizers that put such tokens around a text call them (transformers: models/bert, roberta)
_BERT_NAMES = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
_ROBERTA_NAMES = {**_SENTENCEPIECE_NAMES, "sep": "</s>", "pad": "<pad>", "cls": "<s>", "mask": "<mask>"}


class _Backend(Protocol):
    """A tokenizer library with one tokenizer loaded."""

    size: int

    def encode(self, text: str, *, special: bool) -> Sequence[int]: ...

    def encode_in_template(self, text: str) -> Sequence[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def token_id(self, token: str) -> int | None: ...


class Tokenizer:
    """Text to ids as the checkpoint's own tokenizer gives them; never adds BOS or EOS by itself.

    Attributes:
        files: the files it was made from.
        size: number of ids, one more than the greatest.
        bos_id, eos_id, unk_id, pad_id: ids of the special tokens, None where there is none.
        add_bos, add_eos: whether the checkpoint's tokenizer puts them around a text by default.
        chat_template: the default Jinja chat template, or None.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        """Loads the tokenizer.

        Args:
            files: the checkpoint's tokenizer files.

        Raises:
            InputError: there is no tokenizer, or its files are damaged or contradict each other.
        """
        self.files = files
        self._backend = _open_backend(files)
        self.size = self._backend.size
        ids = special_ids(files, self._backend.token_id)
        self.bos_id, self.eos_id = ids.get("bos"), ids.get("eos")
        self.unk_id, self.pad_id = ids.get("unk"), ids.get("pad")
        self.add_bos, self.add_eos = adds_bos_eos(files)
        self.chat_template = files.chat_templates.get("default")

    def encode(self, text: str, *, special: bool) -> npt.NDArray[np.int32]:
        """Gives the ids of a text, (T,) int32, without BOS and EOS.

        Args:
            text: any text.
            special: read special tokens that stand in the text as such (llama.cpp: `parse_special`); without it
                `<s>` in a text is three characters. Added tokens that are not special are always read.
        """
        return np.asarray(self._backend.encode(text, special=special), np.int32)

    def encode_in_template(self, text: str) -> list[int]:
        """Gives the ids as the tokenizer library gives them by default: special tokens read, template applied."""
        return [int(one) for one in self._backend.encode_in_template(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """Gives the text of ids, special tokens included."""
        return self._backend.decode([int(one) for one in ids])

    def token_id(self, token: str) -> int | None:
        """Gives the id of a token by its stored text, or None."""
        return self._backend.token_id(token)


def special_ids(files: TokenizerFiles, token_id: Any) -> dict[str, int]:
    """Gives the ids of the special tokens a checkpoint names ("bos", "eos", "unk", "pad", "sep", "cls", "mask").

    The order is llama.cpp's (gguf-py, `SpecialVocab`): the token text in the tokenizer's own files, then the ids in
    generation_config.json or config.json.

    Args:
        files: the checkpoint's tokenizer files.
        token_id: token text -> id or None.
    """
    result: dict[str, int] = {}
    own_names = _class_names(files)
    for kind in SPECIAL_KINDS:
        text = files.special_token(kind) or own_names.get(kind)
        found = None if text is None else token_id(text)
        if found is None and (ids := files.config_ids(kind)):
            found = ids[0]
        if found is None and kind == "unk" and files.tokenizer_json is not None:
            found = files.tokenizer_json["model"].get("unk_id")  # Unigram's; the library reads it in no other model
        if isinstance(found, int) and not isinstance(found, bool) and found >= 0:
            result[kind] = found
    return result


def _class_names(files: TokenizerFiles) -> dict[str, str]:
    """Gives the special tokens that a tokenizer's class has where no file names them."""
    found = files.tokenizer_json
    if found is None:
        return _SENTENCEPIECE_NAMES
    if found["model"].get("type") == "WordPiece":
        return _BERT_NAMES
    processor = found.get("post_processor")
    return _ROBERTA_NAMES if isinstance(processor, dict) and processor.get("type") == "RobertaProcessing" else {}


def adds_bos_eos(files: TokenizerFiles) -> tuple[bool, bool]:
    """Says whether the checkpoint's tokenizer puts BOS before and EOS after a text by default.

    `add_bos_token` / `add_eos_token` of tokenizer_config.json win, then the template in tokenizer.json's
    post-processor, then what the tokenizer class does (Llama's and Gemma's classes add BOS).
    """
    bos = files.tokenizer_class in _BOS_CLASSES or (files.tokenizer_json is None and files.remote is None)
    eos = False
    for template in _templates((files.tokenizer_json or {}).get("post_processor")):
        marks = [next(iter(part), "") if isinstance(part, Mapping) else "" for part in template]
        if "Sequence" in marks:
            bos, eos = marks[0] == "SpecialToken", marks[-1] == "SpecialToken"
    for key in ("add_bos_token", "add_eos_token"):
        value = files.config.get(key)
        if isinstance(value, bool):
            bos, eos = (value, eos) if key == "add_bos_token" else (bos, value)
    return bos, eos


def _templates(processor: object) -> list[list[Mapping[str, Any]]]:
    """Templates for one text inside a post-processor, in the order they run; trivial ones are left out."""
    if not isinstance(processor, dict):
        return []
    if processor.get("type") == "Sequence":
        steps = processor.get("processors")
        return [found for part in (steps if isinstance(steps, list) else []) for found in _templates(part)]
    if processor.get("type") in ("RobertaProcessing", "BertProcessing"):
        return [[{"SpecialToken": {}}, {"Sequence": {}}, {"SpecialToken": {}}]]
    single = processor.get("single")
    return [single] if isinstance(single, list) and len(single) > 1 else []


def _open_backend(files: TokenizerFiles) -> _Backend:
    if files.tokenizer_json is not None:
        return HuggingFace(files, files.tokenizer_json)
    if "tokenizer.model" in files:
        return _SentencePiece(files)
    raise InputError(
        f"{files.name}: no tokenizer: tokenizer.json, tokenizer.model, or vocab.json with merges.txt is needed"
    )


class _SentencePiece:
    """The `sentencepiece` library plus added tokens, for folders with tokenizer.model only."""

    def __init__(self, files: TokenizerFiles) -> None:
        from sentencepiece import SentencePieceProcessor

        self._where = files.where("tokenizer.model")
        with library_errors(self._where, "not a SentencePiece model"):
            self._library = SentencePieceProcessor(model_proto=files.files["tokenizer.model"])
            pieces = self._library.get_piece_size()
            self._control = {
                self._library.id_to_piece(one): one
                for one in range(pieces)
                if self._library.is_control(one) or self._library.is_unknown(one)
            }
        self._pieces = pieces
        self._added = {token["content"]: token for token in files.added_tokens}
        self._texts = {token["id"]: token["content"] for token in files.added_tokens}
        self.size = max([pieces, *(one + 1 for one in self._texts)])

    @cached_property
    def _splitters(self) -> dict[bool, re.Pattern[str] | None]:
        ordinary = {content for content, token in self._added.items() if not token["special"]}
        every = set(self._added) | set(self._control)
        return {False: _alternatives(ordinary), True: _alternatives(every)}

    def encode(self, text: str, *, special: bool) -> Sequence[int]:
        splitter = self._splitters[special]
        ids: list[int] = []
        for part in splitter.split(text) if splitter else [text]:
            if splitter and splitter.fullmatch(part):
                token = self._added.get(part)
                ids.append(token["id"] if token else self._control[part])
            elif part:
                with library_errors(self._where, CANNOT_CUT):
                    ids.extend(self._library.encode(part))
        return ids

    def encode_in_template(self, text: str) -> Sequence[int]:
        return self.encode(text, special=True)

    def decode(self, ids: Sequence[int]) -> str:
        parts: list[str] = []
        run: list[int] = []
        for one in [*ids, -1]:
            if one in self._texts or one < 0:
                with library_errors(self._where, CANNOT_CUT):
                    parts += [self._library.decode(run) if run else "", self._texts.get(one, "")]
                run = []
            else:
                run.append(one)
        return "".join(parts)

    def token_id(self, token: str) -> int | None:
        if token in self._added:
            return int(self._added[token]["id"])
        found: int = self._library.piece_to_id(token)  # a model without an unknown piece has no id for what it lacks
        if not 0 <= found < self._pieces:
            return None
        with library_errors(self._where, CANNOT_CUT):
            return found if self._library.id_to_piece(found) == token else None


def _alternatives(tokens: Iterable[str]) -> re.Pattern[str] | None:
    ordered = sorted(tokens, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, ordered)) + ")") if ordered else None
