"""Runs one job: opens the source, runs a building stage, proves what it wrote, and leaves a sidecar beside it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantpress.convert.atomic import check_replaceable
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.open import open_checkpoint
from quantpress.pipelines.hashing import BackgroundHashes
from quantpress.pipelines.judging import JudgeOptions
from quantpress.pipelines.machine import peak_rss
from quantpress.pipelines.sidecar import statement, write_sidecar
from quantpress.pipelines.stage import Artifact, BuildingStage, RunContext
from quantpress.quant.errors import ParityError

if TYPE_CHECKING:
    from quantpress.pipelines.parity import Parity
    from quantpress.pipelines.verification import Reference


@dataclass(frozen=True, slots=True)
class Pressed:
    """A finished job.

    Attributes:
        artifact: what was written.
        parity: the verdict, or None where no proof was asked for.
        sidecar: path of the sidecar.
        timings: seconds and peak resident bytes of each step.
    """

    artifact: Artifact
    parity: Parity | None
    sidecar: Path
    timings: Mapping[str, Any]

    def require_parity(self) -> None:
        """Ends the run where the proof failed.

        Raises:
            ParityError: with the reason.
        """
        if self.parity is not None and not self.parity.passed:
            raise ParityError(f"{self.artifact.path}: {self.parity.reason}; figures are in {self.sidecar}")


class _Clock:
    """Seconds and peak memory of the steps of a job."""

    def __init__(self) -> None:
        self.steps: dict[str, Any] = {}
        self._start = time.perf_counter()

    def step(self, name: str) -> None:
        """Ends a step."""
        now = time.perf_counter()
        self.steps[name] = {"seconds": round(now - self._start, 3), "peak_rss": peak_rss()}
        self._start = now


def press(
    model: Checkpoint | Path | str,
    stage: BuildingStage,
    context: RunContext,
    *,
    judge: JudgeOptions | None,
    reference: Reference | None = None,
    hashes: BackgroundHashes | None = None,
) -> Pressed:
    """Runs one building stage on a source and proves the result.

    Args:
        model: the source, opened or not.
        stage: what to write.
        context: what the run may use.
        judge: how to prove the output; None leaves it unproved.
        reference: the source made ready for judging, where several outputs share it.
        hashes: a thread that hashes the inputs, where it has been started already.

    Raises:
        QuantpressError: the source, an option or the output is not usable. A proof that fails is not raised here: the
            file and its sidecar are there and `Pressed.require_parity` says so.
    """
    clock = _Clock()
    source = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    clock.step("open")
    if judge is not None and reference is None:
        reference = _reference(source, stage, context, judge)
    paths = [file.path for file in source.files]
    with BackgroundHashes() if hashes is None else contextlib.nullcontext(hashes) as hashing:
        hashing.add(paths)
        artifact = stage.run(source, context)
        inputs = hashing.results(paths)
    clock.step(stage.name)
    parity = None
    if judge is not None and reference is not None:
        parity = reference.judge(artifact.path, artifact.ftype)
        clock.step("verify")
    contents = statement(
        inputs=[{"name": path.name, "sha256": sha256, "bytes": nbytes} for path, (sha256, nbytes) in inputs.items()],
        stages=[stage_record(stage)],
        device=context.device,
        outputs=[{"name": out.name, "sha256": out.sha256, "bytes": out.nbytes} for out in artifact.outputs],
        tensors=[
            {"name": t.name, "type": t.type, "bytes": t.nbytes, "relative_error": rounded(t.relative_error)}
            for t in artifact.tensors
        ],
        parity=rounded(parity.to_json()) if parity is not None else None,
        notes=artifact.notes,
        timings=clock.steps,
    )
    return Pressed(artifact, parity, write_sidecar(artifact.path, contents), clock.steps)


def _reference(source: Checkpoint, stage: BuildingStage, context: RunContext, judge: JudgeOptions) -> Reference:
    """Makes the source ready for judging before anything is written, so that a wrong text costs nothing.

    Raises:
        QuantpressError: the stage, its output, the text or the tokenizer cannot be used.
    """
    check_replaceable(stage.plan(source).output, force=context.force)
    from quantpress.pipelines.verification import Reference  # brings torch

    return Reference(source, judge, context.progress)


def stage_record(stage: BuildingStage) -> dict[str, Any]:
    """Describes a stage for the sidecar; paths are kept by name, so that a run elsewhere gives the same record."""
    record = dict(stage.describe())
    options = dict(record["options"])
    for key, value in options.items():
        if isinstance(getattr(stage, key), Path):
            options[key] = Path(value).name
    return record | {"options": options}


def rounded(value: Any) -> Any:
    """Rounds every float to six significant digits: the last ones depend on how a processor orders its sums."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return value
