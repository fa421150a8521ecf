"""Which launch parameters are worth measuring for a product: those that fit the device and the shape.

What a kernel would do wrong or slowly by arithmetic is left out before anything is compiled: tiles that are larger than
the matrix, steps along K that do not divide a group, tiles that do not fit shared memory or registers, programs that
leave most multiprocessors idle or add up more partial sums than that needs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton

from quantpress.kernels.launch import Launch, Problem

__all__ = ["H200", "Device", "candidates", "device_facts", "shared_bytes"]

_FEW = 4  # input rows that the GEMV unrolls
_SMALL = 64  # input rows up to which K is split
_ACCUMULATED = 128  # float32 sums that a thread may hold: half of its registers
_WAVES = 8  # programs for a multiprocessor; where outputs alone give so many, K is not split


@dataclass(frozen=True, slots=True)
class Device:
    """What a choice depends on: of a GPU.

    Attributes:
        name: as CUDA gives it.
        capability: compute capability.
        processors: multiprocessors.
        shared_bytes: shared memory that a program can have.
        cache_bytes: of the L2 cache.
    """

    name: str
    capability: tuple[int, int]
    processors: int
    shared_bytes: int
    cache_bytes: int


H200 = Device("NVIDIA H200", (9, 0), 132, 232448, 60 << 20)
"""What is planned for where no GPU is at hand."""


def device_facts(device: torch.device | str = "cuda") -> Device:
    """Asks a GPU.

    Raises:
        RuntimeError: there is none.
    """
    found: Any = torch.cuda.get_device_properties(device)
    return Device(
        found.name, (found.major, found.minor), found.multi_processor_count, found.shared_memory_per_block_optin,
        found.L2_cache_size,
    )  # fmt: skip


def candidates(problem: Problem, device: Device) -> list[Launch]:
    """Gives the launches that are worth measuring, without duplicates.

    Args:
        problem: the product.
        device: where it would run.
    """
    found: list[Launch] = []
    if problem.rows_in <= _FEW:
        found.extend(_gemv(problem, device))
    if problem.rows_in > 1:
        found.extend(_tiled(problem, device))
    if problem.rows_in > _SMALL or (problem.dtype == "float32" and problem.rows_in > _FEW):
        found.append(Launch("dense"))
    return list(dict.fromkeys(found))


def shared_bytes(problem: Problem, launch: Launch) -> int:
    """Estimates the shared memory of a program of the tiled kernel, from above.

    Tiles of input and words are under way `stages` at a time; the expanded weights lie there once, because both
    operands of a tensor core's product come from shared memory. The GEMV keeps its sums there only at its end.
    """
    size = 4 if problem.dtype == "float32" else 2
    if launch.kernel != "tiled":
        return 4 * launch.block_n * launch.warps * min(problem.rows_in, _FEW)
    inputs = launch.block_m * launch.block_k * size
    words = launch.block_k * launch.block_n * _stored_bits(problem) // 8
    weights = launch.block_k * launch.block_n * size
    under_way = max(launch.stages - 1, 1) * (inputs + words)
    return max(under_way + weights, launch.block_m * launch.block_n * 4)


def _stored_bits(problem: Problem) -> int:
    return 4 if problem.bits == 3 else problem.bits


def _gemv(problem: Problem, device: Device) -> Iterator[Launch]:
    widths, steps, splits, warps = (32, 64, 128, 256, 512), (16, 32, 64, 128, 256), (1, 2, 4, 8, 16), (1, 2, 4, 8)
    for block_n, block_k, split_k, count in itertools.product(widths, steps, splits, warps):
        launch = Launch("gemv", 1, block_n, block_k, split_k, count, 1)
        words = block_n * block_k * _stored_bits(problem) // 32 // (32 * count)  # that a thread loads at once
        if _suits(problem, launch) and 1 <= words <= 16 and _fills(problem, launch, device):
            yield from (replace(launch, stages=stages) for stages in (1, 3))


def _tiled(problem: Problem, device: Device) -> Iterator[Launch]:
    heights = (16,) if problem.rows_in <= 16 else (16, 32, 64) if problem.rows_in <= _SMALL else (64, 128, 256)
    splits = (1, 2, 4, 8, 16) if problem.rows_in <= _SMALL else (1,)
    for block_m, block_n, block_k, split_k in itertools.product(heights, (32, 64, 128, 256), (32, 64, 128), splits):
        for warps, stages in itertools.product((4, 8), (2, 3, 4, 5)):
            launch = Launch("tiled", block_m, block_n, block_k, split_k, warps, stages)
            fits = shared_bytes(problem, launch) <= device.shared_bytes
            held = block_m * block_n <= _ACCUMULATED * 32 * warps and block_m * block_n >= 16 * 8 * warps
            if fits and held and _suits(problem, launch) and _fills(problem, launch, device):
                yield launch


def _suits(problem: Problem, launch: Launch) -> bool:
    """Whether tiles are no larger than the matrix, and steps along K stay within a group."""
    if launch.block_m > max(16, triton.next_power_of_2(problem.rows_in)):
        return False
    if launch.block_n > max(32, triton.next_power_of_2(problem.rows)):
        return False
    group = min(problem.group_size, problem.columns)
    if launch.block_k > max(16, triton.next_power_of_2(group)):
        return False
    whole_rows = problem.group_size >= problem.columns
    # groups that no power of two divides take the general path, whatever the step is
    return bool(whole_rows or not group % launch.block_k or group % 16 or launch.block_k <= 16)


def _fills(problem: Problem, launch: Launch, device: Device) -> bool:
    """Whether splitting K gives every multiprocessor something to do, and not much more than that."""
    tiles = triton.cdiv(problem.rows_in, launch.block_m) if launch.kernel == "tiled" else 1
    tiles *= triton.cdiv(problem.rows, launch.block_n)
    steps = triton.cdiv(problem.columns, launch.block_k)
    if launch.split_k > 1:
        return bool(launch.split_k <= steps and tiles * launch.split_k <= _WAVES * device.processors)
    return bool(tiles >= device.processors // 4 or steps == 1 or problem.rows_in > _SMALL)
