"""The library as a script uses it: no prints, typed errors, progress by callback, the same results as the program."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import quantpress as qp
from quantpress.pipelines.gguf_readback import half_split_rows, round_activations
from quantpress.pipelines.hashing import BackgroundHashes, StoppedError, hash_file, likely_weights
from quantpress.pipelines.progress import PlainProgress
from quantpress.pipelines.torch_runtime import TorchRuntime
from quantpress.pipelines.verification import default_chunks


def test_everything_in_all_is_there_and_nothing_else_is_public() -> None:
    assert dir(qp) == sorted(qp.__all__)
    for name in qp.__all__:
        assert getattr(qp, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute"):
        _ = qp.nothing_like_it  # type: ignore[attr-defined]


def test_the_readme_example_presses_and_verifies(tiny_model: Path, tmp_path: Path, text_file: Path) -> None:
    model = qp.open_checkpoint(tiny_model)
    seen: list[tuple[str, int, int]] = []
    out = tmp_path / "tiny-Q8_0.gguf"
    pressed = qp.export_gguf(model, out, outtype="Q8_0", progress=lambda *step: seen.append(step))
    report = qp.verify(out, against=model, text=text_file)
    assert pressed.artifact.ftype == "Q8_0"
    assert report.passed, report.reason
    assert seen[-1][1] == seen[-1][2] > 0


def test_the_library_prints_nothing(tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    qp.export_gguf(tiny_model, tmp_path / "out.gguf", outtype="f16")
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_a_proof_that_fails_raises_a_typed_error(tiny_model: Path, tmp_path: Path, text_file: Path) -> None:
    judge = qp.JudgeOptions(text=text_file, chunks=1, max_kld=0.0)
    with pytest.raises(qp.ParityError) as caught:
        qp.export_gguf(tiny_model, tmp_path / "out.gguf", outtype="q4_0", verify=True, judge=judge)
    assert caught.value.exit_code == 4


def test_safetensors_are_written_and_proved(tiny_model: Path, tmp_path: Path, text_file: Path) -> None:
    judge = qp.JudgeOptions(text=text_file, chunks=1)
    pressed = qp.export_safetensors(tiny_model, tmp_path / "out", dtype="f16", verify=True, judge=judge)
    assert pressed.parity is not None
    assert pressed.parity.passed
    assert pressed.sidecar == tmp_path / "out" / "quantpress.json"


def test_streamed_weights_give_the_logits_of_resident_ones(tiny_model: Path) -> None:
    source = qp.open_checkpoint(tiny_model)
    windows = [np.arange(start, start + 32, dtype=np.int32) for start in (1, 50, 99, 150, 200)]
    results: list[list[Any]] = []
    for max_memory in (1 << 30, 0):
        with TorchRuntime.of_checkpoint(source, max_memory=max_memory) as runtime:
            runtime.prepare(windows, 16)
            results.append([runtime.logits(window, 16) for window in windows])
    with TorchRuntime.of_checkpoint(source) as runtime:
        results.append([runtime.logits(window, 16) for window in windows])
    for resident, streamed, plain in zip(*results, strict=True):
        # float32 sums of 96 products in another order: 96 * 2^-24 of values below 10
        np.testing.assert_allclose(streamed, resident, atol=1e-4, rtol=0)
        np.testing.assert_allclose(plain, resident, atol=1e-4, rtol=0)


def test_half_split_rows_undo_the_interleaving_of_pairs() -> None:
    # two heads of four rows: pairs (0, 2) and (1, 3) of each head stand side by side in the file
    file = np.array([0, 2, 1, 3, 4, 6, 5, 7])[:, None]
    np.testing.assert_array_equal(half_split_rows(file, 2)[:, 0], np.arange(8))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1"])
def test_activations_are_rounded_to_the_blocks_that_llama_cpp_multiplies_with(kind: str) -> None:
    values = np.random.default_rng(1).standard_normal((5, 96)).astype(np.float32)
    values[2, 32:64] = 0
    packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    wanted = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
    found = round_activations(torch.from_numpy(values), kind).numpy()
    # the package rounds halves away from zero and inverts the scale first: one code, of 127 for a peak below 4, at most
    np.testing.assert_allclose(found, wanted, atol=4 / 127, rtol=0)
    assert (found == wanted).mean() > 0.99
    np.testing.assert_array_equal(round_activations(torch.from_numpy(values), "F16").numpy(), values)


def test_background_hashes_are_those_of_the_files(tiny_model: Path) -> None:
    files = qp.open_checkpoint(tiny_model).files
    paths = [file.path for file in files]
    with BackgroundHashes() as hashes:
        hashes.add([*likely_weights(str(tiny_model)), *paths, tiny_model / "no such file"])
        found = hashes.results(paths)
    assert list(found) == paths
    assert all(found[file.path] == hash_file(file.path) for file in files)
    assert all(found[file.path][1] == file.nbytes for file in files)


def test_a_file_that_cannot_be_read_is_an_error_for_those_who_need_it(tmp_path: Path) -> None:
    with BackgroundHashes() as hashes:
        hashes.add([tmp_path / "missing"])
        with pytest.raises(qp.InputError, match="missing"):
            hashes.results([tmp_path / "missing"])


def test_hashing_stops_when_the_work_beside_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(4 << 20))
    stop = threading.Event()
    stop.set()
    with pytest.raises(StoppedError):
        hash_file(path, stop)


def test_larger_models_are_judged_on_fewer_windows() -> None:
    counts = [default_chunks(size) for size in (10**8, 5 * 10**9, 10**11)]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] >= 2


def test_plain_progress_is_lines_that_do_not_flood(capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    progress = PlainProgress(sys.stdout)
    for done in range(1, 1001):
        progress("write", done, 1000)
    lines = capsys.readouterr().out.splitlines()
    assert 2 <= len(lines) <= 5
    assert lines[-1] == "write: 100 %"
