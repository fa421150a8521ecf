"""The types a GGUF file can be named after; nothing here imports numpy, so that `--help` may list them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# Types that --outtype names -> llama.cpp's number of the file type, general.file_type (llama.h, llama_ftype)
FILE_TYPES: Mapping[str, int] = MappingProxyType(
    {
        "F32": 0,
        "F16": 1,
        "BF16": 32,
        "Q8_0": 7,
        "Q4_0": 2,
        "Q4_1": 3,
        "Q5_0": 8,
        "Q5_1": 9,
        "Q2_K": 10,
        "Q2_K_S": 21,
        "Q3_K_S": 11,
        "Q3_K_M": 12,
        "Q3_K_L": 13,
        "Q4_K_S": 14,
        "Q4_K_M": 15,
        "Q5_K_S": 16,
        "Q5_K_M": 17,
        "Q6_K": 18,
        "IQ4_NL": 25,
        "IQ4_XS": 30,
        "TQ1_0": 36,
        "TQ2_0": 37,
        "MXFP4_MOE": 38,
    }
)

# Other names of llama-quantize for them (QUANT_OPTIONS in tools/quantize/quantize.cpp)
ALIASES: Mapping[str, str] = MappingProxyType({"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"})
