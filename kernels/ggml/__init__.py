"""Quantizes to ggml's block types on a GPU: 4-bit levels, ternary types, MXFP4, legacy types with importance."""
