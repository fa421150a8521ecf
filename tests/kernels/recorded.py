"""Turns a launch of a kernel into a case to compile: what the launcher hands over is noted and nothing runs.

So tensors may be on torch's device "meta", of any size, and no GPU is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import ModuleType
from typing import Any

import torch
from compiling import Compiled
from triton.runtime.jit import JITFunction

_TYPES = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64",
    torch.uint8: "*u8", torch.int8: "*i8", torch.bool: "*i1", torch.int16: "*i16",
}  # fmt: skip
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "num_ctas", "maxnreg")


def recorded(name: str, module: ModuleType, call: Callable[[], object]) -> Compiled:
    """Gives the case of the only launch that `call`, a launcher of `module`, makes; see `all_recorded`."""
    (case,) = all_recorded(name, [module], call)
    return case


def all_recorded(name: str, modules: Sequence[ModuleType], call: Callable[[], object]) -> list[Compiled]:
    """Gives the cases of all launches that `call` makes, a launcher whose checks of devices are in `modules`.

    Integers are specialized as Triton does at a launch: 1 is a constant, multiples of 16 are known to be such.
    """
    launched: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    with ExitStack() as restored:
        restored.callback(setattr, JITFunction, "run", JITFunction.run)
        JITFunction.run = lambda kernel, *values, grid, warmup, **options: launched.append((kernel, values, options))
        for module in modules:
            restored.callback(setattr, module, "check_device", module.check_device)
            module.check_device = lambda *given: None  # "meta" is no CUDA device
        call()
    return [_case(name, *each) for each in launched]


def _case(name: str, kernel: Any, values: tuple[Any, ...], options: dict[str, Any]) -> Compiled:
    given = dict(zip(kernel.arg_names, values, strict=False)) | options
    constants = {each.name: given[each.name] for each in kernel.params if each.is_constexpr}
    types, divisible = {}, []
    for key in kernel.arg_names:
        value = given[key]
        if key in constants or value is None or (type(value) is int and value == 1):
            constants[key] = value
        elif isinstance(value, torch.Tensor):
            types[key] = _TYPES[value.dtype]
            divisible.append(key)  # torch's allocations begin at multiples of 16 bytes
        else:
            types[key] = "fp32" if isinstance(value, float) else "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
            divisible += [key] if type(value) is int and value % 16 == 0 else []
    return Compiled(
        name, kernel, types, constants, {key: given[key] for key in _OPTIONS if key in given}, tuple(divisible)
    )
