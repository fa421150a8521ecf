"""Measures the kernels on this GPU and finds their best launch parameters, for `quantpress bench kernels`."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantpress.pipelines.progress import Progress, no_progress
from quantpress.quant.errors import InputError, OutputError, UsageError

if TYPE_CHECKING:
    from quantpress.kernels.launch import Launch, Problem
    from quantpress.kernels.tuning.candidates import Device
    from quantpress.kernels.tuning.measuring import Measured

__all__ = ["SHAPES", "BenchOptions", "BenchResult", "Planned", "bench", "keep", "plan"]

SHAPES = {
    "llama-3-8b": ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)),
    "llama-3-70b": ((8192, 10240), (8192, 8192), (8192, 57344), (28672, 8192)),
    "qwen2.5-7b": ((3584, 4608), (3584, 3584), (3584, 37888), (18944, 3584)),
}
"""Inputs and outputs (K, N) of models' layers: queries, keys and values together, output of the attention, gate and up
projection together, down projection."""

_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # of bitsandbytes' codes
_ROWS_IN = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
_GREATEST = 1 << 20  # inputs, outputs or input rows: far above any model's, and of 64 GiB at most in 8 bits


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What is measured: every combination.

    Attributes:
        bits: of codes.
        shapes: (K, N), inputs and outputs.
        rows_in: M, input rows.
        group_size: columns that share a scale; 0 for all of them.
        dtype: "float16", "bfloat16" or "float32".
        symmetric: without zeros.
        kind: "packed"; "w8a8" for int8 codes of weights and inputs; "nf4" for bitsandbytes' four-bit codes.
    """

    bits: tuple[int, ...] = (4,)
    shapes: tuple[tuple[int, int], ...] = SHAPES["llama-3-8b"]
    rows_in: tuple[int, ...] = _ROWS_IN
    group_size: int = 128
    dtype: str = "bfloat16"
    symmetric: bool = True
    kind: str = "packed"

    def __post_init__(self) -> None:
        """Checks numbers.

        Raises:
            UsageError: something is out of range.
        """
        if any(bits not in (2, 3, 4, 8) for bits in self.bits):
            raise UsageError(f"--bits {self.bits}: the kernels take 2, 3, 4 and 8")
        sizes = [*itertools.chain(*self.shapes), *self.rows_in]
        if not all(1 <= size <= _GREATEST for size in sizes) or not 0 <= self.group_size <= _GREATEST:
            raise UsageError(f"shapes, input rows and groups are numbers from 1 to {_GREATEST}")
        wanted = {"packed": self.bits, "w8a8": (8,), "nf4": (4,)}[self.kind]
        if self.bits != wanted or (self.kind != "packed" and not self.symmetric):
            raise UsageError(f"--kind {self.kind} has {wanted[0]} bits and no zeros")
        if self.kind == "nf4" and self.group_size not in _BLOCKS:
            raise UsageError(
                f"--group-size {self.group_size}: bitsandbytes has blocks of {', '.join(map(str, _BLOCKS))}"
            )

    def problems(self) -> list[Problem]:
        """Gives the products, those of one matrix after each other."""
        from quantpress.kernels.launch import Problem

        def group(columns: int) -> int:
            """Size of the groups of such rows; nf4's run on over rows, w8a8's are whole rows."""
            if self.kind == "nf4":
                return self.group_size
            return min(self.group_size or columns, columns) if self.kind == "packed" else columns

        return [
            Problem(rows_in, rows, columns, bits, group(columns), self.dtype, self.symmetric, self.kind)
            for bits, (columns, rows), rows_in in itertools.product(self.bits, self.shapes, self.rows_in)
        ]


@dataclass(frozen=True, slots=True)
class Planned:
    """A product that would be measured: how it is launched now, and how many candidates a search has."""

    problem: Problem
    launch: Launch
    candidates: int

    def to_json(self) -> dict[str, Any]:
        """Gives it as `bench kernels --dry-run --json` prints it."""
        return {**asdict(self.problem), "launch": asdict(self.launch), "candidates": self.candidates}


