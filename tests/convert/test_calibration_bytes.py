"""The same bytes whatever the threads, the budget, and wherever a run was stopped; and memory that does not grow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from quantpress.convert.calibration.chain import load_chain
from quantpress.convert.calibration.site import LayerResult, Site, SiteResult
from quantpress.convert.calibration.walk import calibrate
from quantpress.convert.checkpoint import Array
from quantpress.convert.open import open_checkpoint
from quantpress.quant.errors import InputError, LayoutError, OutputError
from quantpress.quant.grid import Grid, round_to_nearest
from tests.tiny import tiny_case, tiny_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")

CASES = ["llama", "gptneox", "gemma2"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name in CASES:
        case = tiny_case(name)
        made[name] = tiny_checkpoint(tmp_path_factory.mktemp(name) / "model", case.family, **case.options)
    return made


def some_windows(samples: int = 40, length: int = 33, seed: int = 1) -> list[NDArray[np.int32]]:
    """1320 tokens: three slices, of which windows are not cut where tokens are."""
    return list(np.random.default_rng(seed).integers(0, 320, (samples, length)).astype(np.int32))


@dataclass
class Rounding:
    """Rounds to the nearest of 3 bits, with a scale that depends on every bit of the statistics."""

    sequential: bool = True
    wants: frozenset[str] = frozenset({"hessian", "mean_abs", "max_abs"})
    seen: list[bytes] = field(default_factory=list)

    def quantize(self, sites: Sequence[Site], plain: Mapping[str, Array]) -> SiteResult:
        del plain
        for site in sites:
            assert site.hessian is not None
            assert site.mean_abs is not None
            assert site.max_abs is not None
            self.seen += [site.hessian.tobytes(), site.mean_abs.tobytes(), site.max_abs.tobytes()]
        weights = {slot: weight for site in sites for slot, weight in site.weights.items()}
        return SiteResult({slot: round_to_nearest(weight, Grid(3, 16)) for slot, weight in weights.items()})


def run(
    source: Path, folder: Path, windows: Sequence[NDArray[np.int32]] | None = None, stop: int = 99, **options: Any
) -> tuple[list[LayerResult], list[bytes]]:
    """Calibrates; `stop` layers at most, as if the run were killed while the last one of them is stored."""
    method = Rounding()
    folder.mkdir(exist_ok=True)
    options = {"threads": 2, "targets": lambda _name: True, **options}
    results = []
    for result in calibrate(open_checkpoint(source), windows or some_windows(), method, folder=folder, **options):
        results.append(result)
        if len(results) == stop:
            break
    return results, method.seen


def same(ours: Sequence[LayerResult], theirs: Sequence[LayerResult]) -> bool:
    assert [one.layer for one in ours] == [other.layer for other in theirs]
    return all(
        one.quantized.keys() == other.quantized.keys()
        and all(
            codes.codes.tobytes() == other.quantized[name].codes.tobytes()
            and codes.scale.tobytes() == other.quantized[name].scale.tobytes()
            for name, codes in one.quantized.items()
        )
        for one, other in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("name", CASES)
def test_threads_and_budget_do_not_change_a_bit(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    wanted, seen = run(folders[name], tmp_path / "one", threads=1)
    # nothing, some rows of the residual, all of it and some of the rest, everything
    for threads, budget in ((2, None), (3, 0), (2, 100_000), (3, 1320 * 64 * 4 + 50_000), (1, 1 << 30)):
        found, other = run(folders[name], tmp_path / "other", threads=threads, max_memory=budget)
        assert other == seen, (threads, budget)
        assert same(found, wanted)
        assert list((tmp_path / "other").iterdir()) == []


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("budget", [None, 0])
def test_a_resumed_run_gives_the_bytes_of_an_undisturbed_one(
    name: str, budget: int | None, folders: dict[str, Path], tmp_path: Path
) -> None:
    wanted, seen = run(folders[name], tmp_path / "whole", max_memory=budget)
    for done in (1, 2):
        folder = tmp_path / str(done)
        first, early = run(folders[name], folder, stop=done, max_memory=budget)
        for layer in (done - 1, done):  # stored or not, the run can go on
            if layer:
                assert load_chain(folder, layer) is not None
        rest, late = run(folders[name], folder, first_layer=done, max_memory=budget, threads=3)
        assert same([*first, *rest], wanted)
        assert early + late == seen


def test_inputs_that_are_damaged_cut_off_or_missing_do_not_count(folders: dict[str, Path], tmp_path: Path) -> None:
    run(folders["llama"], tmp_path, stop=1)
    values, listed = tmp_path / "inputs-of-layer-1.f32", tmp_path / "inputs-of-layer-1.json"
    whole, text = values.read_bytes(), listed.read_text()
    chain = load_chain(tmp_path, 1)
    assert chain is not None
    assert b"".join(rows.numpy().tobytes() for _, rows in chain.rows()) == whole
    for damaged in (whole[:-4], whole[:70_000] + b"!" + whole[70_001:], b"", whole + b"0000"):
        values.write_bytes(damaged)
        assert load_chain(tmp_path, 1) is None
    values.write_bytes(whole)
    content = json.loads(text)
    for bad in (
        "", "[]", "{}", text[:-9], text.replace("1320", "1e99"), text.replace("1320", "-1"),
        json.dumps({**content, "parts": content["parts"][1:]}),
        json.dumps({**content, "parts": content["parts"][:-1]}), json.dumps({**content, "parts": 5}),
        json.dumps({**content, "parts": [[0, 1 << 62, ""]]}), json.dumps({**content, "width": 0}),
    ):  # fmt: skip
        listed.write_text(bad)
        assert load_chain(tmp_path, 1) is None, bad
    listed.write_text(text)
    assert load_chain(tmp_path, 1) == chain
    assert load_chain(tmp_path, 2) is None
    with pytest.raises(InputError, match=r"inputs of layer 2 are missing or damaged; start anew"):
        run(folders["llama"], tmp_path, first_layer=2)
    with pytest.raises(InputError, match=r"inputs of layer 1 are .* wanted .* start anew"):
        run(folders["llama"], tmp_path, some_windows(seed=2), first_layer=1)


def test_inputs_that_are_not_finite_name_layer_and_weight(folders: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folders["llama"])
    name = "model.layers.1.mlp.down_proj.weight"
    tensor = checkpoint.tensors[name]

    def read(start: int, stop: int) -> Array:
        values = tensor.read_rows(start, stop).copy()
        values[0, 5] = np.nan
        return values

    broken = replace(checkpoint, tensors={**checkpoint.tensors, name: replace(tensor, read_rows=read)})
    chosen = {"targets": lambda other: other != name, "threads": 2, "folder": tmp_path}
    wanted = r"layer 2: attn_q\.weight \('model\.layers\.2\.self_attn\.q_proj\.weight'\): its inputs are not finite"
    with pytest.raises(InputError, match=wanted):
        list(calibrate(broken, some_windows(), Rounding(), **chosen))


def test_what_a_method_refuses_names_layer_and_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    @dataclass
    class Refusing(Rounding):
        error: Exception = field(default_factory=Exception)

        def quantize(self, sites: Sequence[Site], plain: Mapping[str, Array]) -> SiteResult:
            if sites[0].layer == 1 and "ffn_up.weight" in sites[0].weights:
                raise self.error
            return super().quantize(sites, plain)

    for error in (InputError("the Hessian is bad"), LayoutError("scales are too large")):
        method = Refusing(error=error)
        with pytest.raises(type(error), match=rf"layer 1: 'model\.layers\.1\.mlp\.up_proj.*gate_proj.*: {error}"):
            list(
                calibrate(
                    open_checkpoint(folders["llama"]), some_windows(), method, folder=tmp_path, threads=2,
                    targets=lambda _name: True,
                )
            )  # fmt: skip


def test_a_folder_that_cannot_be_written_is_an_output_error(folders: dict[str, Path], tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(OutputError, match="missing"):
        next(calibrate(
            open_checkpoint(folders["llama"]), some_windows(), Rounding(), folder=missing, threads=1, max_memory=0,
            targets=lambda _name: True,
        ))  # fmt: skip


def test_weights_that_are_no_targets_stay_and_are_shown(folders: dict[str, Path], tmp_path: Path) -> None:
    method, sites = Rounding(), list[Site]()
    method.quantize = lambda found, plain: sites.extend(found) or Rounding.quantize(method, found, plain)  # type: ignore
    results = list(calibrate(
        open_checkpoint(folders["llama"]), some_windows(), method, folder=tmp_path, threads=2,
        targets=lambda name: "k_proj" in name or "down" in name,
    ))  # fmt: skip
    assert [tuple(site.weights) for site in sites] == [("attn_k.weight",), ("ffn_down.weight",)] * 3
    assert [tuple(site.left) for site in sites] == [("attn_q.weight", "attn_v.weight"), ()] * 3
    assert all(len(result.quantized) == 2 for result in results)


def test_progress_counts_the_steps(folders: dict[str, Path], tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    run(folders["llama"], tmp_path, stop=1)
    run(folders["llama"], tmp_path, first_layer=1, progress=lambda done, total: told.append((done, total)))
    assert told[0] == (0, 8)
    assert told[-1] == (8, 8)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


PEAK = """
import sys
from pathlib import Path
import numpy as np
from quantpress.convert.calibration.site import SiteResult
from quantpress.convert.calibration.walk import calibrate
from quantpress.convert.open import open_checkpoint
from quantpress.pipelines.machine import save_memory

