"""What an adapter_config.json says, in one vocabulary for all kinds of adapters (PEFT: LoraConfig and its kin)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["AdapterConfig"]


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
        modules_to_save: names of modules that were trained whole.
        trainable_tokens: end of a module's path ("embed_tokens") -> token ids whose rows were trained.
        base_model: `base_model_name_or_path`.
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
    base_model: str = ""
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def rank_of(self, path: str) -> int:
        """Gives the rank of a module by its path (PEFT: utils/other.py get_pattern_key)."""
        raise NotImplementedError

    def alpha_of(self, path: str) -> float:
        """Gives the alpha of a module by its path."""
        raise NotImplementedError

    def scale_of(self, path: str) -> float:
        """Gives what B @ A is multiplied with: alpha / rank, or alpha / sqrt(rank) with `rslora`."""
        raise NotImplementedError

    def targets(self, path: str) -> bool:
        """Whether PEFT would adapt the module of this path (tuners_utils.py check_target_module_exists)."""
        raise NotImplementedError

    def saves(self, path: str) -> bool:
        """Whether the module of this path was trained whole (`modules_to_save`)."""
        raise NotImplementedError
