"""Makes small ONNX models of tiny checkpoints in float32 or float16, and gives what transformers makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from quantpress.convert.arch.spec import Hyperparameters
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.onnx.export import plan_onnx, write_onnx
from quantpress.convert.onnx.options import OnnxOptions
from quantpress.convert.open import open_checkpoint
from quantpress.convert.preflight import Preflight, preflight
from tests.tiny import tiny_checkpoint


@dataclass(frozen=True)
class Source:
    """A tiny checkpoint, and transformers' model of it."""

    checkpoint: Checkpoint
    checked: Preflight
    model: Any

    @property
    def hyper(self) -> Hyperparameters:
        """Its sizes."""
        return self.checked.hyper

    def logits(self, tokens: NDArray[Any]) -> NDArray[np.float32]:
        """Gives transformers' logits of one text, (S, vocab)."""
        with torch.no_grad():
            found: NDArray[np.float32] = self.model(torch.from_numpy(tokens[None]), use_cache=False).logits[0].numpy()
        return found


def tiny_source(folder: Path, family: str, **options: Any) -> Source:
    """Makes a checkpoint of `tests.tiny` and loads it."""
    from transformers import AutoModelForCausalLM, logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    checkpoint = open_checkpoint(tiny_checkpoint(folder, family, **options))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    return Source(checkpoint, preflight(checkpoint), model)


def write_model(folder: Path, source: Source, *, half: bool = False, standard: bool = False, opset: int = 23) -> Path:
    """Writes a model with float weights; gives the folder.

    Args:
        folder: which must not be there.
        source: the checkpoint.
        half: stored and computed in float16.
        standard: operators of the standard only.
        opset: their version.
    """
    kind = "fp16" if half else "fp32"
    options = OnnxOptions(precision=kind, compute_type=kind, standard_ops=standard, opset=opset)
    write_onnx(folder, plan_onnx(source.checkpoint, source.checked, options), threads=1)
    return folder


def checked(folder: Path) -> onnx.ModelProto:
    """Gives the model after onnx's own checker and its shape inference have passed it."""
    path = folder / "model.onnx"
    onnx.checker.check_model(path, full_check=True)
    return onnx.load(path, load_external_data=False)


def operators(model: onnx.ModelProto, *, under: str = "/") -> list[str]:
    """Gives the operators of nodes whose names begin like this, in order; those of onnxruntime with a star."""
    nodes = [node for node in model.graph.node if node.name.startswith(under)]
    return [f"{node.op_type}*" if node.domain else node.op_type for node in nodes]
