"""Reads `quantization_config` of GPTQ checkpoints, the rules for single modules included."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from quantpress.convert.files import shown
from quantpress.convert.lora.patterns import Budget, Pattern, compile_pattern
from quantpress.convert.packed_parts import bits_of, flag_of, group_size_of
from quantpress.quant.errors import InputError

__all__ = ["ModuleSettings", "Rules", "read_settings"]

_MAX_RULES = 10_000
_STEPS_PER_MODULE = 2_000  # for matching its name with all rules; a usual rule needs 50
_LITERAL = re.compile(r"\^?((?:[A-Za-z0-9_\-]|\\[.\-])*)(\$?)")
_FORMATS = ("gptq", "gptq_v2")


@dataclass(frozen=True, slots=True)
class ModuleSettings:
    """What a configuration says of a module.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: -1 for a whole row.
        symmetric: the zeros are 2^(bits - 1).
        ordered: columns may belong to groups in an order of their own (`desc_act`).
    """

    bits: int
    group_size: int
    symmetric: bool
    ordered: bool


@dataclass(frozen=True, slots=True)
class _Rule:
    literal: str | None  # what a name must begin with or, if `whole`, be
    whole: bool
    pattern: Pattern | None
    changes: Mapping[str, Any] | None  # None: its modules are not quantized
    shown: str

    def fits(self, module: str) -> bool:
        if self.pattern is not None:
            return self.pattern.match(module)
        return module == self.literal if self.whole else module.startswith(self.literal or "")


@dataclass(frozen=True, slots=True)
class Rules:
    """A configuration: what holds for all modules, and rules for some.

    Attributes:
        base: what holds where no rule fits.
        version: 1 or 2, as `checkpoint_format` says; version 1 stores zeros less one.
        rules: the first that fits a module decides.
    """

    base: ModuleSettings
    version: int
    rules: tuple[_Rule, ...]
    where: str

    def of(self, module: str) -> ModuleSettings:
        """Gives what holds for a quantized module.

        Raises:
            InputError: the rules say that it is not quantized, or a value that makes no sense.
        """
        for rule in self.rules:
            if rule.fits(module):
                if rule.changes is None:
                    raise InputError(
                        f"{self.where}: dynamic rule {rule.shown} leaves {shown(module)} out, but it is quantized"
                    )
                return _changed(self.base, rule.changes, f"{self.where}: dynamic rule {rule.shown}")
        return self.base


def read_settings(settings: Mapping[str, Any], where: str, modules: int) -> Rules:
    """Reads a configuration.

    Args:
        settings: `quantization_config`, or the contents of quantize_config.json.
        where: the file and key, for messages.
        modules: how many will be asked for, which bounds the work of matching.

    Raises:
        InputError: a value is missing or makes no sense, or the layout of the tensors is another one.
    """
    version = _version(settings, where)
    for key in ("bits", "group_size"):
        if key not in settings:
            raise InputError(f"{where}: {key} is missing")
    base = ModuleSettings(
        bits_of(settings["bits"], where),
        group_size_of(settings["group_size"], where),
        flag_of(settings.get("sym", True), where, "sym"),  # GPTQModel: from_quant_config takes it for symmetric
        flag_of(settings.get("desc_act", False), where, "desc_act"),
    )
    return Rules(base, version, _rules(settings.get("dynamic"), where, modules), where)


def _version(settings: Mapping[str, Any], where: str) -> int:
    words = settings.get("pack_dtype", "int32")
    if words not in ("int32", "torch.int32"):
        raise InputError(f"{where}: pack_dtype is {shown(words)}, wanted int32")
    if settings.get("is_marlin_format"):
        raise InputError(f"{where}: the weights are in Marlin's layout (is_marlin_format), wanted plain GPTQ")
    found = settings.get("checkpoint_format")
    if found is None:
        found = settings.get("format")
    if found is None:
        return 1  # AutoGPTQ before 0.7 and GPTQ-for-LLaMa did not say; all they wrote is version 1
    name = found.lower() if isinstance(found, str) else found
    if name not in _FORMATS:
        raise InputError(f"{where}: checkpoint_format is {shown(found)}, wanted {' or '.join(_FORMATS)}")
    return 1 + _FORMATS.index(name)


def _rules(dynamic: Any, where: str, modules: int) -> tuple[_Rule, ...]:
    if dynamic is None:
        return ()
    if not isinstance(dynamic, Mapping) or len(dynamic) > _MAX_RULES:
        raise InputError(f"{where}: dynamic is {shown(dynamic)}, wanted at most {_MAX_RULES} rules by pattern")
    budget = Budget(f"{where}: dynamic", steps=-_STEPS_PER_MODULE * modules)
    rules = []
    for text, changes in dynamic.items():
        if not isinstance(changes, Mapping):
            raise InputError(f"{where}: dynamic rule {shown(text)} is {shown(changes)}, wanted an object")
        expression = text[2:] if text.startswith(("-:", "+:")) else text
        literal = _LITERAL.fullmatch(expression)
        rules.append(
            _Rule(
                literal[1].replace("\\", "") if literal else None,
                bool(literal and literal[2]),
                None if literal else compile_pattern(expression, budget),
                None if text.startswith("-:") else changes,
                shown(text),
            )
        )
    return tuple(rules)


def _changed(base: ModuleSettings, changes: Mapping[str, Any], where: str) -> ModuleSettings:
    found = base
    if "bits" in changes:
        found = replace(found, bits=bits_of(changes["bits"], where))
    if "group_size" in changes:
        found = replace(found, group_size=group_size_of(changes["group_size"], where))
    if "sym" in changes:
        found = replace(found, symmetric=flag_of(changes["sym"], where, "sym"))
    if "desc_act" in changes:
        found = replace(found, ordered=flag_of(changes["desc_act"], where, "desc_act"))
    return found