class Nothing:
    sequential, wants = True, frozenset({"hessian"})
    def quantize(self, sites, plain):
        return SiteResult({})

save_memory()  # as the command begins
windows = list(np.random.default_rng(0).integers(0, 320, (int(sys.argv[3]), 64)).astype(np.int32))
for result in calibrate(open_checkpoint(sys.argv[1]), windows, Nothing(), targets=lambda name: True, threads=2,
                        folder=Path(sys.argv[2]), max_memory=int(sys.argv[4])):
    pass
# not getrusage's ru_maxrss, which starts from the process that made this one
lines = Path("/proc/self/status").read_text().splitlines()
print(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")))
"""


def peak(folder: Path, spill: Path, samples: int, budget: int) -> int:
    spill.mkdir(exist_ok=True)
    command = [sys.executable, "-c", PEAK, str(folder), str(spill), str(samples), str(budget)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return int(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_peak_memory_depends_on_the_layer_and_the_budget_alone(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8}
    few = tiny_checkpoint(tmp_path / "few", "llama", **sizes, num_hidden_layers=2)
    many = tiny_checkpoint(tmp_path / "many", "llama", **sizes, num_hidden_layers=12)
    layer = 4 * (4 * 512 * 512 + 3 * 512 * 2048)  # 17 MB
    activations = 4 * 128 * 64 * (512 + 2048)  # 84 MB
    held = peak(few, tmp_path / "spill", 128, activations)
    assert held < 2 * layer + activations + (500 << 20)
    # ten more layers would be 168 MB and twice the tokens 84 MB; threads that meet otherwise are worth up to 30
    assert abs(peak(many, tmp_path / "spill", 256, activations) - held) < 80 << 20
