"""What a checkpoint folder holds, compared with its source: merged weights, codes of any format, config, tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantpress.convert.arch.fused_rows import FUSED, stored_heads
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, TensorSpec
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.open import open_checkpoint
from quantpress.convert.preflight import Preflight, check_tied_head, preflight
from quantpress.convert.weights import CheckpointWeights
from quantpress.pipelines.content_proof import ContentProof, Finding
from quantpress.pipelines.onnx_proof_compare import Comparison, Key
from quantpress.pipelines.onnx_proof_config import compare_sizes
from quantpress.pipelines.onnx_proof_read import HeldWeight
from quantpress.pipelines.onnx_proof_rows import HeldRows
from quantpress.pipelines.onnx_proof_settings import SettingsFound
from quantpress.pipelines.onnx_proof_tokens import compare_tokens
from quantpress.quant.errors import InputError, UnknownFamilyError

if TYPE_CHECKING:
    from quantpress.convert.quantized import LazyQuantized

__all__ = ["checkpoint_content"]

Array = NDArray[Any]
_DTYPES = {"F32": "FLOAT", "F16": "FLOAT16", "BF16": "BFLOAT16", "F64": "DOUBLE"}
_LOOSE = {"int8": "~int8", "F8_E4M3": "~fp8", "F8_E5M2": "~fp8"}  # storage types of other kinds have 4 bits


def checkpoint_content(source: Checkpoint, folder: Path) -> ContentProof:
    """Compares a folder with its source.

    Args:
        source: with adapters merged, where there are any.
        folder: merged or quantized.

    Raises:
        InputError: one of them cannot be read.
    """
    artifact = open_checkpoint(folder)
    tokens, settings = compare_tokens(source, artifact.tokenizer_files), SettingsFound()
    tensors, findings, skipped = 0, list[Finding](), list[str]()
    try:
        checked, other = preflight(source), preflight(artifact)
    except UnknownFamilyError:
        skipped.append("weights and settings: no table knows the family")
    else:
        compare_sizes(settings, artifact.config, source)
        if checked.spec is other.spec and not settings.findings:
            tensors, findings = _weights(source, checked, artifact, other)
        else:
            skipped.append("weights: config.json is another model's")
    return ContentProof(
        tensors=tensors,
        settings=settings.count,
        tokens=tokens.tokens,
        skipped=(*skipped, *tokens.skipped),
        findings=(*findings, *settings.findings, *tokens.findings),
    )


def _weights(
    source: Checkpoint, checked: Preflight, artifact: Checkpoint, other: Preflight
) -> tuple[int, list[Finding]]:
    spec = _as_stored(checked.spec)
    comparison = Comparison(source, checked, spec)
    pairs = dict(_held(artifact, other, spec))
    wanted = comparison.names
    findings = [Finding("weights", wanted[key], "missing", "as in the source") for key in wanted if key not in pairs]
    findings += [
        Finding("weights", pairs[key].name, "not in the source", "no such tensor") for key in pairs if key not in wanted
    ]
    findings += comparison.compare({key: held for key, held in pairs.items() if key in wanted})
    try:
        check_tied_head(other)
    except InputError as error:
        findings.append(Finding("weights", "the tied head", str(error), "the embedding's values"))
    return len(pairs), findings


def _as_stored(spec: ArchSpec) -> ArchSpec:
    """Gives the table without what is added to values: they are compared as files have them."""
    plain = {
        name: tuple(dataclasses.replace(row, offset=0.0) for row in getattr(spec, name))
        for name in ("tensors", "other_rows")
    }
    return dataclasses.replace(spec, **plain)  # type: ignore[arg-type]


def _held(artifact: Checkpoint, checked: Preflight, spec: ArchSpec) -> Iterator[tuple[Key, HeldWeight]]:
    codes = checked.codes(artifact)
    read = CheckpointWeights(artifact, spec, checked.hyper)
    for row, layer, tensor in checked.bindings:
        lazy = codes.get(tensor.name)
        if lazy is not None:
            yield (row.slot, layer), _coded(lazy, row, checked.hyper)
            continue
        piece = checked.pieces.get(tensor.name)
        stored = tensor.name if piece is None else piece.stored
        kind = artifact.storage_types.get(stored, "")
        dtype = _DTYPES.get(tensor.dtype, "~fp8")
        if stored in artifact.quantized:
            dtype = "~int4" if artifact.quantized[stored].form.bits < 8 else "~int8"
        elif kind and kind not in _DTYPES:
            dtype = _LOOSE.get(kind, "~int4")
        shape = tensor.shape[::-1] if row.layout.value == "transposed" else tensor.shape
        rows = _Whole(partial(_floats, read, row.slot, layer))
        yield (row.slot, layer), HeldWeight(tensor.name, shape, 0, dtype, rows)


def _floats(read: CheckpointWeights, slot: str, layer: int) -> Callable[[int, int], HeldRows]:
    tensor = read(slot, layer)
    assert tensor is not None, "the table has it"

    def rows(start: int, stop: int) -> HeldRows:
        part = tensor[start:stop].float().numpy()
        return HeldRows(part.reshape(len(part), 1, -1))

    return rows


class _Whole:
    """Reads a weight whole when its first rows are asked for, and lets it go with the last ones."""

    def __init__(self, make: Callable[[], Callable[[int, int], HeldRows]]) -> None:
        self._make = make
        self._rows: Callable[[int, int], HeldRows] | None = None

    def __call__(self, start: int, stop: int) -> HeldRows:
        if start == 0 or self._rows is None:
            self._rows = self._make()
        return self._rows(start, stop)


def _coded(lazy: LazyQuantized, row: TensorSpec, hyper: Hyperparameters) -> HeldWeight:
    """Gives codes in the decoder's order of rows, columns by groups."""
    bits, order = lazy.form.bits, None
    if lazy.form.ordered:
        g_idx = lazy.read().g_idx
        order = None if g_idx is None else np.argsort(g_idx, kind="stable")
    rows = _Whole(partial(_grouped, lazy, order, row.layout in FUSED, hyper))
    return HeldWeight(lazy.name, lazy.form.shape, bits, "FLOAT16", rows, order)


def _grouped(
    lazy: LazyQuantized, order: Array | None, fused: bool, hyper: Hyperparameters
) -> Callable[[int, int], HeldRows]:
    whole = lazy.read()
    place = np.arange(whole.rows)
    if fused:
        place = place.reshape(-1, hyper.head_dim)[list(stored_heads(hyper))].reshape(-1)
    groups, size = whole.scale.shape[1], whole.group_size

    def rows(start: int, stop: int) -> HeldRows:
        at = place[start:stop]
        codes = whole.codes[at] if order is None else whole.codes[at][:, order]
        zero = np.full((len(at), groups), 1 << (whole.bits - 1)) if whole.zero is None else whole.zero[at]
        rest = groups * size - codes.shape[1]
        padded = np.pad(codes, ((0, 0), (0, rest))) if rest else codes
        offset = zero.astype(np.float32)
        numbers = padded.reshape(len(at), groups, size).astype(np.float32) - offset[:, :, None]
        most = np.float32((1 << whole.bits) - 1)
        return HeldRows(numbers, whole.scale[at].astype(np.float32), -offset, most - offset)

    return rows
