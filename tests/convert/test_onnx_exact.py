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
from quantpress.convert.quantized import LazyQuantized, PackFormat, with_quantized
from quantpress.pipelines.torch_runtime import TorchRuntime
from quantpress.quant.errors import LayoutError
from quantpress.quant.grid import Grid, round_to_nearest
from quantpress.quant.qtensor import QuantizedTensor
from tests.packed_folder import Quantize, rounded, write_packed
from tests.quantized_tensors import random_tensor
from tests.tiny import tiny_case, tiny_checkpoint

pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")

from quantpress.convert.onnx.export import plan_onnx, write_onnx
from quantpress.convert.onnx.options import OnnxOptions
from tests.onnx_codes import assert_exact, matrices
from tests.onnx_runs import OnnxRun

HIDDEN, INNER, LINEARS = 96, 192, 7
HEAD, LAST = "lm_head.weight", "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer whose matrices have 96 and 192 columns; never write into it."""
    folder = tmp_path_factory.mktemp("exact") / "model"
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 1, "num_key_value_heads": 4}
    return tiny_checkpoint(folder, "llama", **sizes)


def exported(folder: Path, out: Path, **options: Any) -> Checkpoint:
    """Exports a folder with its codes, 31 or 15 rows at a time; gives it as it was opened."""
    checkpoint = open_checkpoint(folder)
    wanted = OnnxOptions(**{"precision": "int4", **options})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantpress.convert.onnx.weight_rows._CHUNK_VALUES", 3000)
        write_onnx(out, plan_onnx(checkpoint, preflight(checkpoint), wanted), threads=2)
    return checkpoint


