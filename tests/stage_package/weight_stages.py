"""Two stages for quantpress pipelines: one multiplies weights, one lists them."""

import dataclasses
import hashlib
import re
from pathlib import Path
from typing import ClassVar

import numpy as np

from quantpress.convert.atomic import write_file
from quantpress.convert.checkpoint import DTYPES, Array, Checkpoint, LazyTensor
from quantpress.pipelines.stage import Artifact, BuildingStage, OutputFile, Plan, RunContext, Stage
from quantpress.quant.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale(Stage):
    """Multiplies the weights whose names match.

    Attributes:
        pattern: regular expression that is searched for in the name of a weight.
        factor: what its values are multiplied by.
    """

    name: ClassVar[str] = "scale"
    version: ClassVar[int] = 1

    pattern: str
    factor: float = 1.0

    def run(self, source: Checkpoint, context: RunContext) -> Checkpoint:
        """Gives the model with other weights; none is read before a later stage asks for it."""
        found = {name: self.scaled(each) for name, each in source.tensors.items() if re.search(self.pattern, name)}
        if not found:
            raise UsageError(f"scale: pattern {self.pattern!r} is found in the name of no weight of {source.name}")
        return dataclasses.replace(source, tensors={**source.tensors, **found}, quantized={})

    def scaled(self, tensor: LazyTensor) -> LazyTensor:
        """Gives one tensor multiplied, in the type that it is stored in."""

        def rows(start: int, stop: int) -> Array:
            exact = tensor.exact_rows(start, stop).astype(np.float32)
            return (exact * np.float32(self.factor)).astype(DTYPES[tensor.dtype])

        return dataclasses.replace(tensor, read_rows=rows, wide_rows=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightList(BuildingStage):
    """Writes names, types and shapes of all weights, one a line.

    Attributes:
        output: the text file.
        heading: whether the first line says what the columns are.
    """

    name: ClassVar[str] = "weight_list"
    version: ClassVar[int] = 1
    proved: ClassVar[bool] = False  # a list is no model: no runtime can judge it

    output: Path
    heading: bool = True

    def plan(self, source: Checkpoint) -> Plan:
        """Says what would be written, without reading a weight."""
        return Plan(self.output, (), len(self.text(source)), peak_memory=0)

    def run(self, source: Checkpoint, context: RunContext) -> Artifact:
        """Writes the file."""
        data = self.text(source)
        write_file(self.output, data, force=context.force)
        file = OutputFile(self.output.name, hashlib.sha256(data).hexdigest(), len(data))
        return Artifact(self.output, kind="list", ftype="text", outputs=(file,))

    def text(self, source: Checkpoint) -> bytes:
        """Gives the lines."""
        lines = ["name\ttype\tshape"] if self.heading else []
        lines += [f"{each.name}\t{each.dtype}\t{list(each.shape)}" for each in source.tensors.values()]
        return ("\n".join(lines) + "\n").encode()
