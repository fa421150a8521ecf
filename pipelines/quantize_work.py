"""Weights that a run has quantized, and what is known of how it went, until its output is written and proved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantpress.pipelines.spool import Spool

if TYPE_CHECKING:
    from quantpress.pipelines.quantize_calibration import Calibration

__all__ = ["LIVE", "WRITTEN", "Spooled", "reports_of"]

LIVE = "live"
"""Folder in a spool's where the inputs of the layer to come are kept; what is finished does not need it."""

WRITTEN = "written"
"""The spool's step after which the output stands, but is not proved."""


def reports_of(steps: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Gives weight -> what the method says of it, from the records of a spool's steps."""
    return {name: report for record in steps.values() for name, report in record.get("reports", {}).items()}


@dataclass(frozen=True, slots=True)
class Spooled:
    """A model whose weights are quantized, but not written yet.

    Attributes:
        spool: their packed tensors, and plain ones that have changed.
        force: what stands at the output may be replaced.
        calibration: the text; None where none was read.
    """

    spool: Spool
    force: bool
    calibration: Calibration | None

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the text."""
        return (self.calibration.note,) if self.calibration is not None and self.calibration.note else ()

    @property
    def calibrated(self) -> Mapping[str, Any]:
        """What the sidecar says of the text."""
        return self.calibration.record() if self.calibration is not None else {}

    @property
    def reports(self) -> Mapping[str, Mapping[str, Any]]:
        """Weight -> what the method says of it."""
        return reports_of(self.spool.steps)

    @property
    def timings(self) -> Mapping[str, Any]:
        """Step -> seconds."""
        return {step: record["seconds"] for step, record in self.spool.steps.items() if "seconds" in record}

    def mark_written(self) -> None:
        """Notes that the output stands: where a run is killed before it is proved, the same command replaces it."""
        if WRITTEN not in self.spool.steps:
            self.spool.add(WRITTEN, {}, {})
