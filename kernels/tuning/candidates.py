"""Which launch parameters are worth measuring for a product: those that fit the device and the shape.

What a kernel would do wrong or slowly by arithmetic is left out before anything is compiled: tiles that are larger than
the matrix, steps along K that do not divide a group, tiles that do not fit shared memory or registers, programs that
leave most multiprocessors idle or add up more partial sums than that needs.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton

from quantpress.kernels.launch import Launch, Problem

__all__ = ["H200", "Device", "candidates", "device_facts", "shared_bytes"]

_FEW = 4  # input rows that the GEMV unrolls
_SMALL = 64  # input rows up to which tiles are low, and K is split in up to 16
_ACCUMULATED = 128  # float32 sums that a thread may hold: half of its registers
_GEMV_WORDS = 16  # words that a thread of the GEMV holds for one input row; the sums of more rows take their place
_GEMV_SPLITS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32)
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
    """Gives the launches that are worth measuring, without duplicates; none for other kinds than "packed".

    Args:
        problem: the product.
        device: where it would run.
    """
    found: list[Launch] = []
    if problem.kind != "packed":
        return found
    if problem.rows_in <= _FEW:
        found.extend(_gemv(problem, device))
    if problem.rows_in > 1:
        found.extend(_tiled(problem, device))
    if problem.rows_in > _SMALL or (problem.dtype == "float32" and problem.rows_in > _FEW):
        found.append(Launch("dense"))
    return list(dict.fromkeys(found))


def shared_bytes(problem: Problem, launch: Launch, device: Device) -> int:
    """Gives the shared memory of a program, as Triton 3.6 and 3.9 lay it out.

    Of the tiled kernel: tiles of input and words are under way, one fewer than there are stages; on tensor cores that
    read shared memory by themselves (compute capability 9) an input is kept for one stage more. Expanded weights lie
    there once. Of the GEMV: words that are fetched ahead, and the sums of its warps. Dequantizing takes none to speak
    of.
    """
    if launch.kernel == "dense":
        return 0
    ahead = max(launch.stages - 1, 0)
    words = launch.block_k * launch.block_n * problem.bits // 8
    if launch.kernel == "gemv":
        return (ahead * words if ahead else 0) + 4 * launch.warps * min(16 * launch.warps, launch.block_n)
    size = 4 if problem.dtype == "float32" else 2
    inputs = launch.block_m * launch.block_k * size
    kept = inputs if device.capability >= (9, 0) and problem.dtype != "float32" else 0
    under_way = max(ahead, 1) * (inputs + words) + kept + launch.block_k * launch.block_n * size
    # sums may be laid out anew on their way out, when all else is done with
    return max(under_way, launch.block_m * launch.block_n * (4 if launch.split_k > 1 else size))


def _gemv(problem: Problem, device: Device) -> Iterator[Launch]:
    unit_codes, unit_words = (32, 3) if problem.bits == 3 else (32 // problem.bits, 1)
    held = [words for words in (2, 4, 8, 16) if words * problem.rows_in <= _GEMV_WORDS]
    sizes = itertools.product((32, 64, 128, 256), held, _GEMV_SPLITS, (1, 2, 4, 8), (1, 3))
    for block_n, words, split_k, warps, stages in sizes:
        units = words * 32 * warps // (block_n * (unit_words + 1) // 2)
        launch = Launch("gemv", 1, block_n, units * unit_codes, split_k, warps, stages)
        if not units or 8 * warps > block_n or shared_bytes(problem, launch, device) > device.shared_bytes:
            continue
        small = block_n <= max(32, _above(problem.rows)) and launch.block_k <= max(unit_codes, _above(problem.columns))
        if small and _fills(problem, launch, device):
            yield launch


def _tiled(problem: Problem, device: Device) -> Iterator[Launch]:
    few = problem.rows_in <= _SMALL
    heights = [size for size in ((8, 16, 32, 64) if few else (64, 128, 256)) if size <= max(8, _above(problem.rows_in))]
    widths, steps = [32, 64, 128, 256], [32, 64, 128] if problem.group_size % 32 == 0 else [16, 32, 64, 128]
    if problem.dtype == "float32":  # greater tiles are made smaller by the kernel
        heights, widths, steps = [size for size in heights if size <= 64], [16, 32], [16, 32]
    splits = (1, 2, 4, 8, 16) if few else (1, 2, 4, 8)
    for launch in itertools.starmap(
        functools.partial(Launch, "tiled"), itertools.product(heights, widths, steps, splits, (4, 8), (2, 3, 4, 5))
    ):
        held = launch.block_m * launch.block_n // (32 * launch.warps)
        if not 1 <= held <= _ACCUMULATED or shared_bytes(problem, launch, device) > device.shared_bytes:
            continue
        if _suits(problem, launch) and _fills(problem, launch, device):
            yield launch


def _suits(problem: Problem, launch: Launch) -> bool:
    """Whether tiles are no larger than the matrix, and steps along K stay within a group."""
    least = 32 if problem.bits == 3 else 16
    if launch.block_n > max(32, _above(problem.rows)) or launch.block_k > max(least, _above(problem.columns)):
        return False
    if launch.block_k < least or problem.group_size >= problem.columns:
        return launch.block_k >= least
    # a step that does not divide the groups is made smaller by the kernel, and that one is a candidate already; groups
    # that no step divides are computed with any
    return not least <= math.gcd(problem.group_size, launch.block_k) < launch.block_k


def _above(size: int) -> int:
    return int(triton.next_power_of_2(size))


def _fills(problem: Problem, launch: Launch, device: Device) -> bool:
    """Whether splitting K gives every multiprocessor something to do, and not much more than that."""
    tiles = triton.cdiv(problem.rows_in, launch.block_m) if launch.kernel == "tiled" else 1
    tiles *= triton.cdiv(problem.rows, launch.block_n)
    steps = triton.cdiv(problem.columns, launch.block_k)
    if launch.split_k > 1:
        return bool(launch.split_k <= steps and tiles * launch.split_k <= _WAVES * device.processors)
    return bool(tiles >= device.processors // 4 or steps == 1 or problem.rows_in > _SMALL)
