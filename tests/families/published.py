"""What modules of families that bring their own code share: writing the published layout, and an oracle for it.

The oracle is a class of transformers that computes the same from the same values under other names: Glm for ChatGLM,
Llama for what is Llama in all but the layout.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.tiny import write_tokenizer

__all__ = ["Settings", "Shapes", "Tensors", "computed", "llama_settings", "stored_in", "write_published"]

Tensors = dict[str, NDArray[np.float32]]
Shapes = Mapping[str, tuple[int, ...]]
Settings = Mapping[str, Any]


def write_published(folder: Path, config: Settings, shapes: Shapes) -> None:
    """Writes random weights that all matter: norms around one, the rest as wide as its inputs allow."""
    from safetensors.numpy import save_file

    random, tensors = np.random.default_rng(7), {}
    for name, shape in shapes.items():
        noise = random.normal(size=shape).astype(np.float32)
        if len(shape) == 1:
            tensors[name] = 0.2 * noise + np.float32(name.endswith("weight"))
        else:
            tensors[name] = noise * np.float32(0.3 if shape[0] == config["vocab_size"] else shape[1] ** -0.5)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(folder)


def stored_in(folder: Path) -> tuple[dict[str, Any], Tensors]:
    from safetensors.numpy import load_file

    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def computed(model_type: str, settings: Settings, tensors: Tensors, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """Gives what transformers' class of this type computes from these weights in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    model.load_state_dict({name: torch.from_numpy(values.copy()) for name, values in tensors.items()}, strict=True)
    with torch.no_grad():
        found: NDArray[np.float32] = model(torch.from_numpy(tokens[None])).logits[0].numpy()
    return found


def llama_settings(config: Settings, **others: Any) -> dict[str, Any]:
    keys = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return {
        **{key: config[key] for key in keys},
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "pad_token_id": None,
        **others,
    }
