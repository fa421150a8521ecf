"""`quantpress bench kernels`: plans, measuring and tuning with a clock that needs no GPU, and errors without one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not here: install the extra gpu")

from quantpress.kernels.launch import Launch, Problem
from quantpress.kernels.tuning import choice as tuning
from quantpress.kernels.tuning.ahead import Ahead
from quantpress.kernels.tuning.candidates import H200, candidates
from quantpress.kernels.tuning.measuring import measure
from quantpress.kernels.tuning.search import neighbours
from quantpress.kernels.tuning.tables import read_table
from quantpress.pipelines import kernel_bench
from quantpress.pipelines.kernel_bench import SHAPES, BenchOptions

pytestmark = pytest.mark.usefixtures("no_launch_files")

Run = Callable[..., Any]
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU")
TINY = replace(H200, name="Test GPU", cache_bytes=1 << 14)  # so that two copies of a weight are enough
PROBLEM = Problem(1, 40, 64, 4, 32, "float16")


class FakeClock:
    """Runs nothing; the first copy's product says what is timed. One launch is faster than all others."""

    def __init__(self, best: Launch | None = None) -> None:
        self.best, self.copies = best, set[int]()

    def __call__(self, runs: Sequence[Callable[[], object]], samples: int) -> list[float]:
        self.copies.add(len(runs))
        launch = runs[0].keywords.get("launch")  # type: ignore[attr-defined]
        return [1e-6 if launch is not None and launch == self.best else 4e-6] * samples


def test_help_shows_the_command_and_examples(quantpress: Run) -> None:
    assert "kernels" in quantpress("bench", "--help").out
    text = quantpress("bench", "kernels", "--help").out
    assert "quantpress bench kernels --tune" in text
    assert "\n  bench " in quantpress("--help").out


def test_a_plan_lists_every_product_and_how_many_candidates_it_has(quantpress: Run) -> None:
    flags = ("--bits", "4", "--bits", "8", "--shape", "256,512", "--shape", "96,7", "--rows-in", "1", "--rows-in", "16")
    ended = quantpress("bench", "kernels", "--dry-run", "--json", "--group-size", "64", *flags)
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    products = report["products"]
    seen = [(row["bits"], row["columns"], row["rows"], row["rows_in"]) for row in products]
    assert seen == [(bits, *shape, m) for bits in (4, 8) for shape in ((256, 512), (96, 7)) for m in (1, 16)]
    for row in products:
        own = {key: row[key] for key in ("rows_in", "rows", "columns", "bits", "group_size", "dtype", "symmetric")}
        assert row["group_size"] == 64
        assert row["candidates"] == len(candidates(Problem(**own), H200)) > 0
        assert row["launch"]["kernel"] == ("gemv" if row["rows_in"] == 1 else "tiled")
    table = quantpress("bench", "kernels", "--dry-run", "--tune", "--group-size", "0", *flags)
    assert table.code == 0, table.err
    assert "256 x 512" in table.out
    assert "nothing was measured" in table.out


def test_shapes_of_models_are_their_layers() -> None:
    # transformers' configurations of the models: queries + 2 x keys, gate and up side by side
    for name, hidden, wide, heads, keys, size in (
        ("llama-3-8b", 4096, 14336, 32, 8, 128),
        ("llama-3-70b", 8192, 28672, 64, 8, 128),
        ("qwen2.5-7b", 3584, 18944, 28, 4, 128),
    ):
        wanted = ((hidden, (heads + 2 * keys) * size), (heads * size, hidden), (hidden, 2 * wide), (wide, hidden))
        assert SHAPES[name] == wanted


@pytest.mark.parametrize(
    "flags",
    [
        ["--shape", "4096x4096"],
        ["--shape", "4096"],
        ["--shape", "-1,5"],
        ["--shape", "0,5"],
        ["--shape", "9999999999,5"],
        ["--rows-in", "0"],
        ["--group-size", "-1"],
        ["--bits", "5"],
        ["--dtype", "int8"],
        ["--model", "gpt-5"],
        ["--jobs", "0"],
        ["--kind", "w8a8", "--bits", "4"],
        ["--kind", "nf4", "--group-size", "33"],
        ["--kind", "nf4", "--asymmetric"],
        ["--kind", "w8a8", "--tune"],
    ],
)
def test_what_cannot_be_measured_ends_with_2_and_one_line(quantpress: Run, flags: list[str]) -> None:
    ended = quantpress("bench", "kernels", "--dry-run", *flags)
    assert ended.code == 2
    assert ended.err.startswith("error:")
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize(("kind", "bits", "group"), [("w8a8", 8, 4096), ("nf4", 4, 64)])
def test_other_kinds_are_planned_with_their_own_sizes(quantpress: Run, kind: str, bits: int, group: int) -> None:
    flags = ("--kind", kind, "--group-size", "64", "--shape", "4096,512", "--rows-in", "2", "--dry-run", "--json")
    ended = quantpress("bench", "kernels", *flags)
    assert ended.code == 0, ended.err
    (row,) = json.loads(ended.out)["products"]
    assert (row["kind"], row["bits"], row["group_size"], row["candidates"]) == (kind, bits, group, 0)


