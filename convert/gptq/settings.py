r"""Describes GPTQ checkpoints in `quantization_config`: one base form, and per-module rules where modules differ.

vLLM wants `bits`, `group_size`, `sym` and `desc_act` to be there (model_executor/layers/quantization/gptq_marlin.py).
Rules are GPTQModel's `dynamic`: a regular expression that is matched with the beginning of a module's path -> what
differs, or `-:` before an expression whose modules are not quantized; the first that matches decides (GPTQModel:
quantization/config.py dynamic_get). optimum, through which transformers loads, looks at `modules_in_block_to_quantize`
instead and knows no module that differs in bits or groups (optimum: gptq/quantizer.py convert_model).
"""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from quantpress.convert.packed_parts import producer
from quantpress.quant.qtensor import QuantizedForm

__all__ = ["common_form", "in_layer", "module_rules", "written_settings"]

log = logging.getLogger(__name__)

_NUMBER = re.compile(r"(?<=\.)\d{1,9}(?=\.)")  # of a layer or an expert
_Key = tuple[int, int, bool]  # bits, group size or -1, symmetric
# vLLM computes these together and asks for the rule of the whole (model_executor/models/llama.py).
_FUSED = (("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", ("gate_proj", "up_proj")))
_GPTQMODEL_GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)  # GPTQModel 7.7: nn_modules/qlinear/torch.py


def written_settings(
    name: str, forms: Mapping[str, QuantizedForm], left: Sequence[str], details: Mapping[str, Any]
) -> dict[str, Any]:
    """Gives `quantization_config`; arguments as `PackFormat.settings`, `name` is the `checkpoint_format`."""
    base = common_form(forms.values())
    bits, group_size, symmetric = base
    settings: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": name,
        "bits": bits,
        "group_size": group_size,
        "sym": symmetric,
        "desc_act": any(form.ordered for form in forms.values()),
        "lm_head": any(not in_layer(weight) for weight in forms),
        "pack_dtype": "int32",
        "meta": _meta(details),
    }
    modules = {weight.removesuffix(".weight"): _difference(form, base) for weight, form in forms.items()}
    skipped = [weight.removesuffix(".weight") for weight in left if in_layer(weight)]
    if dynamic := module_rules(modules, skipped):
        settings["dynamic"] = dynamic
    if skipped:
        settings["modules_in_block_to_quantize"] = [_block_modules(modules, skipped)]
    _warn(name, forms.values())
    return settings


def in_layer(name: str) -> bool:
    """Whether a weight belongs to a layer, as heads do not."""
    return _NUMBER.search(name) is not None


def common_form(forms: Iterable[QuantizedForm]) -> _Key:
    """Gives the bits, group size (-1 for a row) and symmetry that leave the fewest weights to rules of their own."""
    kinds = Counter((form.bits, form.group_size, form.symmetric, form.per_row, form.shape[1]) for form in forms)
    keys = dict.fromkeys(_key(*kind[:4]) for kind in kinds)
    return max(keys, key=lambda key: _covered(kinds, key), default=(4, 128, True))


def _key(bits: int, group_size: int, symmetric: bool, per_row: bool) -> _Key:
    return bits, -1 if per_row else group_size, symmetric


def _covered(kinds: Mapping[tuple[int, int, bool, bool, int], int], base: _Key) -> int:
    """How many weights need no rule beside this base; see `_difference`."""
    return sum(
        count
        for (bits, group_size, symmetric, per_row, columns), count in kinds.items()
        if (bits, symmetric) == (base[0], base[2])
        and (base[1] == -1 or base[1] >= columns if per_row else base[1] == group_size)
    )


def _difference(form: QuantizedForm, base: _Key) -> dict[str, Any]:
    """What a rule must say of a module; a row that is one group is stored alike for every size that covers it."""
    bits, group_size, symmetric = base
    difference: dict[str, Any] = {}
    if form.bits != bits:
        difference["bits"] = form.bits
    own = -1 if form.per_row else form.group_size
    if own != group_size and not (form.per_row and group_size >= form.shape[1]):
        difference["group_size"] = own
    if form.symmetric != symmetric:
        difference["sym"] = form.symmetric
    return difference


