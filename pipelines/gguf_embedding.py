"""Finds the blocks of a token embedding by GPTQ, with what errors in its rows do to the model's predictions.

No inputs are multiplied with an embedding, so there is no Hessian of inputs; the Fisher information of the predictions
about its rows stands for it (`convert.calibration.sensitivity`). What the layers are calibrated with then comes from
the embedding as the file will hold it, so that they make up for what is left.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from quantpress.convert.calibration.windows import enough_tokens
from quantpress.convert.checkpoint import Array, Checkpoint, LazyTensor
from quantpress.pipelines.layer_work import with_checks
from quantpress.pipelines.quantize_calibration import Calibration, activation_budget
from quantpress.pipelines.quantize_work import LIVE
from quantpress.quant.floats import to_float32
from quantpress.quant.ggml.block_parts import BLOCK_GRIDS
from quantpress.quant.ggml.codec import dequantize

if TYPE_CHECKING:
    from quantpress.convert.gguf.plan import PlannedTensor, TensorPlan
    from quantpress.pipelines.spool import Spool
    from quantpress.pipelines.stage import RunContext

__all__ = ["EmbeddingWork"]

_STEP = "embedding"  # of the spool
_DAMPING = 0.1  # more than for linears: with 0.01 an embedding of Q2_K kept 0.38 of the plain divergence, with 0.1 0.24
_FLOAT = 4  # bytes
_ROWS = 32768  # that are read and quantized together


@dataclass(frozen=True, eq=False, slots=True)
class EmbeddingWork:
    """An embedding on its way to blocks.

    Attributes:
        source: the model.
        planned: what the file will hold.
        seed: of the draws from the model's predictions.
    """

    source: Checkpoint
    planned: PlannedTensor
    seed: int

    @classmethod
    def of(cls, source: Checkpoint, plan: TensorPlan, seed: int) -> EmbeddingWork | None:
        """Gives it; None where the embedding gets no blocks with codes to be found, or is the head as well.

        An embedding that is the head too gets the head's type, with which little is lost, and the head's importance.
        """
        found = {tensor.name: tensor for tensor in plan.tensors}
        planned = found.get("token_embd.weight")
        if planned is None or "output.weight" not in found or planned.type not in BLOCK_GRIDS:
            return None
        return cls(source, planned, seed)

    @property
    def name(self) -> str:
        """Of the weight in the checkpoint."""
        return self.planned.source.name

    def kept_bytes(self, layers: int) -> int:
        """Bytes of what layers begin with, which is kept for the way back."""
        columns = self.planned.shape[1]
        return (layers + 1) * enough_tokens(columns) * columns * _FLOAT

    def find(self, calibration: Calibration, spool: Spool, context: RunContext) -> LazyTensor:
        """Gives the embedding as the file will hold it; finds its blocks unless the spool has them.

        Raises:
            InputError: values or gradients that are not finite.
            LayoutError: a scale that the type cannot hold.
            OutputError: the disk is full.
        """
        if _STEP not in spool.steps:
            started = time.perf_counter()
            blocks, report = self._quantized(calibration, spool, context)
            seconds = {_STEP: round(time.perf_counter() - started, 3)}
            spool.add(_STEP, {self.name: blocks}, {"reports": {self.name: report}, "seconds": seconds})
        tensor, kept = self.planned.source, spool.tensors()[self.name]
        read = partial(_read, self.planned.type, kept, tensor.shape[1])
        return LazyTensor(tensor.name, tensor.shape, "F32", tensor.source, read)

    def _quantized(self, calibration: Calibration, spool: Spool, context: RunContext) -> tuple[Array, dict[str, Any]]:
        from quantpress.convert.calibration.sensitivity import embedding_sensitivity
        from quantpress.convert.calibration.windows import enough_windows
        from quantpress.quant.block_gptq import block_gptq_shared
        from quantpress.quant.gptq import GptqOptions

        live = spool.folder / LIVE
        live.mkdir(exist_ok=True)
        checked, kind = with_checks(self.source), self.planned.type
        tensor = checked.tensors[self.name]
        windows = enough_windows(calibration.windows, tensor.shape[1])
        sensitivity = embedding_sensitivity(
            checked, windows, threads=context.threads, folder=live, seed=self.seed,
            max_memory=activation_budget(context.max_memory), progress=partial(context.progress, "measuring"),
        )  # fmt: skip
        options, parts, loss, damping = GptqOptions(damping=_DAMPING), list[Array](), 0.0, _DAMPING
        for start in range(0, tensor.rows, _ROWS):
            rows = to_float32(tensor.exact_rows(start, min(start + _ROWS, tensor.rows)))
            ((found, report),) = block_gptq_shared([rows], sensitivity, [kind], options, threads=context.threads)
            parts.append(found.data)
            loss, damping = loss + report.loss, report.damping
        tokens = len(windows) * len(windows[0])
        return np.concatenate(parts), {"type": kind, "loss": loss, "damping": damping, "tokens": tokens}


def _read(kind: str, blocks: LazyTensor, columns: int, start: int, stop: int) -> Array:
    return dequantize(kind, np.ascontiguousarray(blocks.read_rows(start, stop)), columns)
