"""The tokenizer files of a checkpoint as they lie in its folder, and the facts that several of them state together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from quantpress.convert.chat_templates import template_texts
from quantpress.convert.files import shown
from quantpress.convert.json_reader import parse_json
from quantpress.convert.tokenizer_remote import (
    RemoteTokenizer,
    class_tokens,
    remote_json,
    remote_tokenizer,
    tiktoken_file,
)
from quantpress.convert.tokenizer_unigram import SENTENCEPIECE_FILES, form_of, unigram_json
from quantpress.convert.wordpiece import wordpiece_json
from quantpress.quant.errors import InputError

__all__ = ["TOKENIZER_FILE_NAMES", "TokenizerFiles"]

TOKENIZER_FILE_NAMES = (
    "tokenizer.json",
    "tokenizer.model",
    "qwen.tiktoken",
    *SENTENCEPIECE_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "generation_config.json",
    "config.json",
    "chat_template.jinja",
    "chat_template.json",
)
_DIGITS = re.compile(r"[0-9]{1,10}")

# tokenizer classes that exist without tokenizer.json -> the split of vocab.json + merges.txt they mean
_GPT2_CLASSES = frozenset({"", "GPT2Tokenizer", "GPT2TokenizerFast", "CodeGenTokenizer", "CodeGenTokenizerFast"})
_WORDPIECE_SPECIALS = ("unk", "sep", "pad", "cls", "mask")
_QWEN2_CLASSES = frozenset({"Qwen2Tokenizer", "Qwen2TokenizerFast"})
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer files of one checkpoint.

    Attributes:
        files: file name -> bytes, names as in `TOKENIZER_FILE_NAMES` (others are ignored). `config.json` is read
            only for token ids that no tokenizer file states.
        name: the checkpoint, for messages.
    """

    files: Mapping[str, bytes]
    name: str = "tokenizer"

    def __contains__(self, file: str) -> bool:
        """Says whether there is a file of this name."""
        return file in self.files

    def where(self, file: str) -> str:
        """Gives the name of a file for messages."""
        return f"{self.name}/{file}"

    def json_object(self, file: str) -> dict[str, Any]:
        """Parses a JSON file; a missing file is an empty object.

        Raises:
            InputError: the file is not a JSON object.
        """
        if file not in self.files:
            return {}
        value = parse_json(self.files[file], name=self.where(file))
        if not isinstance(value, dict):
            raise InputError(f"{self.where(file)}: JSON object expected, found {type(value).__name__}")
        return value

    def text(self, file: str) -> str:
        """Decodes a UTF-8 text file.

        Raises:
            InputError: the file is not UTF-8.
        """
        try:
            return self.files[file].decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{self.where(file)}: not UTF-8 at byte {error.start}") from error

    @cached_property
    def config(self) -> dict[str, Any]:
        """Contents of tokenizer_config.json."""
        return self.json_object("tokenizer_config.json")

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """Contents of generation_config.json."""
        return self.json_object("generation_config.json")

    @property
    def tokenizer_class(self) -> str:
        """`tokenizer_class` of tokenizer_config.json, or an empty string."""
        value = self.config.get("tokenizer_class")
        return value if isinstance(value, str) else ""

    @cached_property
    def tokenizer_json(self) -> dict[str, Any] | None:
        """Contents of tokenizer.json with every added token in it, or what vocab.json + merges.txt stand for.

        None when there is neither. Added tokens that only tokenizer_config.json or added_tokens.json name are put in,
        as transformers does when it loads the folder.

        Raises:
            InputError: a file is damaged, or the tokenizer class does not say how vocab.json is split.
        """
        if "tokenizer.json" in self.files:
            found = self.json_object("tokenizer.json")
            if not isinstance(found.get("model"), dict):
                raise InputError(f"{self.where('tokenizer.json')}: 'model' is missing or not an object")
        elif "vocab.json" in self.files and "merges.txt" in self.files:
            found = self._from_vocab_and_merges()
        elif self.tiktoken is not None:
            where = self.where(self.tiktoken)
            found = remote_json(self.remote, self.tokenizer_class, self.files[self.tiktoken], where=where)
        elif self._sentencepiece is not None:
            form = form_of(self.tokenizer_class, self._model_config.get("model_type"), where=self._sentencepiece)
            where = self.where(self._sentencepiece)
            found = unigram_json(self.files[self._sentencepiece], form, self.config, where=where)
        elif "vocab.txt" in self.files:
            specials = {kind: text for kind in _WORDPIECE_SPECIALS if (text := self.special_token(kind)) is not None}
            found = wordpiece_json(self.text("vocab.txt"), self.config, specials, self.where("vocab.txt"))
        else:
            return None
        vocab = found["model"].get("vocab")
        known = {token["id"] for token in self._added_of(found)}
        missing = [token for token in self.side_added_tokens if token["id"] not in known]
        added = self._added_of(found) + [
            token for token in missing if not (isinstance(vocab, dict) and _plain_in_vocab(token, vocab))
        ]
        return {**found, "added_tokens": sorted(added, key=lambda token: int(token["id"]))}

    @cached_property
    def tiktoken(self) -> str | None:
        """Name of the file that holds the vocabulary in tiktoken's form; None where another one is used."""
        return None if "tokenizer.json" in self.files else tiktoken_file(self.files)

    @cached_property
    def remote(self) -> RemoteTokenizer | None:
        """What is known of a tokenizer class that comes with the checkpoint; None for transformers' own."""
        model = self._model_config.get("_name_or_path")
        name = model if isinstance(model, str) else ""
        return remote_tokenizer(self.tokenizer_class, name, tiktoken=self.tiktoken is not None)

    @cached_property
    def added_tokens(self) -> list[dict[str, Any]]:
        """Added tokens by id: `id`, `content`, `special`, `normalized`, `lstrip`, `rstrip`, `single_word`."""
        if self.tokenizer_json is not None:
            return self._added_of(self.tokenizer_json)
        return self.side_added_tokens

    @cached_property
    def side_added_tokens(self) -> list[dict[str, Any]]:
        """Added tokens that tokenizer_config.json, added_tokens.json and the class's code name, by id."""
        decoder = self.config.get("added_tokens_decoder") or {}
        tokens: dict[int, dict[str, Any]] = {}
        for content, token_id in self.json_object("added_tokens.json").items():
            tokens[self._id(token_id, "added_tokens.json", content)] = {"content": content, "special": False}
        if not isinstance(decoder, dict):
            raise InputError(f"{self.where('tokenizer_config.json')}: 'added_tokens_decoder' is not an object")
        for key, value in decoder.items():
            token_id = self._id(int(key) if _DIGITS.fullmatch(key) else key, "tokenizer_config.json", key)
            if not isinstance(value, dict) or not isinstance(value.get("content"), str):
                raise InputError(f"{self.where('tokenizer_config.json')}: added token {shown(key)} has no 'content'")
            tokens[token_id] = value
        if "tokenizer.json" not in self.files:
            for token_id, content in class_tokens(self.remote, self.files, where=self.where("tokenizer.model")).items():
                tokens.setdefault(token_id, {"content": content, "special": True})
        return [_full_token(token_id, tokens[token_id]) for token_id in sorted(tokens)]

    def special_token(self, kind: str) -> str | None:
        """Text of a special token (`kind` is "bos", "eos", "unk", "pad", "sep", "cls" or "mask"), or None."""
        for source in (self.config, self._special_map):
            value = source.get(f"{kind}_token")
            if isinstance(value, dict):
                value = value.get("content")
            if isinstance(value, str):
                return value
            if isinstance(value, list | int | float) and not isinstance(value, bool):
                raise InputError(
                    f"{self.where('tokenizer_config.json')}: '{kind}_token' is {shown(value)}, wanted a text"
                )
        if "tokenizer.json" not in self.files and self._sentencepiece is not None:
            form = form_of(self.tokenizer_class, self._model_config.get("model_type"), where=self.name)
            return form.names.get(kind)
        return None

    @property
    def _sentencepiece(self) -> str | None:
        return next((file for file in SENTENCEPIECE_FILES if file in self.files), None)

    def config_ids(self, kind: str) -> list[int]:
        """Ids that generation_config.json, else config.json give for a special token; more than one is possible."""
        for source in (self.generation_config, self._model_config):
            value = source.get(f"{kind}_token_id")
            ids = value if isinstance(value, list) else [value]
            found = [one for one in ids if isinstance(one, int) and not isinstance(one, bool) and one >= 0]
            if found:
                return found
        return []

    @cached_property
    def chat_templates(self) -> dict[str, str]:
        """Chat templates by name; "default" is the one to use. Jinja files win over tokenizer_config.json."""
        stored = self.config.get("chat_template", self.json_object("chat_template.json").get("chat_template"))
        return template_texts(stored, self.files, self.text, self.where)

    @cached_property
    def _special_map(self) -> dict[str, Any]:
        return self.json_object("special_tokens_map.json")

    @cached_property
    def _model_config(self) -> dict[str, Any]:
        config = self.json_object("config.json")
        text_config = config.get("text_config")
        return {**config, **text_config} if isinstance(text_config, dict) else config

    def _id(self, value: object, file: str, token: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 31:
            raise InputError(f"{self.where(file)}: added token {shown(token)} has no valid id: {shown(value)}")
        return value

    def _added_of(self, tokenizer_json: Mapping[str, Any]) -> list[dict[str, Any]]:
        tokens = tokenizer_json.get("added_tokens") or []
        file = "tokenizer.json"
        if not isinstance(tokens, list):
            raise InputError(f"{self.where(file)}: 'added_tokens' is not a list")
        result = []
        for token in tokens:
            if not isinstance(token, dict) or not isinstance(token.get("content"), str):
                raise InputError(f"{self.where(file)}: an added token has no 'content'")
            result.append(_full_token(self._id(token.get("id"), file, token["content"]), token))
        return result

    def _from_vocab_and_merges(self) -> dict[str, Any]:
        split: list[dict[str, Any]] = []
        if self.tokenizer_class in _QWEN2_CLASSES:
            pattern = {"Regex": _QWEN2_SPLIT}
            split = [{"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}]
        elif self.tokenizer_class not in _GPT2_CLASSES:
            name = shown(self.tokenizer_class)[1:-1]
            raise InputError(
                f"{self.where('vocab.json')}: no tokenizer.json, and how {name} splits text is "
                "not known; save tokenizer.json with transformers (a fast tokenizer)"
            )
        lines = self.text("merges.txt").splitlines()
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        if bad := next((pair for pair in pairs if len(pair) != 2), None):
            raise InputError(f"{self.where('merges.txt')}: two parts and one space expected, found {shown(bad)}")
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": not split}
        return {
            "version": "1.0",
            "normalizer": {"type": "NFC"} if split else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*split, byte_level]},
            "post_processor": None,
            "decoder": {**byte_level, "use_regex": True},
            "model": {"type": "BPE", "vocab": self.json_object("vocab.json"), "merges": pairs},
        }


def _plain_in_vocab(token: Mapping[str, Any], vocab: Mapping[str, Any]) -> bool:
    return not token["special"] and vocab.get(token["content"]) == token["id"]


def _full_token(token_id: int, token: Mapping[str, Any]) -> dict[str, Any]:
    special = bool(token.get("special", False))
    flags = {key: bool(token.get(key, False)) for key in ("single_word", "lstrip", "rstrip")}
    normalized = bool(token.get("normalized", not special))
    return {"id": token_id, "content": token["content"], **flags, "normalized": normalized, "special": special}