def module_rules(modules: Mapping[str, Mapping[str, Any]], skipped: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Gives `dynamic`: rules for the modules that differ; those of one name and many layers share one.

    Args:
        modules: quantized module -> how it differs from the base, empty if it does not.
        skipped: modules that are not quantized.
    """
    rules: dict[str, Mapping[str, Any] | None] = {**modules, **dict.fromkeys(skipped)}
    rules.update(_fused(rules))
    places: dict[str, dict[tuple[str, ...], Mapping[str, Any] | None]] = defaultdict(dict)
    for module, rule in rules.items():
        places[_NUMBER.sub("\0", module)][tuple(_NUMBER.findall(module))] = rule
    written: dict[str, dict[str, Any]] = {}
    for place, found in places.items():
        for choices, rule in _shared(found):
            pattern = "".join(
                part + choice for part, choice in zip(map(re.escape, place.split("\0")), [*choices, ""], strict=True)
            )
            written[f"{'-:' if rule is None else '+:'}^{pattern}$"] = dict(rule or {})
    return written


def _block_modules(modules: Iterable[str], skipped: Sequence[str]) -> list[str]:
    """Names the quantized modules for optimum, which asks how a path ends, and vLLM, which asks what it holds."""
    inner = [module for module in modules if in_layer(module)]
    places = dict.fromkeys(_NUMBER.sub("\0", module) for module in inner)
    names = [place.partition("\0.")[2] for place in places]
    unclear = any("\0" in name or name in module for name in names for module in skipped)
    return inner if unclear else names


def _shared(
    found: Mapping[tuple[str, ...], Mapping[str, Any] | None],
) -> list[tuple[list[str], Mapping[str, Any] | None]]:
    """Joins modules that differ in their numbers only: the expressions for these numbers, and the rule."""
    first = next(iter(found.values()))
    if len(found) > 1 and all(rule == first for rule in found.values()):
        return [] if first == {} else [([r"\d+"] * len(next(iter(found))), first)]
    joined: dict[tuple[tuple[str, ...], str], tuple[list[str], Mapping[str, Any] | None]] = {}
    for numbers, rule in found.items():
        if rule is None or rule:
            joined.setdefault((numbers[1:], repr(rule)), ([], rule))[0].extend(numbers[:1])
    return [([*([_choice(layers)] if layers else []), *rest], rule) for (rest, _), (layers, rule) in joined.items()]


def _choice(numbers: Sequence[str]) -> str:
    return numbers[0] if len(numbers) == 1 else f"(?:{'|'.join(sorted(numbers, key=int))})"


def _fused(rules: Mapping[str, Mapping[str, Any] | None]) -> dict[str, Mapping[str, Any] | None]:
    fused: dict[str, Mapping[str, Any] | None] = {}
    for whole, parts in _FUSED:
        for module in rules:
            prefix = module.removesuffix(parts[0])
            names = [prefix + part for part in parts]
            if prefix == module or prefix + whole in rules or not all(name in rules for name in names):
                continue
            if all(rules[name] == rules[module] for name in names):
                fused[prefix + whole] = rules[module]
    return fused


def _meta(details: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of how it was made, under GPTQModel's names where it has one."""
    meta: dict[str, Any] = {"quantizer": [producer()]}
    names = {"damping": "damp_percent", "true_sequential": "true_sequential", "method": "method"}
    meta.update({names[key]: value for key, value in details.items() if key in names and value is not None})
    if "act_order" in details:
        meta["act_order"], meta["static_groups"] = bool(details["act_order"]), True
    return meta


def _warn(name: str, forms: Iterable[QuantizedForm]) -> None:
    listed = list(forms)
    sizes = {-1 if form.per_row else form.group_size for form in listed}
    if odd := sorted(sizes.difference(_GPTQMODEL_GROUPS)):
        log.warning("groups of %d columns: vLLM reads them, GPTQModel knows powers of two from 16 to 1024 only", odd[0])
    if name == "gptq" and not all(form.symmetric for form in listed):
        log.warning(
            "GPTQModel opens asymmetric weights of version 1 only if it wrote them itself; --format gptq_v2 is what"
            " it and vLLM read"
        )
