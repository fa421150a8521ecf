"""Small batches that several tests run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import quantpress as qp
from tests.tiny import tiny_checkpoint

LOOSE = {"chunks": 1, "context": 32, "max_kld": 9, "max_ppl_change": 9, "min_top1": 0}  # random models lose much
GPTQ: Mapping[str, Any] = {"gptq": {"bits": 4, "group_size": 32, "samples": 4, "sequence_length": 32}}


@dataclass(frozen=True)
class Batch:
    """A folder with a model and a pipeline file beside it."""

    folder: Path

    @classmethod
    def with_model(cls, folder: Path, family: str = "llama") -> Batch:
        tiny_checkpoint(folder / "model", family)
        return cls(folder)

    @property
    def file(self) -> Path:
        return self.folder / "batch.yaml"

    def write(self, *jobs: Mapping[str, Any], **defaults: Any) -> Batch:
        """Writes the pipeline file; JSON is YAML."""
        document = {"version": 1, "cache": "cache", "defaults": {**LOOSE, **defaults}, "jobs": list(jobs)}
        self.file.write_text(json.dumps(document, indent=1), encoding="utf-8")
        return self

    def run(self, **options: Any) -> qp.BatchResult:
        """Runs the file in this process."""
        return qp.run_pipeline(self.file, workers=0, **options)

    def output(self, name: str) -> Path:
        return self.folder / "out" / name


def job(name: str, *stages: Mapping[str, Any], model: str = "model", **options: Any) -> dict[str, Any]:
    return {"name": name, "model": model, "stages": list(stages), **options}


def gguf(outtype: str, name: str = "", **options: Any) -> dict[str, Any]:
    return {"gguf": {"outtype": outtype, "output": f"out/{name or outtype}.gguf", **options}}


def done(result: qp.BatchResult) -> dict[str, str]:
    """Job -> its state, with its error."""
    return {job.name: job.state + (f": {job.error}" if job.error else "") for job in result.jobs}


def started(events: list[qp.Event]) -> list[str]:
    """The tasks that did something."""
    return [event.task for event in events if event.kind == "started"]
