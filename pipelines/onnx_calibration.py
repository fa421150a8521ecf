"""Ranges of the inputs of linears, found by running the model on a text: what static int8 rounds inputs by."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.convert.arch.spec import Role
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.files import shown
from quantpress.convert.preflight import Preflight, preflight
from quantpress.pipelines.machine import save_memory
from quantpress.pipelines.quantize_calibration import Calibration, activation_budget
from quantpress.quant.errors import UsageError

__all__ = ["CalibratedRanges", "RangeText", "calibrated_ranges", "input_ranges", "planned_ranges"]

Ranges = dict[tuple[str, int], tuple[float, float]]
_LOST = 0.5  # of the inputs, at most
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class RangeText:
    """The text that ranges are found on, a `TextChoice`.

    Attributes:
        calibration: UTF-8 text; None for the built-in one.
        samples: number of windows.
        sequence_length: tokens of a window; None for what the model was made for, up to 2048.
        seed: chooses their places.
        percentile: None for ranges that hold every value that was seen; else percent of the values that they must hold.
            Few values carry much where a model's first tokens have great ones (SmolLM2-135M: with 99.999 a KL
            divergence of 0.08 instead of 0.10 from float32, with 99.99 of 2), so the default is safe.
    """

    calibration: Path | None = None
    samples: int = 128
    sequence_length: int | None = None
    seed: int = 0
    percentile: float | None = None

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            UsageError: one that cannot be.
        """
        _check_percentile(self.percentile)


@dataclass(frozen=True, slots=True)
class CalibratedRanges:
    """Ranges and where they come from.

    Attributes:
        ranges: (slot, layer) -> least and greatest input; linears that it lacks are better left weight-only.
        record: for the sidecar.
        note: what a user should know; empty if nothing.
    """

    ranges: Ranges
    record: dict[str, Any]
    note: str = ""


def calibrated_ranges(
    source: Checkpoint, text: RangeText, *, threads: int, folder: Path | None = None, device: str = "cpu",
    max_memory: int | None = None, progress: Progress | None = None,
) -> CalibratedRanges:  # fmt: skip
    """Reads and cuts a text and finds the ranges on it; see `input_ranges`.

    Raises:
        InputError: the text or the tokenizer cannot be used, the text is too short, or inputs are not finite.
        OutputError: activations cannot be written.
    """
    calibration = Calibration.of(source, text)
    ranges = input_ranges(
        source, calibration.windows, threads=threads, folder=folder, device=device, max_memory=max_memory,
        percentile=text.percentile, progress=progress,
    )  # fmt: skip
    left = [name for key, name in _layer_linears(preflight(source)).items() if key not in ranges]
    record = {**calibration.record(), "percentile": text.percentile, "inputs_not_rounded": left}
    notes = [calibration.note] if calibration.note else []
    if left:
        notes.append(
            f"{len(left)} of {len(ranges) + len(left)} linears are weight-only, first {shown(left[0])}: the range of"
            " their inputs would round more than half of them to zero"
        )
    return CalibratedRanges(ranges, record, "; ".join(notes))


def input_ranges(
    source: Checkpoint, windows: Sequence[NDArray[np.int32]], *, threads: int, folder: Path | None = None,
    device: str = "cpu", max_memory: int | None = None, percentile: float | None = None,
    progress: Progress | None = None,
) -> Ranges:  # fmt: skip
    """Finds the least and the greatest input of every linear of the layers, with the weights as the source has them.

    A layer at a time is in memory; the numbers are the same for any number of threads and any memory. Linears that
    read the same values have the same range. The head is not among them: where int8 is static it is weight-only. So is
    a linear whose range would round more than half of its inputs to zero, because a few of them are that great; it is
    left out. (SmolLM2-135M: 14 of 210 linears, all of them `ffn_down`; without them the KL divergence from float32 is
    0.1 instead of 0.7.)

    Args:
        source: the model.
        windows: (T,) int32 token ids, all of the same length.
        threads: to compute with.
        folder: an existing folder for activations that do not fit in memory, and for the inputs of the layer to come;
            None for one of the system's temporary ones.
        device: where to compute.
        max_memory: bytes of memory for activations; None for half of what is free.
        percentile: None for all values; else percent of the values that a range must hold, as many being left out
            below it as above, to a hundredth of their size.
        progress: told the steps that are done and how many there are.

    Returns:
        (slot, layer) -> least and greatest value, of those linears that 8 bits are enough for.

    Raises:
        InputError: weights or inputs are not finite, or the model does not fit its family.
        UsageError: a percentile that is none.
        OutputError: activations cannot be written.
    """
    from quantpress.convert.calibration.ranges import RangeMethod
    from quantpress.convert.calibration.walk import calibrate
    from quantpress.pipelines.layer_work import with_checks

    _check_percentile(percentile)
    save_memory()  # the text has been tokenized, and no worker has started
    method = RangeMethod(percentile)
    with tempfile.TemporaryDirectory(prefix="quantpress-", dir=folder) as work:
        results = calibrate(
            with_checks(source), windows, method, targets=lambda _name: True, threads=threads, folder=Path(work),
            device=device, max_memory=activation_budget(max_memory), progress=progress,
        )  # fmt: skip
        for _ in results:
            pass  # a layer is done, and so are the inputs of the next one
    return {key: ends for key, ends in method.found.items() if method.lost[key] <= _LOST}


def planned_ranges(checked: Preflight) -> Ranges:
    """Gives a range for every linear that stands in for its own, for a graph that is only planned: sizes are right."""
    return dict.fromkeys(_layer_linears(checked), (-1.0, 1.0))


def _layer_linears(checked: Preflight) -> dict[tuple[str, int], str]:
    """Gives the names of the linears of the layers by slot and layer."""
    bindings = checked.bindings
    return {(row.slot, layer): tensor.name for row, layer, tensor in bindings if row.role is Role.LINEAR and layer >= 0}


def _check_percentile(percentile: float | None) -> None:
    if percentile is not None and not 50 < percentile <= 100:
        raise UsageError(f"percentile {percentile}: must be above 50 and at most 100")
