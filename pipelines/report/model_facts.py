"""What a written model says of itself, for a model card: chat template, context, sampling, licence, base models."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantpress.convert.files import inside, read_bounded
from quantpress.convert.gguf.model_card import read_card
from quantpress.convert.gguf.reader import open_gguf_file
from quantpress.convert.json_reader import read_json
from quantpress.pipelines.report.values import count, mapping, number, text
from quantpress.quant.errors import InputError

__all__ = ["ModelFacts", "facts_of"]

_MAX_TEMPLATE = 1 << 18  # characters
# key of generation_config.json, and of GGUF after general.sampling. -> Ollama's name of it
_SAMPLING = {
    "temperature": ("temp", "temperature"),
    "top_k": ("top_k", "top_k"),
    "top_p": ("top_p", "top_p"),
    "min_p": ("min_p", "min_p"),
    "repetition_penalty": ("penalty_repeat", "repeat_penalty"),
}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a model; everything empty where its file cannot be looked at.

    Attributes:
        chat_template: Jinja source, or empty.
        bos, eos: texts of the tokens, or empty.
        adds_bos: whether runtimes put `bos` before a prompt themselves.
        context: tokens, or 0.
        sampling: Ollama's name -> value.
        license: as a model card has it, or empty.
        base_models: Hub ids.
        quantization: quantization_config.quant_method of config.json, or empty.
    """

    chat_template: str = ""
    bos: str = ""
    eos: str = ""
    adds_bos: bool = False
    context: int = 0
    sampling: Mapping[str, float] = field(default_factory=dict)
    license: str = ""
    base_models: tuple[str, ...] = ()
    quantization: str = ""


def facts_of(path: str) -> ModelFacts:
    """Looks at an output, if it is on a disk here and still readable.

    Args:
        path: a `.gguf` file, or a folder with config.json; anything else, and a URL, gives no facts.
    """
    if "://" in path:
        return ModelFacts()
    try:
        if path.endswith(".gguf"):
            return _of_gguf(Path(path))
        return _of_folder(Path(path)) if Path(path).is_dir() else ModelFacts()
    except (InputError, OSError, ValueError):  # ValueError: a name with a zero byte
        return ModelFacts()


def card_facts(folder: Path) -> ModelFacts:
    """Gives what the README.md of a model folder says; nothing where there is none."""
    try:
        return _of_card({key: value for key, (_, value) in read_card(read_bounded(folder / "README.md")).items()})
    except (InputError, OSError, ValueError):
        return ModelFacts()


def _of_gguf(path: Path) -> ModelFacts:
    metadata = {key: value for key, (_, value) in open_gguf_file(path).metadata.items()}
    family = metadata.get("general.architecture")
    card = _of_card(metadata)
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token")
    if not isinstance(adds_bos, bool):
        adds_bos = metadata.get("tokenizer.ggml.model") == "llama"  # what llama.cpp does for such vocabularies
    sampling = {
        ollama: found
        for key, ollama in _SAMPLING.values()
        if (found := number(metadata.get(f"general.sampling.{key}"))) is not None
    }
    return ModelFacts(
        chat_template=_template(metadata.get("tokenizer.chat_template")),
        bos=_token(metadata, "bos"),
        eos=_token(metadata, "eos"),
        adds_bos=adds_bos,
        context=count(metadata.get(f"{family}.context_length")),
        sampling=sampling,
        license=card.license,
        base_models=card.base_models,
    )


def _token(metadata: Mapping[str, Any], name: str) -> str:
    tokens, place = metadata.get("tokenizer.ggml.tokens"), metadata.get(f"tokenizer.ggml.{name}_token_id")
    if not isinstance(place, int) or not isinstance(tokens, list) or not 0 <= place < len(tokens):
        return ""
    return tokens[place] if isinstance(tokens[place], str) else ""


def _of_card(metadata: Mapping[str, Any]) -> ModelFacts:
    names = []
    for place in range(min(count(metadata.get("general.base_model.count")), 20)):
        parts = [text(metadata.get(f"general.base_model.{place}.{key}")) for key in ("organization", "name")]
        if all(parts):
            names.append("/".join(parts))
    return ModelFacts(license=text(metadata.get("general.license"), 100), base_models=tuple(names))


def _of_folder(folder: Path) -> ModelFacts:
    config, tokenizer = _json(folder, "config.json"), _json(folder, "tokenizer_config.json")
    generation = _json(folder, "generation_config.json")
    template = _template(tokenizer.get("chat_template"))
    with contextlib.suppress(InputError):
        template = _template(read_bounded(inside(folder, "chat_template.jinja")).decode("utf-8", "replace"))
    sampling = {
        ollama: found for key, (_, ollama) in _SAMPLING.items() if (found := number(generation.get(key))) is not None
    }
    return ModelFacts(
        chat_template=template,
        context=count(config.get("max_position_embeddings")),
        sampling=sampling,
        quantization=text(mapping(config.get("quantization_config")).get("quant_method"), 40),
    )


def _json(folder: Path, name: str) -> Mapping[str, Any]:
    try:
        return mapping(read_json(inside(folder, name)))
    except InputError:
        return {}


def _template(value: Any) -> str:
    return value if isinstance(value, str) and len(value) <= _MAX_TEMPLATE else ""
