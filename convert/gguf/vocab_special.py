"""Metadata about single tokens and the chat template: which id begins, ends, pads a text."""

from __future__ import annotations

from collections.abc import Callable
from string import ascii_letters, digits

from quantpress.convert.gguf.container import MetadataValue
from quantpress.convert.gguf.vocab_tokens import TokenTable, TokenType
from quantpress.convert.tokenizer import adds_bos_eos, special_ids
from quantpress.convert.tokenizer_files import TokenizerFiles

__all__ = ["special_metadata", "template_metadata"]

_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # GGUF's own spelling
    "pad": "padding_token_id",
    "cls": "cls_token_id",
    "mask": "mask_token_id",
}
# Texts by which llama.cpp finds fill-in-the-middle tokens (src/llama-vocab.cpp, llama_vocab::impl::load)
_FIM = {
    "fim_pre": ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>"),
    "fim_suf": ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>"),
    "fim_mid": ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>"),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
# BERT's tokens around a text are called otherwise; llama.cpp puts BOS before it (gguf-py, SpecialVocab does the same)
_STAND_INS = {"bos": "cls", "eos": "sep"}
_NAME_CHARACTERS = frozenset(ascii_letters + digits)


def special_metadata(
    files: TokenizerFiles, table: TokenTable, notes: Callable[[str], None]
) -> dict[str, MetadataValue]:
    """Gives `tokenizer.ggml.*_token_id`, `add_bos_token` and `add_eos_token`.

    GGUF has one end-of-text id; further ids of generation_config.json's list go to end-of-turn and end-of-message,
    which stop generation too.

    Args:
        files: the checkpoint's tokenizer files.
        table: the finished tokens.
        notes: takes sentences about what could not be written.
    """
    ids = special_ids(files, table.ids.get)
    for kind, other in _STAND_INS.items():
        if kind not in ids and other in ids:
            ids[kind] = ids[other]
    ends = list(dict.fromkeys([*([ids["eos"]] if "eos" in ids else []), *files.config_ids("eos")]))
    named = {_KEYS[kind]: one for kind, one in ids.items()}
    named |= dict(zip(("eos_token_id", "eot_token_id", "eom_token_id"), ends, strict=False))
    if len(ends) > 3:
        notes(f"GGUF holds three ids that end a text; {ends[3:]} of generation_config.json are left out")
    for kind, texts in _FIM.items():
        found = (table.ids[text] for text in texts if text in table.ids)
        one = next((one for one in found if _is_added(table.type_of(one))), None)
        if one is not None:
            named[f"{kind}_token_id"] = one
    result: dict[str, MetadataValue] = {}
    for key, one in named.items():
        if one < table.rows:
            result[f"tokenizer.ggml.{key}"] = ("uint32", one)
        else:
            notes(f"{key} is {one}, but the embedding has {table.rows} rows; it is left out")
    add_bos, add_eos = adds_bos_eos(files)
    if add_bos and "tokenizer.ggml.bos_token_id" not in result:
        notes("the tokenizer adds a BOS token but names none; add_bos_token is written as false")
        add_bos = False
    result["tokenizer.ggml.add_bos_token"] = ("bool", add_bos)
    result["tokenizer.ggml.add_eos_token"] = ("bool", add_eos and "tokenizer.ggml.eos_token_id" in result)
    return result


def template_metadata(files: TokenizerFiles) -> dict[str, MetadataValue]:
    """Gives `tokenizer.chat_template` and its named variants (gguf-py, GGUFWriter.add_chat_template)."""
    result: dict[str, MetadataValue] = {}
    names: list[str] = []
    for name, template in files.chat_templates.items():
        clean = "".join(one if one in _NAME_CHARACTERS else "_" for one in name)
        if clean == "default":
            result["tokenizer.chat_template"] = ("string", template)
        elif clean:
            names.append(clean)
            result[f"tokenizer.chat_template.{clean}"] = ("string", template)
    if names:
        result["tokenizer.chat_templates"] = ("array[string]", sorted(set(names)))
    return result


def _is_added(kind: TokenType) -> bool:
    return kind in (TokenType.CONTROL, TokenType.USER_DEFINED)
