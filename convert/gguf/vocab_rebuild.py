"""From GGUF's `tokenizer.*` metadata back to tokenizer files that cut text as llama.cpp does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from quantpress.convert.files import shown
from quantpress.convert.gguf.pretokenizers import GPT2_SPLIT, Pretokenizer, named
from quantpress.convert.gguf.vocab_merges import Merge, merges_from_scores
from quantpress.convert.gguf.vocab_metadata import check_vocabulary
from quantpress.convert.gguf.vocab_rebuild_unigram import UNIGRAM_DEFAULTS, unigram_core
from quantpress.convert.gguf.vocab_tokens import SPACE, TokenType
from quantpress.convert.gguf.vocab_wordpiece import bert_defaults, wordpiece_core
from quantpress.convert.tokenizer_files import TokenizerFiles
from quantpress.quant.errors import InputError

__all__ = ["tokenizer_files_from_gguf"]

# Names under which llama.cpp adds BOS when the file does not say (src/llama-vocab.cpp, llama_vocab::impl::load)
_BOS_BY_DEFAULT = frozenset(
    {
        *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
        *("tekken", "chameleon"),
    }
)
_BOS_ALWAYS = frozenset({"gemma4", "granite-embed-multi-311m"})
_KINDS = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "pad": "padding",
    "sep": "seperator",
    "mask": "mask",
    "cls": "cls",
}
_SPM_DEFAULTS = {"bos": 1, "eos": 2, "unk": 0}
# Phi-3's special tokens take the spaces behind them with them; llama.cpp knows by the model's name
_KEEP_SPACES = frozenset({"<unk>", "<s>", "<|endoftext|>"})


def tokenizer_files_from_gguf(metadata: Mapping[str, Any], *, name: str = "gguf") -> TokenizerFiles:
    """Rebuilds tokenizer.json, tokenizer_config.json, special_tokens_map.json and generation_config.json.

    Args:
        metadata: GGUF keys and plain values (`tokenizer.*`, and `general.name`).
        name: the file, for messages.

    Raises:
        InputError: the vocabulary is of a kind that cannot be rebuilt, or damaged.
    """
    check_vocabulary(metadata, name)
    model = metadata.get("tokenizer.ggml.model")
    tokens = _tokens(metadata, name)
    types = _types(metadata, len(tokens), name)
    defaults = {"llama": _SPM_DEFAULTS, "t5": UNIGRAM_DEFAULTS, "bert": bert_defaults(metadata)}.get(str(model), {})
    specials = _special_texts(metadata, tokens, defaults)
    if model == "llama":
        core, add_bos = _spm(metadata, tokens, types, name), True
    elif model in ("gpt2", "gemma4"):
        pre = "gemma4" if model == "gemma4" else str(metadata.get("tokenizer.ggml.pre") or "default")
        core, add_bos = _bpe(metadata, tokens, named(pre), pre, types, name), pre in _BOS_BY_DEFAULT
    elif model == "t5":
        core, add_bos = unigram_core(metadata, tokens, types, unknown=specials.get("unk"), name=name), False
    elif model == "bert":
        unknown = specials.setdefault("unk", "[UNK]")
        core, add_bos = wordpiece_core(metadata, tokens, types, unknown=unknown, name=name), True
    else:
        raise InputError(
            f"{name}: tokenizer.ggml.model {shown(model)} cannot be turned into tokenizer files; 'llama', 'gpt2', 't5' "
            "and 'bert' can"
        )
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos))
    if metadata.get("tokenizer.ggml.pre") in _BOS_ALWAYS or model == "gemma4":
        add_bos = True
    add_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", model in ("t5", "bert")))
    around = (specials.get("bos") if add_bos else None, specials.get("eos") if add_eos else None)
    tokenizer_json = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(tokens, types, str(metadata.get("general.name", "")).lower()),
        **core,
        "post_processor": _post_processor(around, tokens),
    }
    return TokenizerFiles(_files(metadata, tokenizer_json, specials, add_bos=add_bos, add_eos=add_eos), name)


def _tokens(metadata: Mapping[str, Any], name: str) -> list[str]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, Sequence) or isinstance(tokens, str) or not tokens:
        raise InputError(f"{name}: tokenizer.ggml.tokens is missing or empty")
    # llama.cpp gives empty tokens a name of their own
    named_tokens = [token or f"[EMPTY_{one}]" for one, token in enumerate(map(str, tokens))]
    if len(set(named_tokens)) != len(named_tokens):
        seen: set[str] = set()
        twice = next(token for token in named_tokens if token in seen or seen.add(token))  # type: ignore[func-returns-value]
        raise InputError(f"{name}: tokenizer.ggml.tokens holds {shown(twice)} twice")
    return named_tokens


def _types(metadata: Mapping[str, Any], count: int, name: str) -> list[int]:
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:
        return [int(TokenType.NORMAL)] * count
    found = [int(one) for one in types]
    if len(found) < count:
        raise InputError(f"{name}: tokenizer.ggml.token_type has {len(found)} entries for {count} tokens")
    return found


def _special_texts(metadata: Mapping[str, Any], tokens: Sequence[str], defaults: Mapping[str, int]) -> dict[str, str]:
    result = {}
    for kind, key in _KINDS.items():
        one = metadata.get(f"tokenizer.ggml.{key}_token_id", defaults.get(kind))
        if one is not None and 0 <= int(one) < len(tokens):
            result[kind] = tokens[int(one)]
    return result


def _added(tokens: Sequence[str], types: Sequence[int], model_name: str) -> list[dict[str, Any]]:
    """Tokens that llama.cpp looks for in the raw text before anything else (tokenizer_st_partition)."""
    is_phi3 = "phi-3" in model_name or "phi3" in model_name
    added = []
    for one, (token, kind) in enumerate(zip(tokens, types, strict=False)):
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED):
            rstrip = is_phi3 and token not in _KEEP_SPACES
            flags = {"single_word": False, "lstrip": False, "rstrip": rstrip, "normalized": False}
            added.append({"id": one, "content": token, **flags, "special": kind != TokenType.USER_DEFINED})
    return added


def _spm(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], name: str) -> dict[str, Any]:
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) < len(tokens):
        raise InputError(f"{name}: tokenizer.ggml.scores is missing or shorter than tokenizer.ggml.tokens")
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    escape: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    normalizers = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    unknown = next((token for token, kind in zip(tokens, types, strict=False) if kind == TokenType.UNKNOWN), None)
    merges = merges_from_scores(tokens, scores[: len(tokens)])
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*normalizers, escape]},
        "pre_tokenizer": None,
        "decoder": _decoder(strip),
        "model": _bpe_model(tokens, merges, unk_token=unknown, byte_fallback=True, fuse_unk=True),
    }


def _bpe(
    metadata: Mapping[str, Any], tokens: Sequence[str], pre: Pretokenizer, key: str, types: Sequence[int], name: str
) -> dict[str, Any]:
    merges = _merges(metadata, tokens, name)
    if not pre.rebuilds:
        raise InputError(f"{name}: pre-tokenizer {key!r} splits in a way that tokenizer.json cannot say")
    splits = [_split(expression) for expression in pre.splits]
    if not pre.byte_level:
        has_bytes = TokenType.BYTE in types
        # without bytes llama.cpp drops unknown characters; here they must at least keep their neighbours apart
        unknown = None if has_bytes else _special_texts(metadata, tokens, {}).get("unk")
        escape = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        return {
            "normalizer": escape,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits},
            "decoder": _decoder([]),
            "model": _bpe_model(tokens, merges, byte_fallback=has_bytes, unk_token=unknown),
        }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    if pre.splits[-1:] == (GPT2_SPLIT,):  # written as the library's own ByteLevel, which other tools recognize
        splits = splits[:-1]
    uses_regex = pre.splits[-1:] == (GPT2_SPLIT,)
    steps = [*splits, {**byte_level, "use_regex": uses_regex}]
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0],
        "decoder": {**byte_level, "use_regex": True},
        "model": _bpe_model(tokens, merges, ignore_merges=pre.ignore_merges),
    }


def _merges(metadata: Mapping[str, Any], tokens: Sequence[str], name: str) -> list[Merge]:
    stored = metadata.get("tokenizer.ggml.merges")
    if stored is None:
        raise InputError(f"{name}: tokenizer.ggml.merges is missing")
    known = set(tokens)
    merges: dict[Merge, None] = {}
    for entry in stored:
        text = str(entry)
        at = text.find(" ", 1)  # where llama.cpp cuts
        left, right = (text[:at], text[at + 1 :]) if at > 0 else ("", "")
        if not (left in known and right in known and left + right in known):
            raise InputError(f"{name}: merge {shown(text)} joins or makes something that is no token")
        merges.setdefault((left, right))
    return list(merges)


def _split(expression: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


def _decoder(strip: list[dict[str, Any]]) -> dict[str, Any]:
    unescape = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return {"type": "Sequence", "decoders": [unescape, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]}


def _bpe_model(tokens: Sequence[str], merges: Sequence[Merge], **options: object) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **options,
        "vocab": {token: one for one, token in enumerate(tokens)},
        "merges": [list(pair) for pair in merges],
    }


def _post_processor(around: tuple[str | None, str | None], tokens: Sequence[str]) -> dict[str, Any] | None:
    bos, eos = around
    if bos is None and eos is None:
        return None

    def template(*parts: str) -> list[dict[str, Any]]:
        ends = [{"SpecialToken": {"id": text, "type_id": 0}} if text else None for text in around]
        body = [{"Sequence": {"id": part, "type_id": 0}} for part in parts]
        return [step for part in body for step in (ends[0], part, ends[1]) if step]

    special = {text: {"id": text, "ids": [tokens.index(text)], "tokens": [text]} for text in around if text}
    return {
        "type": "TemplateProcessing",
        "single": template("A"),
        "pair": template("A", "B"),
        "special_tokens": special,
    }


def _files(
    metadata: Mapping[str, Any],
    tokenizer_json: dict[str, Any],
    specials: dict[str, str],
    *,
    add_bos: bool,
    add_eos: bool,
) -> dict[str, bytes]:
    stored = tokenizer_json["model"]["vocab"]
    vocab: Mapping[str, int] = (
        stored if isinstance(stored, dict) else {text: one for one, (text, _) in enumerate(stored)}
    )
    texts = {f"{kind}_token": text for kind, text in specials.items()}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **texts,
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
        "clean_up_tokenization_spaces": False,
    }
    generation: dict[str, Any] = {
        f"{kind}_token_id": vocab[specials[kind]] for kind in ("bos", "pad") if kind in specials
    }
    keys = [f"tokenizer.ggml.{kind}_token_id" for kind in ("eot", "eom")]
    ends = [vocab[specials["eos"]]] if "eos" in specials else []
    ends += [int(metadata[key]) for key in keys if key in metadata]
    if ends:
        generation["eos_token_id"] = ends[0] if len(ends) == 1 else list(dict.fromkeys(ends))
    files = {
        "tokenizer.json": tokenizer_json,
        "tokenizer_config.json": config,
        "special_tokens_map.json": texts,
        "generation_config.json": generation,
    }
    result = {file: json.dumps(value, ensure_ascii=False).encode() for file, value in files.items()}
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        result["chat_template.jinja"] = template.encode()
    prefix = "tokenizer.chat_template."
    for key, value in metadata.items():
        if key.startswith(prefix) and isinstance(value, str):
            result[f"additional_chat_templates/{key[len(prefix) :]}.jinja"] = value.encode()
    return result
