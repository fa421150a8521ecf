"""What became of a batch: plain values, for the library, `--json` and the reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantpress.quant.errors import BatchError

__all__ = ["BatchResult", "JobResult", "OutputResult"]

_NAMED = 20  # failed jobs that one line names


@dataclass(frozen=True, slots=True)
class OutputResult:
    """One output of a job.

    Attributes:
        stage: name of the stage that wrote it.
        path: the file or folder; a URL where it was published elsewhere.
        kind: "gguf", "onnx", "safetensors" or what a third-party stage calls it.
        ftype: name of the main type.
        nbytes: of all its files.
        state: "done" (written or proved in this run) or "cached".
        sidecar: contents of the sidecar (INTERFACE: Sidecar), "parity" and "timings" among them.
    """

    stage: str
    path: str
    kind: str
    ftype: str
    nbytes: int
    state: str
    sidecar: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def parity(self) -> Mapping[str, Any] | None:
        """The verdict as the sidecar has it; None where no proof was asked for."""
        found = self.sidecar.get("parity")
        return found if isinstance(found, Mapping) else None

    def to_json(self) -> dict[str, Any]:
        """For `run --json`."""
        record = {name: getattr(self, name) for name in ("stage", "path", "kind", "ftype", "state")}
        return record | {"bytes": self.nbytes, "parity": self.parity}


@dataclass(frozen=True, slots=True)
class JobResult:
    """One job.

    Attributes:
        name: the job's.
        model: as the pipeline file has it, with an absolute path.
        state: "verified", "written" (done, no proof was asked for), "failed" or "cancelled".
        outputs: those that were written.
        error: one line where it failed.
        exit_code: what a command for this job alone would have ended with.
        cached: whether nothing was left to do.
        seconds: of its tasks, those it shares included.
    """

    name: str
    state: str
    outputs: tuple[OutputResult, ...] = ()
    error: str = ""
    exit_code: int = 0
    cached: bool = False
    seconds: float = 0.0
    model: str = ""

    def to_json(self) -> dict[str, Any]:
        """For `run --json`."""
        record: dict[str, Any] = {"name": self.name, "model": self.model, "state": self.state, "cached": self.cached}
        record |= {"seconds": round(self.seconds, 3), "exit_code": self.exit_code, "error": self.error}
        return record | {"outputs": [output.to_json() for output in self.outputs]}


@dataclass(frozen=True, slots=True)
class BatchResult:
    """All jobs of a batch.

    Attributes:
        pipeline: the file.
        jobs: in the order of the file.
        seconds: from the start to the end.
    """

    pipeline: Path
    jobs: tuple[JobResult, ...]
    seconds: float = 0.0

    @property
    def failed(self) -> tuple[JobResult, ...]:
        """Jobs that are not what they should be."""
        return tuple(job for job in self.jobs if job.state not in ("verified", "written"))

    @property
    def exit_code(self) -> int:
        """0, or 7 where jobs failed (INTERFACE: exit codes)."""
        return BatchError.exit_code if self.failed else 0

    def require_success(self) -> None:
        """Raises where a job failed.

        Raises:
            BatchError: naming the jobs.
        """
        if self.failed:
            names = ", ".join(job.name for job in self.failed[:_NAMED])
            more = len(self.failed) - _NAMED
            names += f" and {more} more" if more > 0 else ""
            reason = next((f" ({job.error})" for job in self.failed if job.error), "")
            raise BatchError(f"{self.pipeline}: {len(self.failed)} of {len(self.jobs)} jobs failed: {names}{reason}")

    def to_json(self) -> dict[str, Any]:
        """For `run --json`."""
        return {
            "pipeline": str(self.pipeline),
            "seconds": round(self.seconds, 3),
            "exit_code": self.exit_code,
            "jobs": [job.to_json() for job in self.jobs],
        }
