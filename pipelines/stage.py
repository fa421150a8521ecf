"""What a stage is: frozen options with a version, run on a checkpoint, giving a checkpoint or files.

Lazy stages write nothing and give a view; building stages write one target, atomically, and give an `Artifact`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from quantpress.convert.atomic import check_replaceable
from quantpress.convert.checkpoint import Checkpoint
from quantpress.pipelines.machine import available_threads
from quantpress.pipelines.progress import Progress, no_progress

if TYPE_CHECKING:
    from quantpress.convert.lora.ledger import LedgerEntry


@dataclass(frozen=True, slots=True)
class RunContext:
    """What a run may use; nothing here changes the bytes of an output.

    Attributes:
        progress: told how far the work has come.
        threads: worker threads.
        device: "cpu" or "cuda" for stages that compute with torch.
        max_memory: bytes that activations may take while quantizing, or None for half of what is free; so many for
            weights while proving.
        force: replace an existing output.
        allow_nonfinite: write NaN and Inf instead of refusing them.
    """

    progress: Progress = no_progress
    threads: int = field(default_factory=available_threads)
    device: str = "cpu"
    max_memory: int | None = None
    force: bool = False
    allow_nonfinite: bool = False


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A file that was written."""

    name: str
    sha256: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class TensorResult:
    """A tensor as it was written.

    Attributes:
        type: what it is stored as; of a weight that is packed into several tensors: "int4 g128".
        nbytes: of all that is stored for it.
        relative_error: root mean square error over root mean square, or None.
        figures: what else a method says of it: loss, damping, ...
        source: name of the weight in the checkpoint that was written; empty where `name` is that.
    """

    name: str
    type: str
    nbytes: int
    relative_error: float | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor as it would be written.

    Attributes:
        note: why its type is not the one that was asked for.
        merged: whether an adapter changes it.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    nbytes: int
    note: str = ""
    merged: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What a building stage would do, found without reading a weight.

    Attributes:
        work_bytes: of temporary files, beside the output.
    """

    output: Path
    tensors: tuple[PlannedTensor, ...]
    output_bytes: int
    peak_memory: int
    notes: tuple[str, ...] = ()
    work_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Artifact:
    """Files that a stage has written.

    Attributes:
        path: the file or folder.
        kind: "gguf", "safetensors" or "onnx".
        ftype: name of the file's main type, "Q8_0".
        outputs: every file with its hash.
        tensors: what became of every tensor.
        notes: what a user should know about the file.
        judged_as: type whose parity limits hold, where it is not `ftype`: "F32" for what must be exact.
        calibration: the text that activations were gathered on, and how it was cut; empty where none was used.
        timings: what the stage says of its own time and memory.
        mixture: how the types of the tensors were chosen: by whose rules, with which importance matrix; empty where no
            rules have chosen them.
    """

    path: Path
    kind: str
    ftype: str
    outputs: tuple[OutputFile, ...]
    tensors: tuple[TensorResult, ...] = ()
    notes: tuple[str, ...] = ()
    judged_as: str = ""
    calibration: Mapping[str, Any] = field(default_factory=dict)
    timings: Mapping[str, Any] = field(default_factory=dict)
    mixture: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Options of one step: plain frozen dataclasses, for pydantic takes as long to load as a small model to press.

    A change of the bytes that a stage writes raises `version`.
    """

    name: ClassVar[str]
    version: ClassVar[int]

    def run(self, source: Checkpoint, context: RunContext) -> Checkpoint | Artifact:
        """Does the work."""
        raise NotImplementedError

    def describe(self) -> Mapping[str, Any]:
        """Gives name, version and every option after defaults, for the sidecar and for cache keys."""
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
        return {"name": self.name, "version": self.version, "options": plain}


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checkpoint that took work to make, as the stages after it see it.

    Attributes:
        checkpoint: with what was made in it: codes, ...; good as long as the folder is there.
        notes: what a user should know.
        calibration: the text that activations were gathered on, for the sidecar; empty where none was used.
        reports: weight -> what the method says of it: "relative_error", "loss", ...
        judged_as: type whose parity limits hold for what keeps this exactly: "INT4"; empty where nothing was rounded.
        ledger: what became of every tensor of the adapters in it; None where that must be read from the source.
    """

    checkpoint: Checkpoint
    notes: tuple[str, ...] = ()
    calibration: Mapping[str, Any] = field(default_factory=dict)
    reports: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    judged_as: str = ""
    ledger: tuple[LedgerEntry, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class PreparingStage(Stage):
    """A stage whose work is kept in the cache, and that gives a checkpoint to the stages after it."""

    def resolved(self, source: Checkpoint) -> PreparingStage:
        """Gives the stage with every default filled in that depends on the source."""
        del source
        return self

    def needs(self, source: Checkpoint) -> tuple[int, int, int]:
        """Estimates bytes of memory, of temporary files, and of what is kept at the end."""
        raise NotImplementedError

    def planned(self, source: Checkpoint) -> Prepared:
        """Gives the checkpoint as it will be, for planning; what is to be made cannot be read from it."""
        raise NotImplementedError

    def prepare(self, source: Checkpoint, folder: Path, context: RunContext) -> None:
        """Does the work, into a folder that is this work's own.

        It may hold what a run with the same key left when it was killed, and the work goes on from there. What is left
        in the folder at the end is kept.
        """
        raise NotImplementedError

    def opened(self, source: Checkpoint, folder: Path) -> Prepared:
        """Gives the checkpoint from a folder where the work is finished."""
        raise NotImplementedError

    def run(self, source: Checkpoint, context: RunContext) -> Checkpoint:
        """Is not how such a stage is used: see `prepare` and `opened`."""
        del source, context
        raise TypeError(f"stage {self.name} keeps its work in a folder: call prepare and opened")


@dataclass(frozen=True, kw_only=True)
class BuildingStage(Stage):
    """A stage that writes one target.

    Attributes:
        output: where to; may hold `{ftype}` and `{name}`.
    """

    proved: ClassVar[bool] = True
    """Whether what it writes is a model that a runtime can judge; False for a third-party stage that writes others."""

    output: Path

    @property
    def runs_model(self) -> bool:
        """Whether the model is run on a device before anything can be written."""
        return False

    def resolved(self, source: Checkpoint) -> BuildingStage:
        """Gives the stage with every default filled in that depends on the source."""
        del source
        return self

    def plan(self, source: Checkpoint) -> Plan:
        """Says what would be written, without reading a weight."""
        raise NotImplementedError

    def target(self, source: Checkpoint) -> Path:
        """Gives the output with its name filled in; plans only where the name depends on the plan."""
        return self.plan(source).output if "{" in str(self.output) else self.output

    def check_output(self, source: Checkpoint, context: RunContext) -> None:
        """Checks that the target may be written, before long work for it.

        Raises:
            UsageError: something is there that may not be replaced.
        """
        check_replaceable(self.plan(source).output, force=context.force)

    def run(self, source: Checkpoint, context: RunContext) -> Artifact:
        """Writes the target."""
        raise NotImplementedError

    @contextlib.contextmanager
    def session(self, source: Checkpoint, context: RunContext) -> Iterator[Artifact]:
        """Writes the target; inside the block it is proved and gets its sidecar.

        Only after the block is forgotten what a run that was killed would go on from.
        """
        yield self.run(source, context)


def fill_name(output: Path, values: Mapping[str, str]) -> Path:
    """Replaces `{ftype}` and `{name}` in a path."""
    text = str(output)
    for key, value in values.items():
        text = text.replace("{" + key + "}", value.replace("/", "-"))
    return Path(text)


def shortened(lines: tuple[str, ...], limit: int = 4) -> tuple[str, ...]:
    """Keeps the first notes on tensors, and says how many there are of the others."""
    if len(lines) <= limit:
        return lines
    return (*lines[:limit], f"and {len(lines) - limit} more tensors likewise (--dry-run lists them)")
