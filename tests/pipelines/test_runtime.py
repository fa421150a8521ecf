"""The contract of runtimes, held by the ones there are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from quantpress.pipelines.llama_cpp import LlamaCpp, LlamaCppRuntime
from quantpress.pipelines.runtime import Runtime


def test_llama_cpp_keeps_the_contract(tiny_gguf: Path, library: LlamaCpp) -> None:
    runtime: Runtime = LlamaCppRuntime(tiny_gguf, threads=1, library=library)
    with runtime as opened:
        assert opened is runtime
        rows = opened.logits(np.arange(3, 11, dtype=np.int32), 6)
        assert (rows.shape, rows.dtype) == ((2, opened.vocab_size), np.float32)
        assert isinstance(opened.name, str)
        with pytest.raises(ValueError):
            opened.logits(np.arange(3, 11, dtype=np.int32), 8)
    runtime.close()