@WITHOUT_GPU
@pytest.mark.parametrize("flags", [[], ["--tune"], ["--json"]])
def test_without_a_gpu_it_ends_with_5_and_one_line(quantpress: Run, flags: list[str]) -> None:
    ended = quantpress("bench", "kernels", *flags)
    assert ended.code == 5
    assert ended.err.startswith("error: no CUDA device")
    assert ended.err.count("\n") == 1


@WITHOUT_GPU
def test_measuring_takes_turns_with_copies_and_counts_all_bytes() -> None:
    clock = FakeClock()
    found = measure(PROBLEM, TINY, clock, place="cpu")
    assert clock.copies == {2}
    assert found.launch == tuning.choose(PROBLEM, "Test GPU")
    assert found.nbytes == 40 * 64 // 2 + 2 * 40 * 2 + 2 * (64 + 40)  # codes, scales, input and output
    record = found.to_json(copy_bandwidth=1e9)
    assert record["microseconds"] == 4.0
    assert record["gb_per_s"] == round(found.nbytes / 4e-6 / 1e9, 1)
    assert record["share_of_copy"] == round(found.nbytes / 4e-6 / 1e9, 4)
    assert record["times_cublas"] == 1.0
    assert "tried" not in record


@WITHOUT_GPU
def test_tuning_keeps_the_best_launch_where_the_kernels_look_for_it() -> None:
    path = tuning.device_file("Test GPU")
    best = neighbours(tuning.choose(PROBLEM, "Test GPU"), candidates(PROBLEM, TINY))[-1]
    with Ahead(1) as ahead:
        found = measure(PROBLEM, TINY, FakeClock(best), ahead, dense=False, place="cpu")
    assert (found.launch, found.dense) == (best, None)
    assert found.tried > 1
    kernel_bench.keep(path, "Test GPU", found)
    assert tuning.choose(PROBLEM, "Test GPU") == best
    other = replace(found, problem=replace(PROBLEM, bits=8), launch=Launch("gemv", block_n=32))
    kernel_bench.keep(path, "Test GPU", other)
    table = read_table(path)
    assert table.measured
    assert set(table.made_by) == {"quantpress", "torch", "triton"}
    assert [(row.problem, row.launch) for row in table.launches] == [
        (PROBLEM, best),
        (other.problem, other.launch),
    ]
    assert table.launches[0].microseconds == 1.0


@WITHOUT_GPU
def test_the_whole_command_measures_tunes_and_prints(
    quantpress: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from quantpress.kernels.tuning import candidates as candidates_module
    from quantpress.kernels.tuning import measuring, timing

    original = measuring.measure

    def on_this_machine(problem: Any, device: Any, clock: Any, ahead: Any, **flags: Any) -> Any:
        return original(problem, device, clock, ahead, place="cpu", **flags)

    monkeypatch.setattr(kernel_bench, "_has_gpu", lambda: True)
    monkeypatch.setattr(candidates_module, "device_facts", lambda: TINY)
    monkeypatch.setattr(measuring, "measure", on_this_machine)
    monkeypatch.setattr(timing, "graph_seconds", FakeClock(candidates(PROBLEM, TINY)[0]))
    monkeypatch.setattr(timing, "copy_bandwidth", lambda: 4e12)
    flags = ("--shape", "64,40", "--rows-in", "1", "--group-size", "32", "--dtype", "float16")
    ended = quantpress("bench", "kernels", *flags)
    assert ended.code == 0, ended.err
    assert "64 x 40" in ended.out
    assert "a copy moves 4000 GB/s" in ended.out
    assert not (tmp_path / "cache").exists()
    tuned = quantpress("bench", "kernels", "--tune", "--jobs", "1", "--json", *flags)
    assert tuned.code == 0, tuned.err
    report = json.loads(tuned.out)
    assert report["copy_gb_per_s"] == 4000.0
    path = Path(report["written"])
    assert path == tmp_path / "cache/quantpress/kernels/test-gpu.json"
    (row,) = report["products"]
    assert row["microseconds"] == 1.0
    assert row["tried"] > 1
    assert read_table(path).launches[0].problem == PROBLEM
    path.write_text("{}")
    tuning.forget()
    damaged = quantpress("bench", "kernels", *flags)
    assert damaged.code == 3
    assert "test-gpu.json" in damaged.err
    assert damaged.err.splitlines()[-1].startswith("error:")


def test_options_refuse_bits_that_no_kernel_has() -> None:
    from quantpress.quant.errors import UsageError

    with pytest.raises(UsageError, match="bits"):
        BenchOptions(bits=(5,))
