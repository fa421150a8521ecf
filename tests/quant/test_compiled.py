"""Compiled functions where no folder can keep them."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import numba.core.caching as caching
caching.CacheImpl._locator_classes = []
from quantpress.quant.compiled import compiled

@compiled()
def double(value):
    return 2 * value

print(double(21))
"""


def test_a_function_is_compiled_without_a_folder_to_keep_it_in() -> None:
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["42"]
