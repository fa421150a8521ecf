"""Reads adapter_config.json of PEFT 0.2 and later: types checked, defaults filled in, what cannot be merged refused."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from quantpress.convert.files import shown
from quantpress.convert.json_reader import parse_json
from quantpress.convert.lora.config import AdapterConfig
from quantpress.convert.lora.patterns import is_plain
from quantpress.convert.lora.unmergeable import refuse_unmergeable
from quantpress.quant.errors import InputError

__all__ = ["MAX_CONFIG", "read_config"]

log = logging.getLogger(__name__)

MAX_CONFIG = 8 << 20  # bytes; AdaLoRA writes a truth value for each direction of each module, about a million
_MAX_VALUES = 1_500_000  # commas and brackets
_MAX_RANK = 1 << 31
_MAX_NAMES = 100_000  # names in a list, or keys of a mapping
_MAX_WHOLE = 1000  # names in modules_to_save, each of which is tried on each module
_HEADS = {  # PEFT: peft_model.py, PeftModelFor... add these to modules_to_save whatever the file says
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@dataclass(frozen=True, slots=True)
class _File:
    """The parsed file, with one method for each type a key may have; a key that is missing or null has the default."""

    name: str
    values: Mapping[str, Any]

    def fail(self, key: str, value: Any, wanted: str) -> InputError:
        return InputError(f"{self.name}: {key} is {shown(value)}, must be {wanted}")

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(key, value, "true or false")
        return value

    def text(self, key: str, default: str) -> str:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.fail(key, value, "text")
        return value

    def rank(self, key: str, default: int) -> int:
        value = self.values.get(key)
        return default if value is None else self.check_rank(key, value)

    def check_rank(self, key: str, value: Any) -> int:
        if type(value) is not int or not 1 <= value <= _MAX_RANK:
            raise self.fail(key, value, "a rank: a whole number from 1")
        return value

    def alpha(self, key: str, default: float) -> float:
        return self.check_alpha(key, self.values[key]) if key in self.values else default  # null is no default in PEFT

    def check_alpha(self, key: str, value: Any) -> float:
        if type(value) not in (int, float) or not math.isfinite(float(value)):
            raise self.fail(key, value, "a number")
        return float(value)

    def names(self, key: str) -> tuple[str, ...] | None:
        """A list of names, without repeats."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
            raise self.fail(key, value, "a list of names")
        self._check_count(key, value)
        return tuple(dict.fromkeys(value))

    def names_or_pattern(self, key: str) -> str | tuple[str, ...] | None:
        value = self.values.get(key)
        return value if isinstance(value, str) else self.names(key)

    def mapping(self, key: str, check: Callable[[str, Any], Any]) -> dict[str, Any]:
        value = self.values.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.fail(key, value, "a mapping")
        self._check_count(key, value)
        return {name: check(f"{key} of {shown(name)}", item) for name, item in value.items()}

    def ids(self, key: str, value: Any) -> tuple[int, ...]:
        """Token ids, each once."""
        if not isinstance(value, list) or not all(type(token) is int and 0 <= token <= _MAX_RANK for token in value):
            raise self.fail(key, value, "a list of token ids")
        if len(set(value)) != len(value):
            twice = next(token for place, token in enumerate(value) if token in value[:place])
            raise InputError(f"{self.name}: {key} holds token {twice} twice")
        return tuple(value)

    def mask(self, key: str, value: Any) -> tuple[bool, ...]:
        if not isinstance(value, list) or not all(isinstance(kept, bool) for kept in value):
            raise self.fail(key, value, "a list of true and false")
        return tuple(value)

    def _check_count(self, key: str, values: Any) -> None:
        if len(values) > _MAX_NAMES:
            raise InputError(f"{self.name}: {key} has {len(values)} entries, at most {_MAX_NAMES} are read")


def read_config(data: bytes, *, name: str) -> AdapterConfig:
    """Reads the text of an adapter_config.json.

    Args:
        data: JSON text of at most `MAX_CONFIG` bytes.
        name: the file, for messages.

    Raises:
        InputError: not such JSON, a value of a wrong type, an adapter of a kind that cannot be merged, or a pattern
            that is no regular expression or would take too long to match.
    """
    values = parse_json(data, name=name, max_values=_MAX_VALUES)
    if not isinstance(values, dict):
        raise InputError(f"{name}: a JSON object is expected, found {shown(values)}")
    refuse_unmergeable(values, name)
    file = _File(name, values)
    kind = values["peft_type"]
    config = AdapterConfig(
        kind=kind,
        **_size(file, kind),
        **_selection(file, kind),
        modules_to_save=_whole_modules(file),
        trainable_tokens=_tokens(file, kind),
        ensure_weight_tying=file.flag("ensure_weight_tying"),
        base_model=file.text("base_model_name_or_path", ""),
        name=name,
        raw=values,
    )
    config.check_patterns()
    log.debug("%s: %s, rank %d, alpha %g", name, kind, config.rank, config.alpha)
    return config


