"""A pipeline file after matrices, variables and defaults are filled in: plain values that can be sent to workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from quantpress.pipelines.judging import JudgeOptions
from quantpress.pipelines.stage import Stage

__all__ = ["BatchSpec", "JobSpec", "Settings", "StageCall"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What holds for a whole job.

    Attributes:
        judge: how outputs are proved that no `verify` stage speaks of; its device and threads are filled in later.
        verify: whether outputs are proved at all.
        device: "auto", "cpu" or "cuda".
        threads: worker threads of each task; None for what the executor gives it.
        max_memory: bytes, as `RunContext.max_memory`.
        allow_nonfinite: as `RunContext.allow_nonfinite`.
    """

    judge: JudgeOptions = field(default_factory=JudgeOptions)
    verify: bool = True
    device: str = "auto"
    threads: int | None = None
    max_memory: int | None = None
    allow_nonfinite: bool = False


@dataclass(frozen=True, slots=True)
class StageCall:
    """One stage of a job.

    Attributes:
        stage: its options, checked; paths are absolute.
        line: of the pipeline file, counted from 1; 0 where there is no file.
        remote: URL of the output where it is not on a disk here; `stage.output` is then a name without a folder.
    """

    stage: Stage
    line: int = 0
    remote: str = ""


@dataclass(frozen=True, slots=True)
class JobSpec:
    """One job.

    Attributes:
        name: unique in the batch.
        model: folder or file with an absolute path, a Hub id, or a URL.
        stages: in order.
        settings: after defaults.
        line: of the job in the pipeline file.
        variables: values of the matrix and of the file's variables, as text.
        missing: which of its inputs are not there, as an error says it; the job fails, and the others do not.
    """

    name: str
    model: str
    stages: tuple[StageCall, ...]
    settings: Settings = field(default_factory=Settings)
    line: int = 0
    variables: Mapping[str, str] = field(default_factory=dict)
    missing: str = ""


@dataclass(frozen=True, slots=True)
class BatchSpec:
    """All jobs of a pipeline file.

    Attributes:
        path: the file, for messages.
        cache: the cache's folder, absolute.
        jobs: in the order of the file.
    """

    path: Path
    cache: Path
    jobs: tuple[JobSpec, ...]
