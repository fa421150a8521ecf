"""compressed-tensors checkpoints: `pack-quantized` and `int-quantized`."""
