"""What `quantization_config` of a compressed-tensors checkpoint says about each module, checked key by key.

Sources: compressed-tensors quantization/quant_config.py, quant_scheme.py and quant_args.py; which of several targets
counts: utils/match.py, match_targets (a name before a pattern before a class, each in alphabetical order).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantpress.convert.files import shown
from quantpress.convert.lora.patterns import Budget, Pattern, compile_pattern
from quantpress.quant.errors import InputError
from quantpress.quant.qtensor import BITS

__all__ = ["Scheme", "Schemes", "read_schemes"]

_LAYOUTS = frozenset({"pack-quantized", "int-quantized", "naive-quantized"})
_UNSAID = frozenset({"dense", "fakequant", "mixed-precision"})  # what `format` may say for the whole checkpoint besides
_STRATEGIES = ("tensor", "channel", "group")
_EMBEDDING = ("Embedding", "Module")
_LINEAR = ("Linear", "LinearBase", "Module")
_STEPS_A_MODULE = 2000  # of matching patterns; one needs some 200, a list of ten at most as many as this


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the weights of a config group are quantized.

    Attributes:
        group: its name, for messages.
        bits: 2, 3, 4 or 8.
        symmetric: no zero is stored.
        strategy: "tensor", "channel" or "group".
        group_size: columns of a group; None for the other two.
        ordered: `weight_g_idx` may be there (`actorder` "group").
        input_bits: 8 where inputs are rounded to int8 with a scale per token, else None.
        other_inputs: inputs are rounded in another way, which is not imitated here.
    """

    group: str
    bits: int
    symmetric: bool
    strategy: str
    group_size: int | None
    ordered: bool
    input_bits: int | None
    other_inputs: bool


@dataclass
class Schemes:
    """The config groups of a checkpoint, and who belongs to which."""

    where: str
    names: Mapping[str, Scheme]
    patterns: Sequence[tuple[str, Pattern, Scheme]]
    classes: Mapping[str, Scheme]
    ignored_names: frozenset[str]
    ignored_patterns: Sequence[Pattern]
    budget: Budget = field(repr=False)

    def of(self, module: str) -> Scheme:
        """Gives the scheme of a module that holds a quantized weight.

        Raises:
            InputError: the config ignores it, or has nothing for it.
        """
        self.budget.steps = max(0, self.budget.steps - _STEPS_A_MODULE)
        if module in self.ignored_names or any(pattern.match(module) for pattern in self.ignored_patterns):
            raise InputError(f"{self.where}: ignore names {shown(module, 200)}, but its weight is stored quantized")
        if (found := self.names.get(module)) is not None:
            return found
        for _, pattern, scheme in self.patterns:
            if pattern.match(module):
                return scheme
        last = module.rpartition(".")[2]
        classes = _EMBEDDING if last in ("wte", "wpe") or ("embed" in last and last != "embed_out") else _LINEAR
        for target in sorted(classes):
            if target in self.classes:
                return self.classes[target]
        raise InputError(
            f"{self.where}: no target of config_groups means {shown(module, 200)}, whose weight is stored quantized"
        )


def read_schemes(settings: Mapping[str, Any], name: str) -> Schemes:
    """Reads the config groups.

    Args:
        settings: `quantization_config`.
        name: the model, for messages.

    Raises:
        InputError: keys with values that make no sense, and kinds of quantization that are not opened here.
    """
    where = f"{name}: quantization_config"
    settings = settings["quantization_config"] if isinstance(settings.get("quantization_config"), dict) else settings
    _refuse_other_parts(settings, where)
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise InputError(f"{where}: config_groups must be an object with a group, found {shown(groups)}")
    found = {key: _read_group(group, settings, f"{where}: {shown(key)}") for key, group in groups.items()}
    budget = Budget(where)
    targets = {target: scheme for key, scheme in found.items() if scheme for target in _targets(groups[key], where)}
    patterns = sorted((target, scheme) for target, scheme in targets.items() if target.startswith("re:"))
    ignore = settings.get("ignore") or []
    if not _is_names(ignore):
        raise InputError(f"{where}: ignore must be a list of names, found {shown(ignore)}")
    return Schemes(
        where=where,
        names={target: scheme for target, scheme in targets.items() if "." in target or not target[:1].isupper()},
        patterns=[(text, compile_pattern(text[3:], budget), scheme) for text, scheme in patterns],
        classes={target: scheme for target, scheme in targets.items() if target[:1].isupper()},
        ignored_names=frozenset(ignore),
        ignored_patterns=[compile_pattern(text[3:], budget) for text in ignore if text.startswith("re:")],
        budget=budget,
    )


