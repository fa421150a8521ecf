"""Stages that round a model without work of their own: what they make is found when an output reads it."""

from __future__ import annotations

from dataclasses import dataclass

from quantpress.convert.checkpoint import Checkpoint
from quantpress.pipelines.stage import Prepared, RunContext, Stage

__all__ = ["LazyPreparedStage"]


@dataclass(frozen=True, kw_only=True)
class LazyPreparedStage(Stage):
    """A lazy stage that changes values on purpose; outputs are judged against the model before it."""

    def resolved(self, source: Checkpoint) -> LazyPreparedStage:
        """Gives the stage with every default filled in that depends on the source."""
        del source
        return self

    def prepared(self, source: Checkpoint, context: RunContext) -> Prepared:
        """Gives the model as it is made; reads headers only. Its `reports` may grow while it is read."""
        raise NotImplementedError

    def run(self, source: Checkpoint, context: RunContext) -> Checkpoint:
        """Gives the model as it is made; reads headers only."""
        return self.prepared(source, context).checkpoint
