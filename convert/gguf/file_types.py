"""The types a GGUF file can be named after; nothing here imports numpy, so that `--help` may list them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# Types that --outtype names -> llama.cpp's number of the file type, general.file_type (llama.h, llama_ftype)
FILE_TYPES: Mapping[str, int] = MappingProxyType(
    {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32}
)
