"""What a task is to do, as it travels to a worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantpress.pipelines.batch.specs import JobSpec
from quantpress.pipelines.judging import JudgeOptions

__all__ = ["Proof", "Work"]


@dataclass(frozen=True, slots=True)
class Proof:
    """How an output is proved.

    Attributes:
        judge: the options, with the device filled in.
        reference: key of what is kept of the source.
        material: what that key was made of.
        key: of the verdict: two outputs with the same bytes and the same key get the same verdict.
        base: key of what is kept of the base alone, where the source has adapters and other jobs use it too.
        base_material: what that key was made of.
    """

    judge: JudgeOptions
    reference: str
    material: Mapping[str, Any] = field(repr=False)
    key: str
    base: str = ""
    base_material: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Work:
    """A part of a job.

    Attributes:
        kind: "prepare", "reference", "build" (and prove) or "prove" (what was built before).
        job: the job; of a part that several jobs share, the first one.
        index: of the stage in the job that is done; of a reference, of the first output that is proved with it.
        cache: the cache's folder.
        device: "cpu" or "cuda".
        key, material: of what is made, as the cache has it.
        path: of an output: where it goes, a path or a URL.
        proof: how an output is proved, or what a reference is for.
        force: what stands at the output may be replaced.
    """

    kind: str
    job: JobSpec
    index: int
    cache: Path
    device: str
    key: str
    material: Mapping[str, Any] = field(repr=False)
    path: str = ""
    proof: Proof | None = None
    force: bool = False
