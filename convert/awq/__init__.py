"""AWQ checkpoints in the GEMM layout: `qweight`, `qzeros` and `scales` for each module."""
