"""Quantizing rows on a device, here with interpreted kernels: bytes, refusals, and what stays on the processor."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton", reason="triton is not here: install the extra gpu")

from quantpress.convert.gguf.encode import encode_rows
from quantpress.kernels.ggml.quantize import TYPES
from quantpress.kernels.kquants.types import KQUANTS
from quantpress.quant.errors import LayoutError, OutputError
from quantpress.quant.floats import BFLOAT16
from quantpress.quant.ggml import on_device
from quantpress.quant.ggml.codec import dequantize, quantize_rows
from quantpress.quant.ggml.on_device import has_kernel, quantize_rows_on_device, searching_device
from quantpress.quant.ggml.types import GGML_TYPES, ggml_type
from tests.convert.test_gguf_export import LLAMA, checkpoint, export, random_weights
from tests.quant.conftest import LibGGML

NAMES = [*KQUANTS, *TYPES]


@pytest.fixture(autouse=True)
def _quiet():
    with np.errstate(all="ignore"):  # as a GPU, which does not warn
        yield


def rows(*shape: int) -> np.ndarray:
    return (np.random.default_rng(len(shape)).standard_normal(shape) * 0.05).astype(np.float32)


@pytest.mark.parametrize("name", ["Q6_K", "Q4_1", "TQ1_0", "MXFP4"])
def test_blocks_are_libggmls_whatever_the_shape(name: str, libggml: LibGGML) -> None:
    values, weight = rows(2, 3, 256), np.linspace(0.1, 4, 256, dtype=np.float32)
    found = quantize_rows_on_device(name, values, weight, "cpu")
    wanted = libggml.quantize(ggml_type(name), values.reshape(6, 256), weight)
    assert found.shape == (2, 3, wanted.shape[1])
    np.testing.assert_array_equal(found.reshape(wanted.shape), wanted)


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float64, ">f4"])
def test_other_number_types_and_rows_that_cannot_be_written_are_taken(dtype, libggml: LibGGML) -> None:
    values = rows(3, 256).astype(dtype)
    values.setflags(write=False)
    wanted = libggml.quantize(ggml_type("TQ2_0"), values.astype(np.float32))
    np.testing.assert_array_equal(quantize_rows_on_device("TQ2_0", values, None, "cpu"), wanted)


@pytest.mark.parametrize("name", ["F16", "BF16", "F32", "Q8_0", "Q4_0", "Q5_1"])
def test_types_without_a_search_stay_on_the_processor(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_device, "_run", None)
    assert not has_kernel(name, weighted=False)
    values = rows(2, 64)
    np.testing.assert_array_equal(quantize_rows_on_device(name, values, None, "cuda"), quantize_rows(name, values))


def test_every_type_with_a_kernel_says_where_its_scales_are() -> None:
    assert set(on_device._HALVES) == set(NAMES)
    assert all(has_kernel(name, weighted=True) for name in NAMES)
    for name, places in on_device._HALVES.items():
        # a block with an infinite scale is not finite when it is read
        block = np.zeros((1, GGML_TYPES[name].block_bytes), np.uint8)
        for place in places:
            block[:] = 0x11
            block[0, place : place + 2] = 0x00, 0x7C
            assert not np.isfinite(dequantize(name, block, GGML_TYPES[name].block_size)).all(), (name, place)


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "TQ1_0"])
def test_scales_beyond_float16_are_refused_with_the_processors_words(name: str) -> None:
    values, weight = rows(3, 256), np.ones(256, np.float32)
    values[1] *= 1e12
    told = []
    for function in (quantize_rows, lambda *given: quantize_rows_on_device(*given, "cpu")):
        with pytest.raises(LayoutError) as error:
            function(name, values, weight)
        told.append(str(error.value))
    assert told[0] == told[1]
    assert "beyond 65504" in told[0]


def test_rows_that_do_not_divide_and_types_without_a_quantizer_are_refused() -> None:
    with pytest.raises(LayoutError, match="blocks of 256 weights; a row of 128"):
        quantize_rows_on_device("TQ1_0", rows(2, 128), None, "cpu")
    with pytest.raises(LayoutError, match="no quantizer for IQ1_S"):
        quantize_rows_on_device("IQ1_S", rows(2, 256), None, "cpu")
    assert quantize_rows_on_device("TQ1_0", rows(0, 256), None, "cpu").shape == (0, 54)


def test_several_threads_may_ask_at_once() -> None:
    parts = [rows(2, 256) * (number + 1) for number in range(6)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda part: quantize_rows_on_device("MXFP4", part, None, "cpu"), parts))
    for part, blocks in zip(parts, found, strict=True):
        np.testing.assert_array_equal(blocks, quantize_rows_on_device("MXFP4", part, None, "cpu"))


def test_encoded_rows_and_their_error_are_those_of_the_processor() -> None:
    values = rows(16, 256)
    wanted = encode_rows(values, "TQ2_0", offset=0.5, sample=True)
    found = encode_rows(values, "TQ2_0", offset=0.5, sample=True, device="cpu:0")
    np.testing.assert_array_equal(found.data, wanted.data)
    assert (found.squared_error, found.squared_values) == (wanted.squared_error, wanted.squared_values)
    assert wanted.squared_error > 0


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "quantpress.kernels.ggml", None)
    with pytest.raises(OutputError, match=r"needs .*: pip install 'quantpress\[gpu\]', or use --device cpu"):
        quantize_rows_on_device("MXFP4", rows(1, 32), None, "cuda")


def test_importing_it_loads_neither_torch_nor_triton() -> None:
    listed = "[name for name in ('torch', 'triton', 'numba') if name in sys.modules]"
    code = f"import sys, quantpress.quant.ggml.on_device; print({listed})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_a_file_has_the_same_bytes_wherever_its_scales_are_searched(tmp_path: Path) -> None:
    config = {**LLAMA, "hidden_size": 256, "num_hidden_layers": 1, "intermediate_size": 256}
    model = checkpoint(config, random_weights(config))
    files = [tmp_path / "processor.gguf", tmp_path / "device.gguf"]
    written = [
        export(file, model, "tq2_0", device=device) for file, device in zip(files, ("cpu", "cpu:0"), strict=True)
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert written[0].tensors == written[1].tensors
    assert {"TQ2_0"} < {tensor.type for tensor in written[0].tensors}


@pytest.mark.parametrize(("device", "found"), [("cpu", "cpu"), ("cuda", "cuda"), ("cuda:1", "cuda:1")])
def test_the_processor_searches_where_triton_is_missing(
    device: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert searching_device(device) == found
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert searching_device(device) == "cpu"
