"""Build of GPTQ's inner loop that its test looks at; see compiling.py, which this is run beside.

    python compile_gptq_block.py

prints the floating-point operations of each build's PTX as well, which say how they round.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from compiling import Compiled, build

from quantpress.kernels import gptq_block

_KERNEL = gptq_block._column_loop
_TYPES = dict.fromkeys(("work", "upper", "scale", "errors"), "*fp32") | dict.fromkeys(("zero", "codes"), "*u8")
_TYPES |= dict.fromkeys(("groups", "order"), "*i64") | {"losses": "*fp64", "rows": "i32", "count": "i32", "top": "fp32"}
_TYPES |= {name: "i64" for name in _KERNEL.arg_names if name.endswith("_stride")}

CASES = [Compiled("block", _KERNEL, _TYPES, {"tile_rows": 2, "tile_columns": 128}, gptq_block._LAUNCH)]


def rounding(case: Compiled, arch: int) -> list[str]:
    """Gives the operations on float32 and float64 in a build's PTX: "add.rn.f32", ..., and "ftz" if any flushes."""
    assembly = build(case, arch).asm["ptx"]
    found = set(re.findall(r"^\s+(?:@\S+\s+)?([a-z0-9.]+\.f(?:32|64))\b", assembly, re.MULTILINE))
    return sorted(found | ({"ftz"} if ".ftz" in assembly else set()))


if __name__ == "__main__":
    sys.stdout.write(json.dumps({arch: rounding(case, arch) for case in CASES for arch in (80, 90)}))
