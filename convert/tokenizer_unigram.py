"""What spiece.model and sentencepiece.bpe.model stand for without a tokenizer.json: a Unigram tokenizer.json.

The ids are those of transformers' tokenizer classes and not always SentencePiece's own: T5's appends sentinels,
XLM-RoBERTa's keeps fairseq's order (transformers models/t5/tokenization_t5.py, models/xlm_roberta/
tokenization_xlm_roberta.py).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from quantpress.convert.files import shown
from quantpress.convert.gguf.vocab_sentencepiece import UNIGRAM, SentencePieceModel, read_sentencepiece
from quantpress.quant.errors import InputError

__all__ = ["SENTENCEPIECE_FILES", "SentencePieceForm", "form_of", "unigram_json"]

SENTENCEPIECE_FILES = ("spiece.model", "sentencepiece.bpe.model")
"""Names that say, with the tokenizer's class, how ids follow from SentencePiece's."""

_SPACE = "▁"
_UNKNOWN = 2  # type of a piece
_SENTINELS = 100  # T5's, where the configuration does not say
_MAX_SENTINELS = 10_000


@dataclass(frozen=True, slots=True)
class SentencePieceForm:
    """How a class of transformers makes ids of SentencePiece's.

    Attributes:
        names: kind of special token -> its text, where no file says.
        first: tokens that stand in place of the first pieces; empty: the pieces' own.
        last: tokens after the last piece.
        begins, ends: tokens around a text.
        sentinels: so many `<extra_id_N>` follow unless the configuration says otherwise.
    """

    names: Mapping[str, str]
    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    begins: str = ""
    ends: str = ""
    sentinels: int = 0


_T5 = SentencePieceForm(
    MappingProxyType({"pad": "<pad>", "eos": "</s>", "unk": "<unk>"}), ends="</s>", sentinels=_SENTINELS
)
_XLM_ROBERTA = SentencePieceForm(
    MappingProxyType(
        {
            "bos": "<s>",
            "pad": "<pad>",
            "eos": "</s>",
            "unk": "<unk>",
            "cls": "<s>",
            "sep": "</s>",
            "mask": "<mask>",
        }
    ),
    first=("<s>", "<pad>", "</s>", "<unk>"),
    last=("<mask>",),
    begins="<s>",
    ends="</s>",
)
_BY_CLASS = {
    **dict.fromkeys(("T5Tokenizer", "T5TokenizerFast", "MT5Tokenizer", "MT5TokenizerFast"), _T5),
    **dict.fromkeys(("XLMRobertaTokenizer", "XLMRobertaTokenizerFast"), _XLM_ROBERTA),
}
_BY_MODEL_TYPE = {
    **dict.fromkeys(("t5", "mt5", "umt5", "longt5"), _T5),
    **dict.fromkeys(("xlm-roberta", "xlm-roberta-xl"), _XLM_ROBERTA),
}


def form_of(tokenizer_class: str, model_type: object, *, where: str) -> SentencePieceForm:
    """Finds the form by the tokenizer's class, or by the model where no file names a class.

    Raises:
        InputError: the ids of this class are not known here.
    """
    found = _BY_CLASS.get(tokenizer_class)
    if found is None and not tokenizer_class and isinstance(model_type, str):
        found = _BY_MODEL_TYPE.get(model_type)
    if found is None:
        name = shown(tokenizer_class)[1:-1] if tokenizer_class else "the tokenizer"
        raise InputError(
            f"{where}: no tokenizer.json, and which ids {name} gives its pieces is not "
            "known; save tokenizer.json with transformers (a fast tokenizer)"
        )
    return found


def unigram_json(data: bytes, form: SentencePieceForm, config: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Gives the tokenizer.json that a SentencePiece file stands for.

    Args:
        data: contents of the file.
        form: how ids follow from it.
        config: tokenizer_config.json.
        where: the file, for messages.

    Raises:
        InputError: the file is damaged or of another kind than Unigram.
    """
    model = read_sentencepiece(data, where=where)
    if model.model_type != UNIGRAM or model.suffix_spaces or not model.escape_whitespaces:
        raise InputError(
            f"{where}: a Unigram model with spaces before words is wanted (found model type {model.model_type}); save "
            "tokenizer.json with transformers (a fast tokenizer)"
        )
    vocab = _vocabulary(model, form, config, where)
    ids = {text: one for one, (text, _) in enumerate(vocab)}
    special = [text for text in dict.fromkeys(form.names.values()) if text in ids]
    special += [text for text, _ in vocab[len(vocab) - _sentinels(form, config, where) :]]
    return {
        "version": "1.0",
        "added_tokens": [_special_token(ids[text], text) for text in special],
        "normalizer": _normalizer(model),
        "pre_tokenizer": _metaspace(model),
        "post_processor": _post_processor(form, ids, where),
        "decoder": _metaspace(model),
        "model": {
            "type": "Unigram",
            "unk_id": ids.get(form.names["unk"]),
            "byte_fallback": model.byte_fallback,
            "vocab": [list(pair) for pair in vocab],
        },
    }