def _refuse_other_parts(settings: Mapping[str, Any], where: str) -> None:
    sparsity = settings.get("sparsity_config") or {}
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise InputError(
            f"{where}: sparse weights ({shown(sparsity['format'])}) cannot be opened; decompress them first"
        )
    if settings.get("transform_config"):
        raise InputError(f"{where}: weights with transforms of their inputs (transform_config) cannot be opened")
    _refuse_layout(settings.get("format"), where, _LAYOUTS | _UNSAID | {None})


def _refuse_layout(layout: Any, where: str, known: frozenset[Any]) -> None:
    if not isinstance(layout, str | None) or layout not in known:
        raise InputError(
            f"{where}: format {shown(layout)} cannot be opened, only pack-quantized and int-quantized; take the"
            " unquantized model, or decompress it with compressed-tensors"
        )


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _targets(group: Mapping[str, Any], where: str) -> list[str]:
    targets = group.get("targets")
    if not isinstance(targets, list) or not _is_names(targets):
        raise InputError(f"{where}: targets must be a list of names, found {shown(targets)}")
    return targets


def _read_group(group: Any, settings: Mapping[str, Any], where: str) -> Scheme | None:
    """Gives the scheme of a group, None if its weights are not quantized."""
    if not isinstance(group, dict):
        raise InputError(f"{where}: wanted an object with targets and weights, found {shown(group)}")
    weights = group.get("weights")
    if weights is None:
        return None
    if not isinstance(weights, dict):
        raise InputError(f"{where}: weights must be an object, found {shown(weights)}")
    if group.get("format") is not None:
        _refuse_layout(group["format"], where, _LAYOUTS)
    kind = weights.get("type", "int")
    if kind != "int" or weights.get("dynamic"):
        raise InputError(
            f"{where}: weights of type {shown(kind)}{' (dynamic)' if weights.get('dynamic') else ''} in the format"
            f" {shown(settings.get('format'))} cannot be opened, only stored integers; take the unquantized model"
        )
    bits = weights.get("num_bits", 8)
    if type(bits) is not int or bits not in BITS:
        raise InputError(f"{where}: num_bits is {shown(bits)}, wanted 2, 3, 4 or 8")
    symmetric = weights.get("symmetric", True)
    if not isinstance(symmetric, bool):
        raise InputError(f"{where}: symmetric is {shown(symmetric)}, wanted true or false")
    strategy, group_size = _strategy(weights, where)
    inputs = group.get("input_activations")
    return Scheme(
        group=where,
        bits=bits,
        symmetric=symmetric,
        strategy=strategy,
        group_size=group_size,
        ordered=weights.get("actorder") in ("group", "dynamic", True),
        input_bits=8 if inputs is not None and _is_token_int8(inputs) else None,
        other_inputs=inputs is not None and not _is_token_int8(inputs),
    )


def _strategy(weights: Mapping[str, Any], where: str) -> tuple[str, int | None]:
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if size is not None and (type(size) is not int or size == 0 or size < -1 or size > 1 << 31):
        raise InputError(f"{where}: group_size is {shown(size)}, wanted a positive number or -1")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy not in _STRATEGIES:
        raise InputError(f"{where}: strategy {shown(strategy)} cannot be opened, only {', '.join(_STRATEGIES)}")
    if (strategy == "group") != (size is not None and size > 0):
        raise InputError(f"{where}: strategy {strategy} does not go with group_size {size}")
    return strategy, size if strategy == "group" else None


def _is_token_int8(inputs: Any) -> bool:
    """Whether inputs are rounded to int8 with a scale per token; what is not said is as in quant_args.py."""
    usual = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": None, "dynamic": False}
    wanted = {**usual, "strategy": "token", "dynamic": True}
    return isinstance(inputs, dict) and all(inputs.get(key, usual[key]) == value for key, value in wanted.items())