@dataclass(frozen=True, slots=True)
class BenchResult:
    """All that was measured: on which GPU, bytes a second of a copy, and the file that was written, if one was."""

    gpu: str
    copy_bandwidth: float
    rows: tuple[Measured, ...]
    written: Path | None = None


def plan(options: BenchOptions, device: Device | None = None) -> tuple[Device, list[Planned]]:
    """Gives what would be measured; needs no GPU, and plans for an H200 where there is none.

    Raises:
        OutputError: triton is not installed.
        InputError: the file of launch parameters of this GPU is damaged.
    """
    with _triton():
        from quantpress.kernels.tuning.candidates import H200, candidates, device_facts
        from quantpress.kernels.tuning.choice import choose
    if device is None:
        device = device_facts() if _has_gpu() else H200
    with _readable():
        return device, [
            Planned(problem, choose(problem, device.name), len(candidates(problem, device)))
            for problem in options.problems()
        ]


def bench(
    options: BenchOptions, *, tune: bool = False, jobs: int = 1, dense: bool = True, progress: Progress = no_progress
) -> BenchResult:
    """Measures on the first CUDA device; with `tune` searches, and keeps what is found in this GPU's file.

    Args:
        options: what to measure.
        tune: whether to search for launch parameters.
        jobs: processes that compile candidates.
        dense: whether to measure cuBLAS too.
        progress: of products.

    Raises:
        OutputError: no CUDA device, no triton, a product that no launch runs, or the file cannot be written.
        InputError: the file of launch parameters of this GPU is damaged.
    """
    with _triton():
        from quantpress.kernels.tuning.ahead import Ahead
        from quantpress.kernels.tuning.candidates import device_facts
        from quantpress.kernels.tuning.choice import device_file
        from quantpress.kernels.tuning.measuring import measure
        from quantpress.kernels.tuning.search import Refused
        from quantpress.kernels.tuning.timing import copy_bandwidth, graph_seconds
    if not _has_gpu():
        raise OutputError("no CUDA device here: kernels are measured on the GPU that they will run on (see --dry-run)")
    device, problems, rows = device_facts(), options.problems(), []
    path = device_file(device.name)
    with Ahead(jobs) as ahead, _readable():
        for done, problem in enumerate(problems):
            progress("measuring", done, len(problems))
            try:
                row = measure(problem, device, graph_seconds, ahead if tune else None, dense=dense)
            except Refused as error:
                raise OutputError(f"{problem}: no launch runs on {device.name}: {error}") from error
            rows.append(row)
            if tune:
                keep(path, device.name, row)
    progress("measuring", len(problems), len(problems))
    return BenchResult(device.name, copy_bandwidth(), tuple(rows), path if tune else None)


def keep(path: Path, gpu: str, row: Measured) -> None:
    """Puts what was found for a product into a file, beside what stands there.

    Raises:
        OutputError: the file cannot be written.
    """
    from quantpress.kernels.tuning.choice import forget
    from quantpress.kernels.tuning.tables import Table, Tuned, merged, read_table, write_table
    from quantpress.pipelines.sidecar import version_of

    old = read_table(path) if path.exists() else Table(gpu, measured=True)
    versions = {name: version_of(name) or "" for name in ("quantpress", "torch", "triton")}
    tuned = Tuned(row.problem, row.launch, row.timing.median * 1e6)
    try:
        write_table(path, Table(gpu, True, merged(old.launches, [tuned]), old.dense_from, versions))
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
    forget()


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@contextlib.contextmanager
def _triton() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise OutputError("triton is not installed: pip install 'quantpress[gpu]'") from error


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    from quantpress.kernels.tuning.choice import TuningError

    try:
        yield
    except TuningError as error:
        raise InputError(str(error)) from error
