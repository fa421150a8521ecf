"""What an adapter_config.json says, in one vocabulary for all kinds of adapters (PEFT: LoraConfig and its kin)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from quantpress.convert.lora.matching import EndPatterns, InnerNames, Names, path_ends
from quantpress.convert.lora.patterns import Budget

__all__ = ["ALL_LINEAR", "AdapterConfig"]

ALL_LINEAR = "all-linear"
_RANK_EPSILON = 1e-5  # AdaLoRA divides by the rank plus this (PEFT: adalora/layer.py get_delta_weight)
_FIRST_NUMBER = re.compile(r".*?\.[^.]*\.(\d+)\.")


@dataclass(frozen=True)
class AdapterConfig:
    """Settings of an adapter, after PEFT's defaults.

    Attributes:
        kind: "LORA", "ADALORA", "LOHA", "LOKR" or "TRAINABLE_TOKENS" (`peft_type`).
        rank: `r`, for modules that no pattern names. AdaLoRA: `init_r`.
        alpha: `lora_alpha` (LoHa, LoKr: `alpha`), for modules that no pattern names.
        rslora: the scale is alpha / sqrt(rank) instead of alpha / rank.
        dora: modules have a magnitude vector.
        fan_in_fan_out: weights are stored (K, N), as the trainer said; a family's table knows better.
        bias: "none", "all" or "lora_only": which biases of the base were trained and are in the file.
        lora_bias: `lora_B` has a bias that is added to the base's.
        rank_pattern, alpha_pattern: regular expression -> value, in the file's order; see `rank_of`.
        rank_masks: AdaLoRA's `rank_pattern`: module path -> which of the `init_r` directions were kept.
        target_modules: a regular expression, "all-linear", a tuple of names, or None.
        exclude_modules: a regular expression, a tuple of names, or None.
        target_parameters: names of parameters that are adapted themselves ("mlp.experts.gate_up_proj").
        layers_to_transform: layer numbers, or None for all.
        layers_pattern: names of the list of layers; empty: any.
        modules_to_save: names of modules that were trained whole; PEFT takes them as the end of a path, without a dot
            before it: "head" is "lm_head" too.
        trainable_tokens: end of a module's path ("embed_tokens") -> token ids whose rows were trained. The end "" is
            the end of every path: the input embedding, whatever its name, when the file only lists the ids. See
            `tokens_of`.
        ensure_weight_tying: what was trained of a tied embedding is meant for the head as well.
        base_model: `base_model_name_or_path`.
        name: the file, for messages.
        raw: the whole file.
    """

    kind: str
    rank: int
    alpha: float
    rslora: bool = False
    dora: bool = False
    fan_in_fan_out: bool = False
    bias: str = "none"
    lora_bias: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_masks: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)
    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    target_parameters: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    trainable_tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ensure_weight_tying: bool = False
    base_model: str = ""
    name: str = "adapter_config.json"
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def rank_of(self, path: str) -> int:
        """Gives the rank of a module, or of an adapted parameter, by its path (PEFT: utils/other.py get_pattern_key).

        For AdaLoRA this is the number of directions that were kept, which may be 0.
        """
        if self.kind == "ADALORA":
            mask = self.rank_masks.get(path)
            return self.rank if mask is None else sum(mask)
        key = self._rank_keys.first(path)
        return self.rank if key is None else self.rank_pattern[key]

    def alpha_of(self, path: str) -> float:
        """Gives the alpha of a module by its path. AdaLoRA takes the rank where alpha is not positive."""
        if self.kind == "ADALORA":
            return self.alpha if self.alpha > 0 else float(self.rank_of(path))
        key = self._alpha_keys.first(path)
        return self.alpha if key is None else self.alpha_pattern[key]

    def scale_of(self, path: str) -> float:
        """Gives what B @ A is multiplied with: alpha / rank, or alpha / sqrt(rank) with `rslora`.

        AdaLoRA: alpha / (init_r + 1e-5), whatever number of directions was kept.
        """
        if self.kind == "ADALORA":
            return self.alpha_of(path) / (self.rank + _RANK_EPSILON)
        rank = self.rank_of(path)
        return self.alpha_of(path) / (math.sqrt(rank) if self.rslora else rank)

    def targets(self, path: str) -> bool:
        """Whether PEFT would adapt the module of this path (tuners_utils.py check_target_module_exists).

        PEFT resolves "all-linear" to every linear module but the output head, and a missing `target_modules` by a
        table of families, before it asks; both need the model. Here every path that is not excluded is a target then,
        and the caller, who has the model, decides.
        """
        if self._excluded.match(path) or self._kept_whole.match(path):
            return False
        if self.target_modules is None:
            return "target_parameters" not in self.raw or self.raw["target_parameters"] is None
        if self.all_linear:
            return True
        if not self._targets.match(path):
            return False
        return self._targets.names_whole(path) or self.layers_to_transform is None or self._layer_is_meant(path)

    @property
    def all_linear(self) -> bool:
        """Whether `target_modules` is the word for all linear modules."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    def saves(self, path: str) -> bool:
        """Whether the module of this path, or one around it, was trained whole (PEFT: other.py _set_trainable)."""
        around = [path[: len(path) - len(end) - 1] for end in path_ends(path)][1:]
        return any(outer.endswith(self.modules_to_save) for outer in (path, *around))

    def tokens_of(self, path: str) -> tuple[int, ...] | None:
        """Gives the ids of the tokens whose rows were trained in a module; None where there are none.

        PEFT: utils/other.py set_additional_trainable_modules and _set_trainable: the end of the path, without a dot
        before it. An adapter of kind TRAINABLE_TOKENS trains the same tokens in each module it has rows for, of which
        one may be a head that is tied to the embedding.
        """
        return next((ids for end, ids in self.trainable_tokens.items() if path.endswith(end)), None)

    def parameters_of(self, path: str) -> tuple[str, ...]:
        """Gives the parameters of a module that are adapted themselves, sorted as PEFT nests its wrappers.

        PEFT: tuners_utils.py _inject_parameters. Which of them a module really has, only the base can tell.
        """
        ends = set(path_ends(path))
        names = (target.rpartition(".") for target in sorted(set(self.target_parameters)))
        return tuple(parameter for module, _, parameter in names if not module or module in ends)

    def _layer_is_meant(self, path: str) -> bool:
        """Applies `layers_to_transform`; the first number behind a list of layers counts."""
        found = _FIRST_NUMBER.match(path) if not self.layers_pattern else None
        for layers in self.layers_pattern:
            if found := re.match(rf"(?:^|.*?\.){layers}\.(\d+)\.", path):
                break
        return found is not None and int(found[1]) in (self.layers_to_transform or ())

    @cached_property
    def _rank_keys(self) -> EndPatterns:
        return EndPatterns(tuple(self.rank_pattern), Budget(f"{self.name}: rank_pattern"))

    @cached_property
    def _alpha_keys(self) -> EndPatterns:
        return EndPatterns(tuple(self.alpha_pattern), Budget(f"{self.name}: alpha_pattern"))

    @cached_property
    def _targets(self) -> Names:
        return Names(self.target_modules or (), Budget(f"{self.name}: target_modules"))

    @cached_property
    def _excluded(self) -> Names:
        return Names(self.exclude_modules or (), Budget(f"{self.name}: exclude_modules"))

    @cached_property
    def _kept_whole(self) -> InnerNames:
        return InnerNames(self.modules_to_save, Budget(f"{self.name}: modules_to_save"))

    def check_patterns(self) -> None:
        """Compiles every pattern, so that a bad one is found when the adapter is opened.

        Raises:
            InputError: a pattern is no regular expression, or is refused by `compile_pattern`.
        """
        probe = "model.layers.0.self_attn.q_proj"
        self._rank_keys.first(probe)
        self._alpha_keys.first(probe)
        self._targets.match(probe)
        self._excluded.match(probe)
        self._kept_whole.match(probe)
