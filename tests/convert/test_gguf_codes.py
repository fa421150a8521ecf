"""A quantized source keeps its codes in a GGUF file whose types can hold them, rows in llama.cpp's order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from quantpress.convert.compressed_tensors.pack import FORMAT
from quantpress.convert.gguf.export import WriteResult, write_gguf
from quantpress.convert.gguf.mixture import TypeOptions
from quantpress.convert.gguf.plan import TensorPlan, plan_tensors
from quantpress.convert.open import open_checkpoint
from quantpress.convert.preflight import preflight
from quantpress.quant.qtensor import QuantizedTensor
from tests.packed_folder import Quantize, rounded, write_packed
from tests.tiny import tiny_checkpoint

pytest.importorskip("transformers")

METADATA = {"general.architecture": ("string", "llama")}


def plan(folder: Path, outtype: str, *, codes: bool = True, **options: Any) -> TensorPlan:
    source = open_checkpoint(folder)
    checked = preflight(source)
    types = TypeOptions(outtype, **options)
    quantized = source.quantized if codes else {}
    return plan_tensors(checked.bindings, checked.spec, checked.hyper, types, quantized=quantized)


def write(path: Path, planned: TensorPlan, threads: int = 2) -> tuple[WriteResult, dict[str, np.ndarray]]:
    """Gives the result and every tensor as the gguf package reads it."""
    result = write_gguf(path, METADATA, planned, threads=threads, force=True)
    read = gguf.GGUFReader(path)
    return result, {each.name: gguf.dequantize(each.data, each.tensor_type) for each in read.tensors}


def shaken(bits: int, group_size: int, *, symmetric: bool) -> Quantize:
    """Codes that no rounding to nearest would give, as those of GPTQ: a group's greatest weight is not on its edge."""
    quantize, random = rounded(bits, group_size, symmetric=symmetric), np.random.default_rng(0)

    def moved(name: str, weight: np.ndarray) -> QuantizedTensor | None:
        tensor = quantize(name, weight)
        assert tensor is not None
        return replace(tensor, codes=random.integers(1, (1 << bits) - 1, tensor.codes.shape).astype(np.uint8))

    return moved


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {family: tiny_checkpoint(root / family, family, dtype="float16") for family in ("llama", "gpt2", "gptneox")}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptneox"])
@pytest.mark.parametrize(
    ("quantize", "outtype"),
    [
        (shaken(4, 32, symmetric=True), "q4_0"),
        (shaken(4, -1, symmetric=True), "q4_1"),
        (shaken(4, 32, symmetric=False), "q5_0"),
        (shaken(3, 32, symmetric=False), "q4_0"),
        (shaken(8, 32, symmetric=True), "q8_0"),
    ],
    ids=["int4-q4_0", "int4-row-q4_1", "int4-asym-q5_0", "int3-asym-q4_0", "int8-q8_0"],
)
def test_codes_go_into_the_file_untouched(
    sources: dict[str, Path], tmp_path: Path, family: str, quantize: Quantize, outtype: str
) -> None:
    made = write_packed(sources[family], tmp_path / "packed", FORMAT, quantize)
    # the values in a file of float32 tensors have the rows where llama.cpp wants them, by another path
    _, wanted = write(tmp_path / "f32.gguf", plan(tmp_path / "packed", "f32"))
    planned = plan(tmp_path / "packed", outtype)
    result, found = write(tmp_path / "q.gguf", planned)
    kept = {each.name for each in result.tensors if each.kept}
    assert len(kept) == len(made)
    for each in result.tensors:
        if each.name in kept:
            assert each.type == outtype.upper()
            assert each.relative_error == 0
            np.testing.assert_array_equal(found[each.name], wanted[each.name])
    assert not any(tensor.note for tensor in planned.tensors if tensor.codes)
    # what is quantized again does not have the same bytes, or this test would prove nothing
    again, other = write(tmp_path / "again.gguf", plan(tmp_path / "packed", outtype, codes=False))
    assert not any(each.kept for each in again.tensors)
    assert any((other[name] != wanted[name]).any() for name in kept)


def test_rows_that_do_not_fit_are_quantized_as_ever_and_it_is_said(sources: dict[str, Path], tmp_path: Path) -> None:
    write_packed(sources["llama"], tmp_path / "packed", FORMAT, rounded(4, 32, symmetric=False))
    planned = plan(tmp_path / "packed", "q4_0")
    note = (
        "codes of int4 g32 asym need not fit Q4_0 and are rounded again where they do not; Q5_0 or Q8_0 would keep them"
    )
    assert [tensor.note for tensor in planned.tensors if "ffn_up" in tensor.name] == [note] * 3
    result, found = write(tmp_path / "q.gguf", planned)
    _, plain = write(tmp_path / "plain.gguf", plan(tmp_path / "packed", "q4_0", codes=False))
    assert not any(each.kept for each in result.tensors)
    for name, values in plain.items():
        np.testing.assert_array_equal(found[name], values)


def test_the_bytes_do_not_depend_on_the_number_of_threads(sources: dict[str, Path], tmp_path: Path) -> None:
    write_packed(sources["llama"], tmp_path / "packed", FORMAT, rounded(4, 32, symmetric=True))
    one, _ = write(tmp_path / "1.gguf", plan(tmp_path / "packed", "q4_0"), threads=1)
    three, _ = write(tmp_path / "3.gguf", plan(tmp_path / "packed", "q4_0"), threads=3)
    assert one.sha256 == three.sha256


def test_types_without_codes_are_written_as_from_any_source(sources: dict[str, Path], tmp_path: Path) -> None:
    write_packed(sources["llama"], tmp_path / "packed", FORMAT, rounded(4, 32, symmetric=True))
    planned = plan(tmp_path / "packed", "auto")
    assert planned.outtype == "F16"
    assert not any(tensor.codes or tensor.note for tensor in planned.tensors)
    mixed = plan(tmp_path / "packed", "q4_0", tensor_types=((r"ffn_down", "q5_1"),))
    noted = {tensor.name: tensor.note for tensor in mixed.tensors if tensor.note and "blk" in tensor.name}
    assert set(noted) == {f"blk.{layer}.ffn_down.weight" for layer in range(3)}


def test_codes_that_happen_to_fit_are_kept_although_the_plan_could_not_know(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    usual = shaken(4, 32, symmetric=True)

    def with_zeros(name: str, weight: np.ndarray) -> QuantizedTensor | None:
        tensor = usual(name, weight)  # zeros of 8 that are stored, as in AWQ checkpoints of symmetric weights
        return None if tensor is None else replace(tensor, zero=tensor.zeros())

    made = write_packed(sources["llama"], tmp_path / "packed", FORMAT, with_zeros)
    _, wanted = write(tmp_path / "f32.gguf", plan(tmp_path / "packed", "f32"))
    result, found = write(tmp_path / "q.gguf", plan(tmp_path / "packed", "q4_0"))
    kept = [each.name for each in result.tensors if each.kept]
    assert len(kept) == len(made)
    for name in kept:
        np.testing.assert_array_equal(found[name], wanted[name])