def _size(file: _File, kind: str) -> dict[str, Any]:
    """Ranks, scales and variants; the defaults are those of PEFT's config classes."""
    if kind == "TRAINABLE_TOKENS":
        return {"rank": 1, "alpha": 1.0}
    if kind in ("LOHA", "LOKR"):
        return {"rank": file.rank("r", 8), "alpha": file.alpha("alpha", 8.0), **_patterns(file)}
    shared = {"fan_in_fan_out": file.flag("fan_in_fan_out"), "bias": _bias(file)}
    if kind == "ADALORA":
        rank = file.rank("init_r", 12)
        masks = _rank_masks(file, rank)
        return {"rank": rank, "alpha": file.alpha("lora_alpha", 8.0), "rank_masks": masks, **shared}
    return {
        "rank": file.rank("r", 8),
        "alpha": file.alpha("lora_alpha", 8.0),
        "rslora": file.flag("use_rslora"),
        "dora": file.flag("use_dora"),
        "lora_bias": file.flag("lora_bias"),
        **_patterns(file),
        **shared,
    }


def _patterns(file: _File) -> dict[str, Any]:
    return {
        "rank_pattern": file.mapping("rank_pattern", file.check_rank),
        "alpha_pattern": file.mapping("alpha_pattern", file.check_alpha),
    }


def _bias(file: _File) -> str:
    bias = file.text("bias", "none")
    if bias not in ("none", "all", "lora_only"):
        raise file.fail("bias", bias, "none, all or lora_only")
    return bias


def _rank_masks(file: _File, rank: int) -> dict[str, tuple[bool, ...]]:
    """AdaLoRA's `rank_pattern`: keys end with `.lora_E`, in old files `.lora_E.default` (PEFT: adalora/model.py)."""
    masks: dict[str, tuple[bool, ...]] = {}
    for key, mask in file.mapping("rank_pattern", file.mask).items():
        path, found, _ = key.rpartition(".lora_E")
        path = path.removeprefix("base_model.model.")
        if not found or path in masks:
            raise InputError(f"{file.name}: rank_pattern holds {shown(key)}, which is no module's lora_E, or twice")
        if len(mask) != rank:
            raise InputError(f"{file.name}: rank_pattern of {shown(key)} has {len(mask)} directions, init_r is {rank}")
        masks[path] = mask
    return masks


def _selection(file: _File, kind: str) -> dict[str, Any]:
    """Which modules are adapted."""
    targets = file.names_or_pattern("target_modules")
    layers = file.values.get("layers_to_transform")
    numbers = [layers] if type(layers) is int else layers
    if numbers is not None and not (isinstance(numbers, list) and all(type(number) is int for number in numbers)):
        raise file.fail("layers_to_transform", layers, "a layer number or a list of them")
    pattern = file.values.get("layers_pattern")
    patterns = ((pattern,) if pattern else ()) if isinstance(pattern, str) else file.names("layers_pattern") or ()
    for name in patterns[:_MAX_WHOLE]:
        if not is_plain(name):
            raise file.fail("layers_pattern", name, "the plain name of a list of layers")
    if len(patterns) > _MAX_WHOLE:
        raise InputError(f"{file.name}: layers_pattern has {len(patterns)} entries, at most {_MAX_WHOLE} are read")
    if patterns and numbers is None:
        raise InputError(f"{file.name}: layers_pattern is set without layers_to_transform, which PEFT refuses")
    if isinstance(targets, str) and numbers is not None and kind in ("LORA", "ADALORA"):
        raise InputError(f"{file.name}: layers_to_transform is set, but target_modules is a pattern; PEFT refuses that")
    return {
        "target_modules": targets,
        "exclude_modules": file.names_or_pattern("exclude_modules"),
        "target_parameters": file.names("target_parameters") or () if kind == "LORA" else (),
        "layers_to_transform": tuple(numbers) if numbers else None,
        "layers_pattern": patterns,
    }


def _whole_modules(file: _File) -> tuple[str, ...]:
    names = file.names("modules_to_save") or ()
    if len(names) > _MAX_WHOLE:
        raise InputError(f"{file.name}: modules_to_save has {len(names)} entries, at most {_MAX_WHOLE} are read")
    heads = _HEADS.get(file.text("task_type", ""), ())
    return tuple(dict.fromkeys((*names, *heads)))


def _tokens(file: _File, kind: str) -> dict[str, tuple[int, ...]]:
    """Trained tokens, by the end of the path of their module; "" where the file names none (see `AdapterConfig`)."""
    if kind == "TRAINABLE_TOKENS":
        return {"": file.ids("token_indices", file.values.get("token_indices") or [])}
    trained = file.values.get("trainable_token_indices")
    if isinstance(trained, list):
        return {"": file.ids("trainable_token_indices", trained)}
    return file.mapping("trainable_token_indices", file.ids)
