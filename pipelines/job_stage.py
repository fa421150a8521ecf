"""A building stage whose work is long: a `Job` plans it, holds its output, and goes on where it was stopped."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from quantpress.convert.checkpoint import Checkpoint
from quantpress.pipelines.stage import Artifact, BuildingStage, Plan, RunContext

__all__ = ["Job", "JobStage"]


class Job(Protocol):
    """A stage whose every default is filled in, with its source."""

    @property
    def plan(self) -> Plan:
        """What would be written."""
        ...

    def check_output(self, context: RunContext) -> None:
        """Checks that the target may be written; what this very run has left there may be replaced."""
        ...

    def session(self, context: RunContext) -> contextlib.AbstractContextManager[Artifact]:
        """Writes the target; what took long is kept beside it until the block has ended well."""
        ...


@dataclass(frozen=True, kw_only=True)
class JobStage(BuildingStage):
    """A building stage whose work a `Job` does."""

    def job(self, source: Checkpoint) -> Job:
        """Gives the job of this stage on a source."""
        raise NotImplementedError

    def plan(self, source: Checkpoint) -> Plan:
        """Says what would be written, without reading a weight."""
        return self.job(source).plan

    def check_output(self, source: Checkpoint, context: RunContext) -> None:
        """Checks that the target may be written; what this very run has left there may be replaced."""
        self.job(source).check_output(context)

    def run(self, source: Checkpoint, context: RunContext) -> Artifact:
        """Writes the target."""
        with self.session(source, context) as artifact:
            return artifact

    @contextlib.contextmanager
    def session(self, source: Checkpoint, context: RunContext) -> Iterator[Artifact]:
        """Writes the target; what took long is kept beside it until the block has ended well."""
        with self.job(source).session(context) as artifact:
            yield artifact
