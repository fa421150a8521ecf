"""All tensors of a GGUF file beside its source's, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from quantpress.convert.arch.spec import TensorSpec
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.preflight import Preflight
from quantpress.convert.weights import CheckpointWeights
from quantpress.pipelines.content_proof import Finding
from quantpress.pipelines.gguf_proof_folds import Folds
from quantpress.pipelines.gguf_proof_measures import ERRORS, Figures, Limits, differing_floats, measure
from quantpress.pipelines.gguf_readback import ReadBack

__all__ = ["WeightsFound", "compare_weights"]

_FLOATS = ("F32", "F16", "BF16", "F64")
_PLAIN = 1.15  # times a type's own error that a tensor has at most that was rounded to nearest
_FACTORS = 1e-5  # relative: converters compute them in float32, in some steps
_COARSEST = "Q2_K"  # limits of floats that stand for codes: of what type is not known
_MOST, _FEW = 0.1, 2  # share, and number, of tensors that may have more in a file that was


@dataclass
class WeightsFound:
    """How many tensors were compared, which could not be and why, and what is wrong."""

    tensors: int = 0
    skipped: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Measured:
    name: str
    kind: str
    figures: Figures


@dataclass
class _Comparison:
    """What is gathered until all tensors have been seen."""

    source: Checkpoint
    read: ReadBack
    stand_for_codes: bool = False
    found: WeightsFound = field(default_factory=WeightsFound)
    measured: list[_Measured] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    unknown: set[str] = field(default_factory=set)
    rounded: list[_Measured] = field(default_factory=list)

    def differs(self, name: str, found: str, wanted: str) -> None:
        self.found.findings.append(Finding("weights", name, found, wanted))

    def add(self, name: str, kind: str, wanted: torch.Tensor, found: torch.Tensor) -> None:
        """Compares one tensor."""
        if wanted.shape != found.shape:
            self.differs(name, f"shape {tuple(found.shape)}", f"shape {tuple(wanted.shape)}")
            return
        if kind not in ERRORS and kind not in _FLOATS:
            self.unknown.add(kind)
            return
        self.found.tensors += 1
        ours, theirs = wanted.float().numpy(), found.float().numpy()
        if kind in _FLOATS:
            merged = self.source.adapted is not None
            if problem := differing_floats(ours, theirs, kind, merged=merged):
                self.differs(name, *problem)
                if "norm" in name and np.isfinite(theirs).all():
                    self.norms.append(name)
            if problem and ours.ndim > 1:
                self.rounded.append(_measured(name, _COARSEST, ours, theirs))
            return
        self.measured.append(_measured(name, kind, ours, theirs))


def _measured(name: str, kind: str, ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> _Measured:
    rows = ours.reshape(-1, ours.shape[-1])
    return _Measured(name, kind, measure(rows, theirs.reshape(rows.shape), kind))


def compare_weights(
    source: Checkpoint,
    checked: Preflight,
    read: ReadBack,
    ftype: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> WeightsFound:
    """Compares every tensor of the source with what the file holds for it.

    Args:
        source: with adapters merged, where there are any.
        checked: its table.
        read: the file, as the gguf package reads it.
        ftype: type whose limits hold; where it is one of codes, floats may stand for codes of an earlier stage.
        progress: called after each tensor.
    """
    work = _Comparison(source, read, stand_for_codes=ftype not in ("", *_FLOATS))
    weights = CheckpointWeights(source, checked.spec, checked.hyper)
    rows = [(row, layer) for row, layer, _ in checked.bindings if row.gguf]
    for number, (row, layer) in enumerate(rows):
        _compare_one(work, weights, row, layer)
        if progress is not None:
            progress(number + 1, len(rows))
    head = read.types.get("output.weight")
    if checked.hyper.tied and head is not None:
        wanted, found = weights("token_embd.weight", -1), read.weight("output.weight", -1)
        if wanted is not None and found is not None:
            work.add("output.weight", head, wanted, found)
    _compare_factors(work, checked)
    return _judged(work, weights, checked)


def _compare_one(work: _Comparison, weights: CheckpointWeights, row: TensorSpec, layer: int) -> None:
    wanted = weights(row.slot, layer)
    if wanted is None:
        return
    name = work.read.name_of(row.slot, layer)
    if row.gguf_scale or row.gguf_heads:
        work.found.skipped.append(f"{name}: in the file its values are another graph's")
        return
    found = work.read.weight(row.slot, layer) if name in work.read.types else None
    if row.slot == "position_embd.weight":
        wanted = wanted[weights.hyper.position_offset :]  # rows that no position reads are not in the file
    if found is None and layer < 0 and weights.spec.kind == "encoder" and row.slot.startswith("output"):
        work.found.skipped.append(f"{name}: llama.cpp has no head for masked tokens")
        return
    if found is None:
        work.differs(name, "missing", "a tensor as in the source")
        return
    work.add(name, work.read.types[name], wanted, found)


def _compare_factors(work: _Comparison, checked: Preflight) -> None:
    """Compares what rotary frequencies are divided by, which only GGUF files have as tensors."""
    for name, values in checked.spec.gguf_tensors(checked.hyper).items():
        found = work.read.weight(name, -1) if name in work.read.types else None
        if found is None:
            work.differs(name, "missing", "factors as the source's settings give them")
            continue
        work.found.tensors += 1
        held, wanted = found.numpy().reshape(-1), np.asarray(values, np.float32)
        if held.shape != wanted.shape or not np.allclose(held, wanted, rtol=_FACTORS, atol=0):
            work.differs(name, "other factors", "those that the source's settings give")


def _judged(work: _Comparison, weights: CheckpointWeights, checked: Preflight) -> WeightsFound:
    """Turns figures into findings, now that it is known how the file's codes were chosen."""
    far = [each for each in work.measured if not each.figures.whole <= _PLAIN * ERRORS[each.kind]]
    plain = len(far) <= max(_FEW, _MOST * len(work.measured))
    if work.stand_for_codes and work.rounded and not work.measured:
        names = {each.name for each in work.rounded}
        work.found.findings = [each for each in work.found.findings if each.name not in names]
        work.found.findings += _findings(work.rounded, plain=False)
        work.found.skipped.append(f"{len(names)} matrices: floats of codes, compared as if they were codes")
    work.found.findings += _findings(work.measured, plain=plain)
    if work.norms:  # AWQ and SmoothQuant change norms and the weights around them so that both changes cancel
        excused = Folds(weights, work.read, checked, {each.name for each in work.found.findings}).excused()
        if excused:
            kept = [each for each in work.found.findings if each.name not in excused]
            many = len(work.found.findings) - len(kept)
            work.found.skipped.append(f"{many} tensors: compared but for scales that a method has folded into them")
            work.found.findings = kept
    work.found.skipped += [f"tensors of type {kind}: no limits are known for it" for kind in sorted(work.unknown)]
    return work.found


def _findings(measured: list[_Measured], *, plain: bool) -> Iterator[Finding]:
    for each in measured:
        problem = each.figures.problem(Limits.of(each.kind, plain=plain))
        if problem is not None:
            yield Finding("weights", each.name, *problem)
