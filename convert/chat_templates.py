"""The chat templates of a checkpoint: text that is copied, and never run here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from quantpress.convert.files import shown
from quantpress.quant.errors import InputError

__all__ = ["template_texts"]

_EXTRA = "additional_chat_templates/"  # transformers writes named templates into this folder


def template_texts(
    stored: Any, files: Iterable[str], read: Callable[[str], str], where: Callable[[str], str]
) -> dict[str, str]:
    """Gives the templates by name; "default" is the one to use. Jinja files win over tokenizer_config.json.

    Args:
        stored: `chat_template` of tokenizer_config.json or chat_template.json.
        files: names of the tokenizer's files.
        read: gives the text of one.
        where: names one in messages.

    Raises:
        InputError: a template is no text, or has a zero byte, at which llama.cpp would end it.
    """
    templates = _stored(stored, where("tokenizer_config.json"))
    names = sorted(files)
    for file in names:
        if file.startswith(_EXTRA) and file.endswith(".jinja"):
            templates[file[len(_EXTRA) : -len(".jinja")]] = _text(read(file), where(file))
    if "chat_template.jinja" in names:
        templates["default"] = _text(read("chat_template.jinja"), where("chat_template.jinja"))
    return templates


def _stored(stored: Any, where: str) -> dict[str, str]:
    if stored is None:
        return {}
    if isinstance(stored, str):
        return {"default": _text(stored, where)}
    templates = {}
    for entry in stored if isinstance(stored, list) else [stored]:
        if not isinstance(entry, dict) or not isinstance(entry.get("template"), str):
            raise InputError(f"{where}: 'chat_template' is {shown(stored)}, wanted text or a list of named texts")
        templates[str(entry.get("name", ""))] = _text(entry["template"], where)
    return templates


def _text(template: str, where: str) -> str:
    if "\0" in template:
        raise InputError(f"{where}: a zero byte in the chat template, at character {template.index(chr(0))}")
    return template
