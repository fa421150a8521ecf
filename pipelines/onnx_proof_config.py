"""config.json and genai_config.json beside an ONNX model, compared with what the source says of itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from quantpress.convert.arch.registry import find_arch
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.onnx.read import OnnxModel
from quantpress.convert.preflight import Preflight
from quantpress.pipelines.onnx_proof_settings import SettingsFound
from quantpress.quant.errors import InputError

__all__ = ["compare_config", "compare_sizes"]

_CACHES = ("past_key_values.", "present.")


def compare_config(found: SettingsFound, model: OnnxModel, source: Checkpoint, checked: Preflight) -> None:
    """Compares sizes, token ids and the numbers of inputs and outputs.

    Args:
        found: takes what is wrong.
        model: made by this program.
        source: the model it was made from.
        checked: the same, bound to its family.
    """
    if model.folder.config:
        compare_sizes(found, model.folder.config, source)
    if model.folder.genai:
        _compare_genai(found, model.folder.genai, source, checked)
    for prefix, values in zip(_CACHES, (model.inputs, model.outputs), strict=True):
        layers = {value.name.split(".")[1] for value in values if value.name.startswith(prefix)}
        found.same(f"layers of {prefix}*", len(layers), checked.hyper.layers if checked.hyper.causal else 0)


def compare_sizes(found: SettingsFound, config: Mapping[str, Any], source: Checkpoint) -> None:
    """Compares what the family's table makes of both config.json."""
    try:
        read = [find_arch(each).read_config(each) for each in (config, source.config)]
    except InputError as error:
        found.same("config.json", str(error), "a config.json of the source's family")
        return
    for part in dataclasses.fields(read[1]):
        found.same(f"config.json {part.name}", *(getattr(each, part.name) for each in read))


def _compare_genai(found: SettingsFound, genai: Mapping[str, Any], source: Checkpoint, checked: Preflight) -> None:
    hyper = checked.hyper
    model = _object(genai, "model")
    decoder = _object(model, "decoder")
    wanted = {
        "head_size": hyper.head_dim,
        "hidden_size": hyper.hidden,
        "num_attention_heads": hyper.heads,
        "num_hidden_layers": hyper.layers,
        "num_key_value_heads": hyper.kv_heads,
    }
    for key, value in wanted.items():
        found.same(f"genai_config.json {key}", decoder.get(key), value)
    for key, value in {"context_length": hyper.context, "vocab_size": hyper.vocab}.items():
        found.same(f"genai_config.json {key}", model.get(key), value)
    for kind in ("bos", "eos", "pad"):
        ids = _ids(source, kind, hyper.vocab)
        if ids:
            given = model.get(f"{kind}_token_id")
            given = given if isinstance(given, list) else [given]
            missing = [each for each in ids if each not in given]
            found.same(f"genai_config.json {kind}_token_id", given, given if _holds(kind, missing, ids) else ids)


def _object(place: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = place.get(key)
    return value if isinstance(value, dict) else {}


def _holds(kind: str, missing: list[int], ids: list[int]) -> bool:
    """Every id that ends a text is wanted, and one of those that begin or fill it."""
    return not missing if kind == "eos" else len(missing) < len(ids)


def _ids(source: Checkpoint, kind: str, vocab: int) -> list[int]:
    """Gives the ids that generation_config.json, or else config.json, names; none where neither does."""
    for place in (source.generation_config, source.config):
        value = place.get(f"{kind}_token_id")
        values = value if isinstance(value, list) else [value]
        known = [each for each in values if isinstance(each, int) and not isinstance(each, bool) and 0 <= each < vocab]
        if known:
            return known
    return []
