"""Knows the adapters that cannot be merged into weights, or not by adding what is in the file, and says why.

Read off PEFT 0.21: tuners/lora/variants.py and layer.py. Variants that differ from LoRA in training only are not here:
VeLoRA and MonteCLoRA merge and run as plain LoRA, MiCA freezes lora_B, and EVA, orthogonal and gaussian only choose
where training starts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from quantpress.convert.files import shown
from quantpress.quant.errors import InputError

__all__ = ["refuse_unmergeable"]

log = logging.getLogger(__name__)

_KINDS = ("LORA", "ADALORA", "LOHA", "LOKR", "TRAINABLE_TOKENS")
_PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT")
_MERGE_WITH_PEFT = "merge it with PEFT's merge_and_unload and open the folder that gives"

# key -> why an adapter with it cannot be merged
_REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "alora_invocation_tokens": "an activated LoRA acts only behind its invocation tokens, so no weights hold it",
        "arrow_config": "Arrow chooses among several adapters for each token, so no weights hold it",
        "use_qalora": "QALoRA adds to groups of inputs of a GPTQ model, not to its weights",
        "kasa_config": f"KaSA changes the base as it is loaded; {_MERGE_WITH_PEFT}",
        "use_bdlora": f"BD-LoRA stores blocks of a larger matrix; {_MERGE_WITH_PEFT}",
        "layer_replication": f"the adapter was trained on a model with repeated layers; {_MERGE_WITH_PEFT}",
        "megatron_config": "adapters of Megatron layers are not supported",
        "enable_lora": "parts of joined linear layers were adapted as PEFT before 0.3 did; convert it with that PEFT",
    }
)
# Values of init_lora_weights for which PEFT changes the base when training starts, and again when it loads the adapter.
_CHANGED_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
_HARMLESS_STARTS = ("gaussian", "eva", "orthogonal", "mica")
_KEYS = """
    alpha alpha_pattern auto_mapping base_model_name_or_path beta1 beta2 bias corda_config decompose_both
    decompose_factor deltaT ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode
    init_lora_weights init_r init_weights layers_pattern layers_to_transform loftq_config lora_alpha lora_bias
    lora_dropout lora_ga_config megatron_core merge_weights module_dropout modules_to_save monteclora_config
    orth_reg_weight peft_type peft_version qalora_group_size r rank_dropout rank_dropout_scale rank_pattern revision
    runtime_config target_modules target_parameters target_r task_type tfinal tinit token_indices total_step
    trainable_token_indices use_dora use_effective_conv2d use_rslora velora_config
"""
_KNOWN = frozenset(_KEYS.split())  # of PEFT 0.2 to 0.21, but those refused above


def refuse_unmergeable(config: Mapping[str, Any], name: str) -> None:
    """Checks that an adapter_config.json describes what can be merged.

    Args:
        config: its contents.
        name: the file, for messages.

    Raises:
        InputError: it describes something else; says why and what to do.
    """
    _check_kind(config, name)
    for key, reason in _REFUSED.items():
        if key in config and config[key] not in (None, False, [], {}):
            raise InputError(f"{name}: {key} is set: {reason}")
    if config["peft_type"] == "ADALORA" and config.get("use_dora"):
        raise InputError(f"{name}: use_dora is set, which PEFT does not allow for AdaLoRA")
    _check_start(config, name)
    for key in sorted(config.keys() - _KNOWN - _REFUSED.keys()):
        _check_unknown(key, config[key], name)


def _check_kind(config: Mapping[str, Any], name: str) -> None:
    if "peft_type" not in config:
        if "fine_tune_type" in config or "lora_parameters" in config:
            raise InputError(
                f"{name}: an adapter of MLX; its matrices are stored another way: fuse it with mlx_lm.fuse"
            )
        raise InputError(f"{name}: no peft_type; an adapter that PEFT or a tool on top of it saved is expected")
    kind = config["peft_type"]
    if not isinstance(kind, str):
        raise InputError(f"{name}: peft_type is {shown(kind)}, must be text")
    if kind in _PROMPTS:
        raise InputError(f"{name}: peft_type {kind} adds inputs to each layer or text, which no weights can hold")
    if kind == "XLORA":
        raise InputError(f"{name}: peft_type XLORA mixes adapters anew for each token, which no weights can hold")
    if kind not in _KINDS:
        raise InputError(
            f"{name}: peft_type {shown(kind)} is not supported; supported are {', '.join(_KINDS)}; {_MERGE_WITH_PEFT}"
        )


def _check_start(config: Mapping[str, Any], name: str) -> None:
    """Looks at where training started (PEFT: lora/layer.py LoraLayer.update_layer)."""
    start = config.get("init_lora_weights")
    if start is None or isinstance(start, bool) or config["peft_type"] != "LORA":
        return
    if not isinstance(start, str):
        raise InputError(f"{name}: init_lora_weights is {shown(start)}, must be true, false or text")
    if start.lower().startswith(_CHANGED_BASE):
        raise InputError(
            f"{name}: init_lora_weights is {shown(start)}: the adapter was trained on a base that PEFT had changed, and"
            " adds to that one only; save it with path_initial_model_for_weight_conversion, or, if the base you give"
            " is the changed one, set init_lora_weights to true"
        )
    if start.lower() not in _HARMLESS_STARTS:
        raise InputError(
            f"{name}: init_lora_weights {shown(start)} is not known, so its base may have been changed;"
            f" {_MERGE_WITH_PEFT}"
        )


def _check_unknown(key: str, value: Any, name: str) -> None:
    """A newer PEFT has more keys; those named as its variants are may change the arithmetic."""
    if value in (None, False, "", [], {}):
        return
    if key.startswith("use_") or key.endswith("_config"):
        raise InputError(f"{name}: {shown(key)} is set, a variant that is not known; {_MERGE_WITH_PEFT}")
    log.info("%s: %s is not known and has no effect", name, shown(key))