def ordered(bits: int) -> Quantize:
    """Gives codes whose columns belong to groups of 32 in an order of their own, another one for each weight."""

    def quantize(name: str, weight: Array) -> QuantizedTensor:
        random = np.random.default_rng(len(name))
        order = random.permutation(np.arange(weight.shape[1]))
        grouped = round_to_nearest(np.ascontiguousarray(weight[:, order]), Grid(bits, 32, symmetric=bits != 4))
        back = np.argsort(order)
        zero = None if grouped.zero is None else np.maximum(grouped.zero, 1).astype(np.uint8)
        g_idx = (back // 32).astype(np.int32)
        return replace(grouped, codes=np.ascontiguousarray(grouped.codes[:, back]), zero=zero, g_idx=g_idx)

    return quantize


def assert_computes_the_same(folder: Path, out: Path) -> None:
    """Compares logits of onnxruntime with those of the torch decoder, which dequantizes the folder itself."""
    checkpoint = open_checkpoint(folder)
    tokens = np.random.default_rng(0).integers(1, 320, 40).astype(np.int32)
    with TorchRuntime.of_checkpoint(checkpoint) as runtime:
        wanted = runtime.logits(tokens, 0)
    found = OnnxRun(out).logits(tokens)
    # Sums of up to 288 products in float32, added in another order: roundings walk at random, so a sum is off by about
    # sqrt(288) * 2^-24 = 1e-6 of its size. Seven such steps in each of three layers: sqrt(21) * 1e-6, and 4 times that.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * float(np.abs(wanted).max()))
    assert float(wanted.std()) > 0.1


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
        standard = data.draw(st.booleans())
        assert_codes_kept(exported(folder, out, precision=precision, standard_ops=standard), out, LINEARS)
        found = matrices(out)
        for name, tensor in made.items():
            assert_exact(found[name], tensor)
            least = 4 if standard else 2  # the standard has no type of 2 bits that is read
            assert found[name].bits == max(4 if tensor.bits == 3 else tensor.bits, least)


@pytest.mark.parametrize("standard", [False, True])
@pytest.mark.parametrize(("form", "bits"), [(GPTQ_V1, 4), (GPTQ_V2, 3), (GPTQ_V2, 8)])
def test_columns_in_an_order_of_their_own_arrive_with_that_order(
    source: Path, tmp_path: Path, form: PackFormat, bits: int, standard: bool
) -> None:
    write_packed(source, tmp_path / "packed", form, ordered(bits))
    out = tmp_path / "onnx"
    assert_codes_kept(exported(tmp_path / "packed", out, standard_ops=standard), out, LINEARS)
    assert not np.array_equal(matrices(out)[LAST].order, np.arange(INNER))
    assert_computes_the_same(tmp_path / "packed", out)


def test_groups_of_different_sizes_are_refused_by_name(source: Path, tmp_path: Path) -> None:
    def uneven(name: str, weight: Array) -> QuantizedTensor:
        tensor = ordered(4)(name, weight)
        assert tensor is not None
        assert tensor.g_idx is not None
        tensor.g_idx[np.flatnonzero(tensor.g_idx == 0)[0]] = 1
        return tensor

    write_packed(source, tmp_path / "packed", GPTQ_V2, uneven)
    with pytest.raises(LayoutError, match=r"model\.safetensors: '.*q_proj\.weight': its groups have 31 to 33 .*--prec"):
        exported(tmp_path / "packed", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
    exported(tmp_path / "packed", tmp_path / "onnx", precision="fp32")  # what the message says does
    assert_computes_the_same(tmp_path / "packed", tmp_path / "onnx")


@pytest.mark.filterwarnings("ignore:groups of 24 columns")
def test_groups_that_do_not_divide_into_blocks_are_refused_by_name(source: Path, tmp_path: Path) -> None:
    write_packed(source, tmp_path / "packed", GPTQ_V2, rounded(4, 24, symmetric=False))
    with pytest.raises(LayoutError, match=r"'.*q_proj\.weight': .* groups of 24 .*--standard-ops .* --precision fp16"):
        exported(tmp_path / "packed", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
    out = tmp_path / "standard"  # what the message says does
    assert_codes_kept(exported(tmp_path / "packed", out, standard_ops=True), out, LINEARS)
    assert_computes_the_same(tmp_path / "packed", out)


def test_scales_that_the_activations_do_not_hold_are_refused_by_name(source: Path, tmp_path: Path) -> None:
    def small(name: str, weight: Array) -> QuantizedTensor:
        tensor = random_tensor(0, *weight.shape, bits=4, group=32, symmetric=True, scale_type="BF16")
        tensor.scale[3, 1] = 1.5 * 2**-24 if "down" in name else 0.5
        return tensor

    write_packed(source, tmp_path / "packed", COMPRESSED, small)
    with pytest.raises(LayoutError, match=r"'.*down_proj\.weight': the scale 8\.94.*e-08 .*--compute-type fp32"):
        exported(tmp_path / "packed", tmp_path / "half", compute_type="fp16")
    exported(tmp_path / "packed", tmp_path / "onnx")
    assert_exact(matrices(tmp_path / "onnx")[LAST], open_checkpoint(tmp_path / "packed").quantized[LAST].read())


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_of_rows_whose_inputs_are_rounded_too_arrive(source: Path, tmp_path: Path, symmetric: bool) -> None:
    """compressed-tensors' W8A8: the codes are kept; the inputs stay as exact as the activations."""
    quantize = rounded(8, -1, symmetric=symmetric, scale_type="BF16")
    write_packed(source, tmp_path / "packed", COMPRESSED, quantize, input_bits=8)
    checkpoint = exported(tmp_path / "packed", tmp_path / "onnx", precision="int8")
    assert {lazy.form.input_bits for lazy in checkpoint.quantized.values()} == {8}
    assert_codes_kept(checkpoint, tmp_path / "onnx", LINEARS)
    assert_computes_the_same(tmp_path / "packed", tmp_path / "onnx")


CASES = [
    ("llama-tied", GPTQ_V1, rounded(4, 32, symmetric=True)),
    ("llama-bias", GPTQ_V2, rounded(3, 32, symmetric=False)),
    ("qwen2", AWQ, rounded(4, 32, symmetric=False)),
    ("gpt2", GPTQ_V2, rounded(8, 16, symmetric=True)),  # weights stored as (K, N), of q, k and v together
    ("gptneox", GPTQ_V1, rounded(4, -1, symmetric=True)),  # rows of q, k and v take turns
    ("phi3", COMPRESSED, rounded(2, 16, symmetric=False, scale_type="F32")),
    ("gemma2", COMPRESSED, rounded(8, 32, symmetric=True, scale_type="BF16")),
]


@pytest.mark.parametrize(("family", "form", "quantize"), CASES, ids=[case[0] for case in CASES])
def test_onnxruntime_computes_what_torch_computes_from_the_same_codes(
    tmp_path: Path, family: str, form: PackFormat, quantize: Quantize
) -> None:
    case = tiny_case(family)
    model = tiny_checkpoint(tmp_path / "model", case.family, **case.options)
    write_packed(model, tmp_path / "packed", form, quantize)
    for standard in (False, True):
        out = tmp_path / f"onnx-{standard}"
        checkpoint = exported(tmp_path / "packed", out, standard_ops=standard)
        assert len(matrices(out)) >= len(checkpoint.quantized) > 0
        assert_computes_the_same(tmp_path / "packed", out)


def test_a_head_that_has_codes_keeps_them(source: Path, tmp_path: Path) -> None:
    head = random_tensor(5, 320, HIDDEN, bits=4, group=32, symmetric=False)
    checkpoint = open_checkpoint(source)
    lazy = LazyQuantized(HEAD, head.form, "head", lambda: head)
    plain = {name: tensor for name, tensor in checkpoint.tensors.items() if name != HEAD}
    view = with_quantized(checkpoint, plain, {HEAD: lazy}, dtype="F16", kind="gptq")
    write_onnx(tmp_path / "onnx", plan_onnx(view, preflight(view), OnnxOptions(precision="int4")), threads=1)
    found = matrices(tmp_path / "onnx")
    assert set(found) == {HEAD}  # what the source has no codes of stays as it is
    assert_exact(found[HEAD], head)
