"""Codes of a quantized checkpoint arrive in an ONNX model bit for bit: every code, every scale, every zero.

Folders hold random codes, written in each format; what the graph's MatMulNBits nodes multiply with is read by
`tests/onnx_codes.py`, which knows onnxruntime's documentation and nothing of what wrote the folder.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpress.convert.awq.pack import FORMAT as AWQ
from quantpress.convert.checkpoint import Array, Checkpoint
from quantpress.convert.compressed_tensors.pack import FORMAT as COMPRESSED
from quantpress.convert.gptq.pack import GPTQ_V1, GPTQ_V2
from quantpress.convert.open import open_checkpoint
from quantpress.convert.preflight import preflight
from quantpress.convert.quantized import PackFormat
from quantpress.quant.qtensor import QuantizedTensor
from tests.packed_folder import Quantize, write_packed
from tests.quantized_tensors import random_tensor
from tests.tiny import tiny_checkpoint

pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")

from quantpress.convert.onnx.export import plan_onnx, write_onnx
from quantpress.convert.onnx.options import OnnxOptions
from tests.onnx_codes import assert_exact, matrices

HIDDEN, INNER, LINEARS = 96, 192, 7
HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer whose matrices have 96 and 192 columns; never write into it."""
    folder = tmp_path_factory.mktemp("exact") / "model"
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 1, "num_key_value_heads": 4}
    return tiny_checkpoint(folder, "llama", **sizes)


def exported(folder: Path, out: Path, **options: Any) -> Checkpoint:
    """Exports a folder with its codes; gives it as it was opened."""
    checkpoint = open_checkpoint(folder)
    wanted = OnnxOptions(**{"precision": "int4", **options})
    write_onnx(out, plan_onnx(checkpoint, preflight(checkpoint), wanted), threads=2)
    return checkpoint


def assert_codes_kept(checkpoint: Checkpoint, out: Path, count: int) -> None:
    """Compares what was opened with what the graph has."""
    found = matrices(out)
    assert len(checkpoint.quantized) == count
    assert set(found) - set(checkpoint.quantized) <= {HEAD}
    for name, lazy in checkpoint.quantized.items():
        assert_exact(found[name], lazy.read())


@dataclass(frozen=True)
class Kind:
    """A format with what it can hold."""

    name: str
    format: PackFormat
    bits: tuple[int, ...]
    scale_types: tuple[str, ...] = ("F16",)
    groups: tuple[int, ...] = (-1, 16, 32, 48, 96)
    least_zero: int = 0

    def random(self, data: st.DataObject) -> tuple[Quantize, dict[str, QuantizedTensor]]:
        """Gives a function that puts random codes in the place of every weight, each in a form of its own seed."""
        seed, bits = data.draw(st.integers(0, 1 << 30)), data.draw(st.sampled_from(self.bits))
        group, symmetric = data.draw(st.sampled_from(self.groups)), data.draw(st.booleans())
        scale_type = data.draw(st.sampled_from(self.scale_types))
        made: dict[str, QuantizedTensor] = {}

        def quantize(name: str, weight: Array) -> QuantizedTensor:
            number = seed + len(made)
            found = random_tensor(
                number, *weight.shape, bits=bits, group=group, symmetric=symmetric, scale_type=scale_type
            )
            if found.zero is not None:
                found = replace(found, zero=np.maximum(found.zero, self.least_zero).astype(np.uint8))
            made[name] = found
            return found

        return quantize, made


KINDS = (
    Kind("gptq", GPTQ_V1, (2, 3, 4, 8), least_zero=1),  # version 1 stores zeros less one
    Kind("gptq_v2", GPTQ_V2, (2, 3, 4, 8)),
    Kind("awq", AWQ, (4,), groups=(-1, 32)),
    Kind("compressed-tensors", COMPRESSED, (2, 3, 4, 8), scale_types=("F16", "BF16", "F32")),
)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@settings(deadline=None, max_examples=10)
@given(st.data())
def test_random_codes_of_every_format_arrive(kind: Kind, source: Path, data: st.DataObject) -> None:
    quantize, made = kind.random(data)
    with tempfile.TemporaryDirectory() as place:
        folder, out = Path(place) / "packed", Path(place) / "onnx"
        write_packed(source, folder, kind.format, quantize)
        precision = data.draw(st.sampled_from(["int4", "int8"]))  # both mean its own codes
        assert_codes_kept(exported(folder, out, precision=precision), out, LINEARS)
        found = matrices(out)
        for name, tensor in made.items():
            assert_exact(found[name], tensor)
