"""Ranges of inputs against transformers' own modules, and static int8 models that are made with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from quantpress.convert.calibration.ranges import binned, central_range, lost_share
from quantpress.convert.onnx.export import plan_onnx
from quantpress.convert.onnx.options import OnnxOptions
from quantpress.convert.open import open_checkpoint
from quantpress.convert.preflight import preflight
from quantpress.pipelines.onnx_calibration import (
    RangeText,
    calibrated_ranges,
    input_ranges,
    planned_ranges,
)
from quantpress.quant.errors import InputError, UsageError
from tests.tiny import tiny_case, tiny_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")

Array = NDArray[Any]
Make = Callable[[str], Path]
# sequential and parallel residuals, fused q, k, v and gate, Conv1D, windows, post-norms
CASES = ("llama-bias", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gptneox", "mistral-window")


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Gives a function that makes the checkpoint of a case once."""
    made: dict[str, Path] = {}

    def one(name: str) -> Path:
        if name not in made:
            case = tiny_case(name)
            made[name] = tiny_checkpoint(tmp_path_factory.mktemp("tiny") / name, case.family, **case.options)
        return made[name]

    return one


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Keeps tiny products from waiting for threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _windows(samples: int = 5, length: int = 24, seed: int = 1) -> list[NDArray[np.int32]]:
    return list(np.random.default_rng(seed).integers(4, 320, (samples, length)).astype(np.int32))


def _seen_by_transformers(folder: Path, windows: list[NDArray[np.int32]]) -> Mapping[str, Array]:
    """Gives the input of every linear, by the name of its weight, (tokens, K)."""
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    seen: dict[str, Array] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D):

            def note(_module: Any, inputs: Any, name: str = name) -> None:
                seen[f"{name}.weight"] = inputs[0].flatten(0, -2).numpy().copy()

            module.register_forward_pre_hook(note)
    with torch.no_grad():
        model(torch.from_numpy(np.stack(windows).astype(np.int64)))
    return seen


def _by_name(folder: Path, ranges: Mapping[tuple[str, int], tuple[float, float]]) -> dict[str, tuple[float, float]]:
    bindings = preflight(open_checkpoint(folder)).bindings
    names = {(row.slot, layer): tensor.name for row, layer, tensor in bindings}
    return {names[key]: value for key, value in ranges.items()}


@pytest.mark.parametrize("case", CASES)
def test_ranges_are_those_that_transformers_modules_see(case: str, make: Make) -> None:
    folder, windows = make(case), _windows()
    found = _by_name(folder, input_ranges(open_checkpoint(folder), windows, threads=1))
    seen = _seen_by_transformers(folder, windows)
    heads = {"lm_head.weight", "embed_out.weight"}
    assert set(found) == set(seen) - heads
    for name, (least, greatest) in found.items():
        # float32 in another order of operations; the models' logits agree to 1e-5 of their size (test_model.py)
        size = np.abs(seen[name]).max()
        assert abs(least - seen[name].min()) <= 2e-5 * size, name
        assert abs(greatest - seen[name].max()) <= 2e-5 * size, name


def test_ranges_are_the_same_for_any_threads_and_memory(make: Make, tmp_path: Path) -> None:
    source, windows = open_checkpoint(make("llama-bias")), _windows(samples=50, length=60)  # more tokens than a slice
    first = input_ranges(source, windows, threads=1, percentile=99.0)
    assert input_ranges(source, windows, threads=3, percentile=99.0, folder=tmp_path) == first
    assert input_ranges(source, windows, threads=2, percentile=99.0, max_memory=1000) == first
    assert not list(tmp_path.iterdir())


def test_linears_that_read_the_same_values_have_the_same_range(make: Make) -> None:
    ranges = input_ranges(open_checkpoint(make("llama-bias")), _windows(), threads=1)
    for layer in range(3):
        assert ranges["attn_q.weight", layer] == ranges["attn_k.weight", layer] == ranges["attn_v.weight", layer]
        assert ranges["ffn_gate.weight", layer] == ranges["ffn_up.weight", layer]
    assert len(set(ranges.values())) == 12


@pytest.mark.parametrize("percentile", [99.9, 99.0, 90.0])
def test_a_percentile_leaves_out_as_many_values_below_as_above(percentile: float, make: Make) -> None:
    folder, windows = make("llama-bias"), _windows(samples=20)
    found = _by_name(folder, input_ranges(open_checkpoint(folder), windows, threads=1, percentile=percentile))
    seen = _seen_by_transformers(folder, windows)
    assert set(found) <= set(seen)
    cut = (100 - percentile) / 2
    for name, (least, greatest) in found.items():
        values = seen[name].astype(np.float64)
        assert ((values >= least) & (values <= greatest)).mean() >= percentile / 100
        for end, place, kind in ((least, cut, "lower"), (greatest, 100 - cut, "higher")):
            quantile = np.percentile(values, place, method=kind)
            assert abs(end - quantile) <= 1.01 * 2.0**-7 * abs(quantile)  # the width of a bin


