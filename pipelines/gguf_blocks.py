"""Finds the blocks of a GGUF file with a calibration text, layer by layer, and keeps them until the file is proved."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from quantpress.convert.arch.spec import Role
from quantpress.convert.atomic import held_output, require_space, work_folder
from quantpress.convert.checkpoint import Array, Checkpoint, LazyTensor
from quantpress.convert.gguf.importance import Importance, ImportanceMatrix
from quantpress.convert.gguf.split import check_parts, whole_path
from quantpress.convert.preflight import Preflight
from quantpress.pipelines.default_text import BUILT_IN_NOTE
from quantpress.pipelines.gguf_embedding import EmbeddingWork
from quantpress.pipelines.hashing import hash_file
from quantpress.pipelines.merge_stage import merge_records
from quantpress.pipelines.quantize_calibration import Calibration, activation_budget, needs
from quantpress.pipelines.quantize_codes import hashed
from quantpress.pipelines.quantize_job import fingerprint
from quantpress.pipelines.quantize_work import WRITTEN, Spooled
from quantpress.pipelines.sidecar import environment, sidecar_path
from quantpress.pipelines.spool import Spool
from quantpress.pipelines.stage import RunContext
from quantpress.quant.errors import UsageError
from quantpress.quant.ggml.block_parts import BLOCK_GRIDS
from quantpress.quant.ggml.blocks import BlockTensor
from quantpress.quant.ggml.types import ggml_type

if TYPE_CHECKING:
    from quantpress.convert.calibration.site import LayerMethod, LayerResult
    from quantpress.convert.gguf.plan import PlannedTensor, TensorPlan
    from quantpress.pipelines.gguf_stage import Gguf
    from quantpress.pipelines.layer_work import LayerWork

__all__ = ["GgufBlocks", "MadeBlocks"]

log = logging.getLogger(__name__)

_WAIT = 1.0  # seconds for another run on the same output; it may take hours
_PLACES = ("output", "calibration", "imatrix", "metadata")  # options that say where something lies, not what it is
_POWER = "power of "  # before a weight's name in GGUF: sums of squares of its inputs
_COUNT = "tokens of "  # before the same: how many tokens each of its experts saw


@dataclass(frozen=True, slots=True)
class MadeBlocks:
    """What was found for a file, while it is written.

    Attributes:
        blocks: weight in the checkpoint -> its blocks, (N, row bytes) uint8; good until the output is proved.
        importance: what errors cost in every linear weight and in the head, measured in the same run.
        force: what stands at the output may be replaced.
        work: the run's text, reports and times.
    """

    blocks: Mapping[str, LazyTensor]
    importance: ImportanceMatrix
    force: bool
    work: Spooled = field(repr=False)


class GgufBlocks:
    """Blocks of one GGUF file, found by GPTQ."""

    def __init__(
        self, stage: Gguf, source: Checkpoint, checked: Preflight, plan: TensorPlan, files: tuple[Path, ...]
    ) -> None:
        """Plans; reads headers only.

        Args:
            stage: with every default filled in.
            source: the model.
            checked: its table.
            plan: which types its tensors get.
            files: that will be written, the one that is opened first.

        Raises:
            UsageError: no weight gets a type that codes can be found for.
        """
        self._stage, self._source, self._checked, self._files = stage, source, checked, files
        linear = {tensor.name for row, layer, tensor in checked.bindings if row.role is Role.LINEAR and layer >= 0}
        chosen = [tensor for tensor in plan.tensors if tensor.source.name in linear]
        blocks = [tensor for tensor in chosen if ggml_type(tensor.type).block_size > 1]
        self._types = {source.name: tensor.type for tensor in blocks for source in tensor.sources}
        self._embedding = EmbeddingWork.of(source, plan, stage.seed)
        self._nbytes = sum(tensor.nbytes for tensor in (*blocks, *self._embedded))
        if not any(kind in BLOCK_GRIDS for kind in self._types.values()):
            found = ", ".join(sorted({tensor.type for tensor in chosen}))
            raise UsageError(
                f"--method gptq: the weights of {source.name} become {found} with --outtype {plan.outtype.lower()};"
                f" codes are found for {', '.join(BLOCK_GRIDS)}"
            )

    @property
    def _embedded(self) -> tuple[PlannedTensor, ...]:
        return () if self._embedding is None else (self._embedding.planned,)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know beforehand."""
        notes = [BUILT_IN_NOTE] if self._stage.calibration is None else []
        others = sorted({kind for kind in self._types.values() if kind not in BLOCK_GRIDS})
        if others:
            names = [name for name, kind in self._types.items() if kind in others]
            many = f"{len(names)} weights, first {names[0]}, are rounded as ever"
            notes.append(f"{many}: GPTQ finds no codes of {', '.join(others)}")
        return tuple(notes)

    @property
    def peak_memory(self) -> int:
        """Bytes of memory, estimated."""
        return self._needs[0]

    @property
    def work_bytes(self) -> int:
        """Bytes that are kept beside the output until it is proved."""
        return self._needs[1] + self._nbytes

    @cached_property
    def _needs(self) -> tuple[int, int]:
        memory, disk = needs(self._source, self._stage)
        if self._embedding is None:
            return memory, disk
        kept = self._embedding.kept_bytes(self._checked.hyper.layers)
        return memory, max(disk, kept - activation_budget(None))

    def check_output(self, context: RunContext) -> None:
        """Checks that the output may be written.

        Raises:
            UsageError: something is there, and neither --force is given nor did a killed run of this job leave it.
        """
        check_parts(self._files[0], len(self._files), force=context.force or self._is_unproved(context))

    @contextlib.contextmanager
    def session(self, context: RunContext, nbytes: int) -> Iterator[MadeBlocks]:
        """Holds the output and finds the blocks; what is finished is kept on the disk until the block has ended well.

        Args:
            context: what the run may use.
            nbytes: of the output.

        Raises:
            UsageError: the output exists, and no killed run of this job left it.
            BusyError: another run is writing it.
            InputError, LayoutError: what the method says of a weight, or of the text.
            OutputError: the disk has no room.
        """
        from quantpress.pipelines.layer_work import run_layers  # loads torch

        with held_output(whole_path(self._files[0]), wait=_WAIT) as target:
            force = context.force or self._is_unproved(context)
            check_parts(self._files[0], len(self._files), force=force)
            calibration = Calibration.of(self._source, self._stage)
            if calibration.note:
                log.warning("%s", calibration.note)
            require_space(target, nbytes + self.work_bytes)
            spool = Spool(work_folder(target), self._key(context))
            with spool.kept():
                run_layers(self._work(context, calibration, spool), calibration, spool, context)
                yield self._made(spool, force, calibration)
            spool.remove()

    def _work(self, context: RunContext, calibration: Calibration, spool: Spool) -> LayerWork:
        from quantpress.convert.calibration.block_methods import KquantGptqMethod
        from quantpress.pipelines.layer_work import LayerWork
        from quantpress.quant.gptq import GptqOptions

        stage = self._stage
        options = GptqOptions(act_order=stage.act_order, damping=stage.damping)
        method: LayerMethod = KquantGptqMethod(
            self._types.__getitem__, options, context.threads, drift=stage.drift or 0.0, device=context.device
        )
        precision = stage.calibration_dtype or "f32"
        layers = self._checked.hyper.layers
        first = None if self._embedding is None else partial(self._embedding.find, calibration, spool, context)
        return LayerWork(
            self._source, layers, method, self._types.__contains__, _stored, precision, powers=True, embedding=first
        )

    def _made(self, spool: Spool, force: bool, calibration: Calibration) -> MadeBlocks:
        tensors = spool.tensors()
        blocks = {name: tensors[name] for name in (*(tensor.source.name for tensor in self._embedded), *self._types)}
        seen = {
            name.removeprefix(_POWER): Importance(
                tensor.read().astype(np.float32), tensors[name.replace(_POWER, _COUNT, 1)].read().astype(np.float32)
            )
            for name, tensor in tensors.items()
            if name.startswith(_POWER)
        }
        return MadeBlocks(blocks, ImportanceMatrix(seen), force, Spooled(spool, force, calibration))

    def _is_unproved(self, context: RunContext) -> bool:
        """Whether what stands at the output is of this very job, which was killed before it was proved."""
        first = self._files[0]
        if not first.is_file() or sidecar_path(first).exists():
            return False
        return WRITTEN in Spool.finished_steps(work_folder(_real(first)), self._key(context))

    def _key(self, context: RunContext) -> str:
        """Names the job: two with the same key give the same bytes."""
        stage = self._stage
        described = dict(stage.describe())
        read = {name: getattr(stage, name) for name in _PLACES[1:]}
        return hashed(
            {
                **described,
                "options": {name: value for name, value in described["options"].items() if name not in _PLACES},
                "read": {name: None if path is None else hash_file(path)[0] for name, path in read.items()},
                "types": dict(self._types),
                "importance": None if self._source.importance is None else self._source.importance.digest(),
                "merged": merge_records(self._source),
                "environment": environment(context.device),
                "inputs": [fingerprint(file.path) for file in self._source.files],
            }
        )


def _real(path: Path) -> Path:
    """Gives the output as a whole, links followed: what its lock and its work are named after."""
    return Path(os.path.realpath(whole_path(path)))


def _stored(result: LayerResult) -> dict[str, Array]:
    """Gives what is kept of a layer: blocks by the weights' names, and powers."""
    tensors: dict[str, Array] = {}
    for name, quantized in result.quantized.items():
        assert isinstance(quantized, BlockTensor), "the method gives nothing else"
        tensors[name] = quantized.data
    counts = {f"{_COUNT}{name}": count for name, count in result.counts.items()}
    return tensors | {f"{_POWER}{name}": power for name, power in result.powers.items()} | counts
