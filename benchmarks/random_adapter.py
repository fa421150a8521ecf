"""Makes a LoRA adapter on all linear layers of a random checkpoint, as PEFT saves it.

python benchmarks/random_adapter.py FOLDER RANK '{"layers": 2, ...}'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from random_model import tensor_shapes
from safetensors.numpy import save_file
from shape import Shape


def make_adapter(folder: Path, shape: Shape, rank: int) -> Path:
    """Writes adapter_config.json and adapter_model.safetensors: float32, A as PEFT begins it, B small and not zero."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(1)
    tensors: dict[str, np.ndarray] = {}
    for name, (*_, rows, columns) in ((name, size) for name, size in tensor_shapes(shape).items() if len(size) == 2):
        if "_proj" not in name:
            continue
        prefix = "base_model.model." + name.removesuffix(".weight")
        first = generator.uniform(-1, 1, (rank, columns)) * columns**-0.5
        tensors[f"{prefix}.lora_A.weight"] = first.astype(np.float32)
        tensors[f"{prefix}.lora_B.weight"] = generator.normal(0, 0.02, (rows, rank)).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({name.split(".")[-3] for name in tensors})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0}
    config |= {"bias": "none", "target_modules": targets, "base_model_name_or_path": "", "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return folder


if __name__ == "__main__":
    make_adapter(Path(sys.argv[1]), Shape(**json.loads(sys.argv[3])), int(sys.argv[2]))
