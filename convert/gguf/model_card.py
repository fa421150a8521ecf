"""Reads the few facts of a model card (README.md on the Hub) that GGUF has keys for; a strange card is no card."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quantpress.convert.gguf.container import MetadataValue

_MAX_FRONT = 1 << 16  # bytes between the two lines of dashes
_MAX_DEPTH = 8
_MAX_EVENTS = 20_000
_MAX_TEXT = 300  # characters of one value
_MAX_ITEMS = 200
_HUB = "https://huggingface.co/"


def read_card(card: bytes) -> dict[str, MetadataValue]:
    """Gives licence, base models, tags and languages of a model card.

    Args:
        card: README.md; its facts are YAML between two lines of three dashes at the start. What is not there, not of
            the usual form, or not YAML of a modest size without aliases, is left out: a card is a text for people.
    """
    front = _front_matter(card)
    facts = _load(front) if front else None
    if not isinstance(facts, dict):
        return {}
    metadata: dict[str, MetadataValue] = {}
    if licence := ",".join(_texts(facts.get("license"))):
        metadata["general.license"] = ("string", licence)
    for key, name in (("license_name", "general.license.name"), ("license_link", "general.license.link")):
        if text := _texts(facts.get(key))[:1]:
            metadata[name] = ("string", text[0])
    metadata |= _base_models(_texts(facts.get("base_model")))
    if tags := _texts(facts.get("tags")) + _texts(facts.get("pipeline_tag")):
        metadata["general.tags"] = ("array[string]", tags)
    if languages := _texts(facts.get("language")) or _texts(facts.get("languages")):
        metadata["general.languages"] = ("array[string]", languages)
    return metadata


def _base_models(ids: Sequence[str]) -> dict[str, MetadataValue]:
    if not ids:
        return {}
    metadata: dict[str, MetadataValue] = {"general.base_model.count": ("uint32", len(ids))}
    for number, model in enumerate(ids):
        start = f"general.base_model.{number}."
        organization, _, name = model.rpartition("/")
        metadata[start + "name"] = ("string", name)
        if organization and "/" not in organization:
            metadata[start + "organization"] = ("string", organization)
            metadata[start + "repo_url"] = ("string", _HUB + model)
    return metadata


def _front_matter(card: bytes) -> str:
    lines = card[: _MAX_FRONT + 8].decode("utf-8", "replace").splitlines()
    if not lines or lines[0].rstrip() != "---":
        return ""
    ends = [number for number, line in enumerate(lines[1:], 1) if line.rstrip() == "---"]
    return "\n".join(lines[1 : ends[0]]) if ends else ""


def _load(text: str) -> Any:
    import yaml

    depth = 0
    try:
        for number, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH or number > _MAX_EVENTS or isinstance(event, yaml.AliasEvent):
                return None
            if getattr(event, "tag", None) is not None:  # PyYAML raises KeyError and the like for `!!bool maybe`
                return None
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # ValueError: a date such as 2024-13-45
        return None


def _texts(value: Any) -> list[str]:
    """Gives a text, or the texts of a list, those of reasonable length that can be encoded."""
    values = value if isinstance(value, list) else [value]
    texts = [text for text in values[:_MAX_ITEMS] if isinstance(text, str) and 0 < len(text) <= _MAX_TEXT]
    return [text for text in texts if text.isprintable()]