def _vocabulary(
    model: SentencePieceModel, form: SentencePieceForm, config: Mapping[str, Any], where: str
) -> list[tuple[str, float]]:
    pieces = [(text, score) for text, score, _ in model.pieces]
    if form.first:
        own = [text for text, _, kind in model.pieces if kind != 1]
        if set(own) != {"<unk>", "<s>", "</s>"}:  # fairseq's own three, which its four replace
            raise InputError(f"{where}: its special pieces are {shown(own)}, not those of the tokenizer's class")
        pieces = [(text, 0.0) for text in form.first] + pieces[len(own) :]
    elif not any(kind == _UNKNOWN for _, _, kind in model.pieces):
        raise InputError(f"{where}: it has no unknown piece")
    pieces += [(text, 0.0) for text in form.last]
    count = _sentinels(form, config, where)
    return pieces + [(f"<extra_id_{number}>", 0.0) for number in reversed(range(count))]


def _sentinels(form: SentencePieceForm, config: Mapping[str, Any], where: str) -> int:
    count = config.get("extra_ids", form.sentinels) if form.sentinels else 0
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= _MAX_SENTINELS:
        raise InputError(f"{where}: 'extra_ids' of tokenizer_config.json is no number from 0 to {_MAX_SENTINELS}")
    return count


def _special_token(token_id: int, text: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    # XLM-RoBERTa's mask takes the space before it with it
    return {"id": token_id, "content": text, **flags, "lstrip": text == "<mask>", "special": True}


def _normalizer(model: SentencePieceModel) -> dict[str, Any] | None:
    steps: list[dict[str, Any]] = []
    if model.charsmap:
        text = base64.b64encode(model.charsmap).decode("ascii")
        steps.append({"type": "Precompiled", "precompiled_charsmap": text})
    if model.remove_extra_whitespaces:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    return {"type": "Sequence", "normalizers": steps} if steps else None


def _metaspace(model: SentencePieceModel) -> dict[str, Any]:
    scheme = "always" if model.add_dummy_prefix else "never"
    return {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": scheme, "split": False}


def _post_processor(form: SentencePieceForm, ids: Mapping[str, int], where: str) -> dict[str, Any] | None:
    around = [text for text in (form.begins, form.ends) if text]
    if missing := [text for text in around if text not in ids]:
        raise InputError(f"{where}: it has no piece {missing[0]}, which the tokenizer's class puts around texts")

    def template(*parts: str) -> list[dict[str, Any]]:
        marks = [{"SpecialToken": {"id": text, "type_id": 0}} if text else None for text in (form.begins, form.ends)]
        body = [{"Sequence": {"id": part, "type_id": 0}} for part in parts]
        return [step for part in body for step in (marks[0], part, marks[1]) if step]

    return {
        "type": "TemplateProcessing",
        "single": template("A"),
        "pair": template("A", "B"),
        "special_tokens": {text: {"id": text, "ids": [ids[text]], "tokens": [text]} for text in around},
    }
