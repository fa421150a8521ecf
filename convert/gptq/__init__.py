"""GPTQ checkpoints, version 1 and 2: `qweight`, `qzeros`, `scales` and `g_idx` for each module."""
