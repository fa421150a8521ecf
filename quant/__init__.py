"""Numbers only: arrays in, quantized arrays out; no files and no architectures."""
