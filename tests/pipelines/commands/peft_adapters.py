"""Adapters as PEFT makes and merges them, for the tests of the commands."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch


def make_adapter(model: Path, folder: Path, *, seed: int = 0, spread: float = 0.1, **settings: Any) -> Path:
    """Saves a LoRA adapter of a model with random weights, none of them zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            LoraConfig(task_type="CAUSAL_LM", **options),
        )
        with torch.no_grad():
            for name, value in adapted.named_parameters():
                if "lora_B" in name:
                    value.normal_(0, spread)
        adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def merged_by_peft(model: Path, adapters: list[tuple[Path, float]]) -> dict[str, np.ndarray]:
    """The weights that PEFT gives when it merges adapters one after the other, in float32."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        for folder, weight in adapters:
            adapted = PeftModel.from_pretrained(loaded, str(folder))
            for module in adapted.modules():
                if isinstance(module, LoraLayer):
                    module.set_scale("default", weight)
            loaded = adapted.merge_and_unload()
    return {name: value.detach().numpy() for name, value in loaded.state_dict().items()}
