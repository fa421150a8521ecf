"""WordPiece tokenizers from vocab.txt, as transformers makes them where there is no tokenizer.json.

Source: transformers, models/bert/tokenization_bert.py (BertTokenizer), which DistilBERT's tokenizer is, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpress.convert.files import shown
from quantpress.quant.errors import InputError

__all__ = ["wordpiece_json"]

_CLASSES = frozenset({"", "BertTokenizer", "BertTokenizerFast", "DistilBertTokenizer", "DistilBertTokenizerFast"})
_SPECIALS = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
_LONGEST = 100  # characters of a word; a longer one is unknown


def wordpiece_json(vocab: str, config: Mapping[str, Any], specials: Mapping[str, str], where: str) -> dict[str, Any]:
    """Gives the tokenizer.json that vocab.txt and tokenizer_config.json stand for.

    Args:
        vocab: contents of vocab.txt, a token in each line.
        config: contents of tokenizer_config.json.
        specials: texts of special tokens that files name ("cls" -> "[CLS]").
        where: the file, for messages.

    Raises:
        InputError: the tokenizer is of another class, or a special token is not in the vocabulary.
    """
    name = config.get("tokenizer_class", "")
    if not isinstance(name, str) or name not in _CLASSES:
        raise InputError(f"{where}: how {shown(name)} splits text is not known; save tokenizer.json")
    lines = vocab.removesuffix("\n").split("\n")
    ids = {line.removesuffix("\r"): number for number, line in enumerate(lines)}
    named = {**_SPECIALS, **specials}
    missing = [text for kind, text in named.items() if kind in _SPECIALS and text not in ids]
    if missing:
        raise InputError(f"{where}: special token {shown(missing[0])} is not in the vocabulary")
    normalizer = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": config.get("tokenize_chinese_chars", True),
        "strip_accents": config.get("strip_accents"),
        "lowercase": config.get("do_lower_case", True),
    }
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = sorted((ids[named[kind]], named[kind]) for kind in _SPECIALS)
    return {
        "version": "1.0",
        "added_tokens": [{"id": token_id, "content": text, **flags} for token_id, text in added],
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": _template(named["cls"], named["sep"], ids),
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": named["unk"],
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": _LONGEST,
            "vocab": ids,
        },
    }


def _template(first: str, last: str, ids: Mapping[str, int]) -> dict[str, Any]:
    """Gives the post-processor: `[CLS] A [SEP]`, `[CLS] A [SEP] B [SEP]`."""

    def special(text: str, type_id: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": text, "type_id": type_id}}

    single = [special(first, 0), {"Sequence": {"id": "A", "type_id": 0}}, special(last, 0)]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}, special(last, 1)],
        "special_tokens": {text: {"id": text, "ids": [ids[text]], "tokens": [text]} for text in (first, last)},
    }
