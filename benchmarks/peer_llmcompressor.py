"""GPTQ with llm-compressor, as its own process in its own environment; its settings go to OUT.settings.json.

    python peer_llmcompressor.py MODEL WINDOWS.npy OUT BITS GROUP_SIZE [DTYPE]

WINDOWS are (samples, tokens) int32 token ids. All else is llm-compressor's default, written out below.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset  # type: ignore[import-not-found]
from llmcompressor import oneshot  # type: ignore[import-not-found]
from llmcompressor.modifiers.gptq import GPTQModifier  # type: ignore[import-not-found]
from transformers import AutoModelForCausalLM


def main() -> None:
    """Loads, quantizes, saves."""
    model, windows, out, bits, group_size = sys.argv[1:6]
    dtype = sys.argv[6] if len(sys.argv) > 6 else "auto"
    rows = np.load(windows).astype(np.int64)
    data = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": np.ones_like(rows).tolist()})
    weights = QuantizationArgs(num_bits=int(bits), symmetric=True, strategy="group", group_size=int(group_size))
    modifier = GPTQModifier(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=["lm_head"]
    )
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, device_map="cpu")
    oneshot(
        model=loaded, dataset=data, recipe=modifier, num_calibration_samples=len(rows), max_seq_length=rows.shape[1],
        shuffle_calibration_samples=False,
    )  # fmt: skip
    loaded.save_pretrained(out, save_compressed=True)
    settings = {
        "llmcompressor": version("llmcompressor"),
        "compressed-tensors": version("compressed-tensors"),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "threads": torch.get_num_threads(),
        "dtype": str(loaded.dtype),
        "damping": modifier.dampening_frac,
        "block_size": modifier.block_size,
        "actorder": str(modifier.actorder),
    }
    Path(f"{out}.settings.json").write_text(json.dumps(settings))


if __name__ == "__main__":
    main()