def test_the_central_range_of_all_values_is_theirs() -> None:
    random = np.random.default_rng(0)
    for values in (random.normal(size=999), random.uniform(1, 5, 999), -random.uniform(1, 5, 999), np.zeros(7)):
        given = values.astype(np.float32)
        ends = np.array([given.min(), given.max()], np.float32)
        assert central_range(binned(torch.from_numpy(given)), ends, 100.0) == (given.min(), given.max())


@pytest.mark.parametrize("sign", [1, -1])
def test_an_outlier_falls_out_of_a_percentile(sign: int) -> None:
    values = np.append(np.linspace(-1, 1, 9999), sign * 1e30).astype(np.float32)
    ends = np.array([values.min(), values.max()], np.float32)
    least, greatest = central_range(binned(torch.from_numpy(values)), ends, 99.9)
    assert -1 <= least <= -0.99
    assert 0.99 <= greatest <= 1.0


def test_the_lost_share_is_what_rounds_to_zero() -> None:
    random = np.random.default_rng(0)
    for values, low, high in (
        (random.normal(size=20000), -5.0, 5.0), (random.standard_cauchy(20000), -3000.0, 2000.0),
        (np.maximum(random.normal(size=20000), 0), 0.5, 200.0), (np.zeros(5), -1.0, 1.0),
    ):  # fmt: skip
        given = values.astype(np.float32)
        step = (high - min(low, 0.0)) / 255
        nonzero = given[given != 0]
        wanted = (np.rint(nonzero / step) == 0).mean() if nonzero.size else 0.0
        found = lost_share(binned(torch.from_numpy(given)), low, high)
        assert wanted - 2.0**-7 <= found <= wanted  # what is in the bin of the limit counts as not lost


def test_a_linear_with_a_few_great_inputs_is_left_out(make: Make, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "outliers"
    folder.mkdir()
    for file in make("llama-bias").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    up = tensors["model.layers.1.mlp.up_proj.weight"].copy()
    up[7] *= 3000  # one column of the next linear's input
    down = tensors[name].copy()
    down[:, 7] /= 3000
    save_file(
        {**tensors, "model.layers.1.mlp.up_proj.weight": up, name: down}, folder / "model.safetensors",
        metadata={"format": "pt"},
    )  # fmt: skip
    text = tmp_path / "text.txt"
    text.write_text("The press takes a model and gives a file. " * 40, encoding="utf-8")
    source = open_checkpoint(folder)
    found = calibrated_ranges(source, RangeText(calibration=text, samples=4, sequence_length=32), threads=1)
    assert set(planned_ranges(preflight(source))) - set(found.ranges) == {("ffn_down.weight", 1)}
    assert found.record["inputs_not_rounded"] == [name]
    assert f"1 of 21 linears are weight-only, first '{name}'" in found.note
    options = OnnxOptions(precision="int8", int8="static")
    groups = plan_onnx(source, preflight(source), options, ranges=found.ranges).groups
    stored = {group.source: group for group, _ in groups}
    assert (stored[name].label, stored[name].note) == ("INT8 g32", "the range of its inputs is too wide for 8 bits")
    assert stored[name.replace("layers.1", "layers.2")].label == "INT8"


def test_a_weight_that_is_not_finite_is_named(make: Make, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in make("llama-bias").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][2, 3] = np.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"model.safetensors: tensor '{name}': 1 values are NaN or infinite"):
        input_ranges(open_checkpoint(folder), _windows(), threads=1, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]  # nothing is left behind


@pytest.mark.parametrize("percentile", [50.0, 100.1, -1.0, float("nan")])
def test_a_percentile_that_is_none_is_refused(percentile: float, make: Make) -> None:
    with pytest.raises(UsageError, match="must be above 50"):
        RangeText(percentile=percentile)
    with pytest.raises(UsageError, match="must be above 50"):
        input_ranges(open_checkpoint(make("llama-bias")), _windows(), threads=1, percentile=percentile)


def test_a_text_is_read_cut_and_recorded(make: Make, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The press takes a model and gives a file. " * 40, encoding="utf-8")
    source = open_checkpoint(make("llama-bias"))
    choice = RangeText(calibration=text, samples=4, sequence_length=32, seed=3, percentile=99.5)
    found = calibrated_ranges(source, choice, threads=2)
    assert found.record["samples"] == 4
    assert found.record["percentile"] == 99.5
    assert found.record["tokens"] == 128
    assert set(found.ranges) == set(planned_ranges(preflight(source)))
    assert json.loads(json.dumps(found.record)) == found.record


def test_progress_is_told(make: Make) -> None:
    told: list[tuple[int, int]] = []
    input_ranges(
        open_checkpoint(make("llama-bias")), _windows(), threads=1,
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert told[-1] == (12, 12)
    assert told == sorted(told)
