"""Products with bitsandbytes' 4-bit levels, NF4 and FP4."""
