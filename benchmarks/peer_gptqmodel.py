"""GPTQ with GPTQModel, as its own process in its own environment; its settings go to OUT.settings.json.

    GPTQMODEL_CPU_WORKERS=2 python peer_gptqmodel.py MODEL WINDOWS.npy OUT BITS GROUP_SIZE [DTYPE]

WINDOWS are (samples, tokens) int32 token ids. All else is GPTQModel's default, written out below.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
from gptqmodel import GPTQModel, QuantizeConfig  # type: ignore[import-not-found]


def main() -> None:
    """Loads, quantizes, saves."""
    model, windows, out, bits, group_size = sys.argv[1:6]
    dtype = sys.argv[6] if len(sys.argv) > 6 else "auto"
    config = QuantizeConfig(bits=int(bits), group_size=int(group_size), sym=True)
    rows = np.load(windows).astype(np.int64).tolist()
    calibration = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
    loaded = GPTQModel.load(model, config, device="cpu", dtype=dtype)
    loaded.quantize(calibration, batch_size=1)
    loaded.save(out)
    settings = {
        "gptqmodel": version("gptqmodel"),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "dtype": dtype,
        "damping": config.damp_percent,
        "desc_act": config.desc_act,
        "act_group_aware": config.act_group_aware,
        "true_sequential": config.true_sequential,
        "static_groups": config.static_groups,
        "mse": config.mse,
    }
    Path(f"{out}.settings.json").write_text(json.dumps(settings))


if __name__ == "__main__":
    main()
