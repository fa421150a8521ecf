"""Compiles kernels for GPUs that are not here: python compiling.py CASES.py, which has `CASES` (see `Compiled`).

Triton's interpreter takes much that its compiler does not (other types, bf16, layouts, shared memory). ptxas comes with
triton, so registers, spills and shared memory of a real build are known without a GPU.
"""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Compiled:
    """One build of a kernel.

    Attributes:
        name: of the case.
        kernel: the `triton.jit` function.
        types: argument -> "*fp16", "i32", ... for all that are not constants.
        constants: argument -> value of all tl.constexpr; None too.
        options: num_warps, num_stages, enable_fp_fusion.
        divisible: arguments that are multiples of 16 (as Triton finds out at a launch).
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()


def build(case: Compiled, arch: int) -> Any:
    """Gives Triton's compiled kernel for compute capability `arch` (80, 90)."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    names = case.kernel.arg_names
    signature = {name: case.types.get(name, "constexpr") for name in names}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible}
    source = ASTSource(case.kernel, signature=signature, constexprs=dict(case.constants), attrs=attrs)
    return compile_kernel(source, target=GPUTarget("cuda", arch, 32), options=case.options)


def tools() -> Path:
    """Folder of ptxas, cuobjdump and nvdisasm that come with triton."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def report(case: Compiled, arch: int) -> dict[str, Any]:
    """Builds a case and says registers, stack bytes (spills), shared memory and counts of instructions."""
    kernel = build(case, arch)
    with tempfile.TemporaryDirectory() as name:
        cubin = Path(name, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _output("cuobjdump", "-res-usage", str(cubin))
        code = _output("nvdisasm", "-c", str(cubin))
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    counted: dict[str, int] = {}
    for instruction in re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", code, re.M):
        counted[instruction] = counted.get(instruction, 0) + 1
    return {
        "name": case.name, "arch": arch, "registers": found.get("REG"), "stack": found.get("STACK"),
        "shared": kernel.metadata.shared, "instructions": counted, "sass": code,
    }  # fmt: skip


def _output(tool: str, *arguments: str) -> str:
    ran = subprocess.run([str(tools() / tool), *arguments], capture_output=True, text=True, check=True)
    return ran.stdout + ran.stderr


if __name__ == "__main__":
    cases = runpy.run_path(sys.argv[1])["CASES"]
    rows = [report(case, arch) for case in cases for arch in (80, 90)]
    sys.stdout.write(json.dumps([{key: value for key, value in row.items() if key != "sass"} for row in rows]))
