"""Sums of squared inputs against hooks in transformers' own models, in float64, and against the decoder's inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from quantpress.convert.calibration.hessian import Statistics, power_of
from quantpress.convert.calibration.powers import Powers, measure_powers
from quantpress.convert.calibration.site import Site, SiteResult
from quantpress.convert.calibration.walk import calibrate
from quantpress.convert.calibration.workers import Workers
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.open import open_checkpoint
from quantpress.convert.preflight import preflight
from quantpress.quant.errors import InputError
from quantpress.quant.grid import Grid, round_to_nearest
from tests.tiny import tiny_case, tiny_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")

Make = Callable[[str], Path]
LENGTH = 48  # longer than every window and training length of the tiny models, as in test_model.py
# the decoder's values are within 5e-5 of transformers' (test_model.py); a mean of squares doubles that
TOLERANCE = 1e-4
CASES = (
    "llama", "llama-bias", "llama-tied", "llama-bare", "mistral-window", "qwen2", "qwen3-head_dim", "gemma", "gemma2",
    "gemma3", "gemma3-vision", "phi3", "phi3-longrope", "gpt2", "gpt2-inner", "gptneox", "gptneox-sequential",
    "gptneox-tied",
)  # fmt: skip


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


def some_windows(samples: int = 3, length: int = LENGTH) -> list[NDArray[np.int32]]:
    # the first ids are special: Gemma 3 with images would look for one
    return list(np.random.default_rng(1).integers(4, 320, (samples, length)).astype(np.int32))


def measured(source: Path | Checkpoint, folder: Path, **options: Any) -> Powers:
    checkpoint = open_checkpoint(source) if isinstance(source, Path) else source
    options = {"threads": 1, **options}
    return measure_powers(checkpoint, options.pop("windows", None) or some_windows(), folder=folder, **options)


def theirs(folder: Path, windows: list[NDArray[np.int32]], wide: Any) -> dict[str, NDArray[np.float64]]:
    """Sums of squares of what every linear module of transformers' model is given, by the module's name."""
    from transformers import AutoModelForCausalLM, Conv1D, Gemma3ForConditionalGeneration, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    vision = "vision" in folder.name
    loader = Gemma3ForConditionalGeneration if vision else AutoModelForCausalLM
    model = loader.from_pretrained(folder, attn_implementation="eager", dtype=wide).eval()
    sums: dict[str, NDArray[np.float64]] = {}

    def hook(name: str) -> Callable[..., None]:
        def look(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            values = inputs[0].detach().double().flatten(0, -2)
            sums[name] = sums.get(name, 0) + values.square().sum(0).numpy()

        return look

    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and "vision" not in name:
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        model(torch.from_numpy(np.stack(windows).astype(np.int64)))
    return sums


@pytest.mark.parametrize("name", CASES)
def test_sums_are_those_of_the_inputs_of_transformers_linears(name: str, make: Make, tmp_path: Path) -> None:
    folder, windows = make(name), some_windows()
    checked = preflight(open_checkpoint(folder))
    found = measured(folder, tmp_path, windows=windows)
    assert found.tokens == 3 * LENGTH
    # gemma, gpt2's "erf" and others compute parts in float32 whatever the type, so float32 is as good as float64 here
    seen = theirs(folder, windows, torch.float32)
    names = {row.hf.format(layer=layer): row.gguf.format(layer=layer) for row, layer, _ in checked.bindings}
    heads = {name: values for name, values in seen.items() if name.rpartition(".")[2] in ("lm_head", "embed_out")}
    assert len(heads) == 1
    wanted = {"head": next(iter(heads.values()))}
    for module, values in seen.items():
        match = [gguf for hf, gguf in names.items() if f"{module}.weight".endswith(hf) and "blk." in gguf]
        if module not in heads and match:
            wanted[match[0]] = values
    head = next(weight for weight in found.sums if not weight.startswith("blk."))
    assert {"head", *found.sums} - {head} == set(wanted)
    for weight, values in found.sums.items():
        exact = wanted["head" if weight == head else weight]
        np.testing.assert_allclose(values[0], exact, rtol=TOLERANCE, atol=TOLERANCE * values.mean() * 1e-2)


@pytest.mark.parametrize(
    ("name", "head"),
    [("llama", "output.weight"), ("llama-tied", "token_embd.weight"), ("gemma2", "token_embd.weight"),
     ("gptneox-tied", "output.weight"), ("gpt2", "token_embd.weight")],
)  # fmt: skip
def test_the_head_goes_by_the_name_of_the_tensor_that_gguf_has_for_it(
    name: str, head: str, make: Make, tmp_path: Path
) -> None:
    assert [each for each in measured(make(name), tmp_path).sums if not each.startswith("blk.")] == [head]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gptneox", "gemma3"])
def test_threads_and_budget_change_no_bit(name: str, make: Make, tmp_path: Path) -> None:
    windows = some_windows(30)
    first = measured(make(name), tmp_path, windows=windows)
    for options in ({"threads": 3}, {"max_memory": 0}, {"max_memory": 100_000, "threads": 2}):
        again = measured(make(name), tmp_path, windows=windows, **options)
        assert set(first.sums) == set(again.sums)
        for weight, values in first.sums.items():
            np.testing.assert_array_equal(values, again.sums[weight])
    assert list(tmp_path.iterdir()) == [], "activations on the disk are removed"


@dataclass
class Rounding:
    """Rounds to 8 bits some weights and keeps nothing."""

    sequential: bool = True
    wants: frozenset[str] = frozenset({"max_abs"})
    seen: list[Site] = field(default_factory=list)

    def quantize(self, sites: list[Site], _plain: Any) -> SiteResult:
        self.seen += sites
        return SiteResult(
            {slot: round_to_nearest(weight, Grid(2, -1)) for site in sites for slot, weight in site.weights.items()}
        )


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "gptneox"])
def test_a_walk_without_targets_measures_the_same(name: str, make: Make, tmp_path: Path) -> None:
    checkpoint, windows = open_checkpoint(make(name)), some_windows()
    options: dict[str, Any] = {"targets": lambda _name: False, "threads": 1, "folder": tmp_path, "powers": True}
    results = list(calibrate(checkpoint, windows, Rounding(), **options))
    found = {weight: values for result in results for weight, values in result.powers.items()}
    alone = measured(checkpoint, tmp_path).sums
    assert set(found) == set(alone)
    for weight, values in found.items():  # products of other shapes: sums in another order
        np.testing.assert_allclose(values, alone[weight], rtol=TOLERANCE)
    assert not any(result.quantized for result in results)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_walk_measures_what_the_weights_before_have_become(name: str, make: Make, tmp_path: Path) -> None:
    """A checkpoint that is rounded before gives what the walk sees while it rounds."""
    checkpoint, windows = open_checkpoint(make(name)), some_windows()
    options: dict[str, Any] = {"targets": lambda _name: True, "threads": 1, "folder": tmp_path}
    method = Rounding()
    results = list(calibrate(checkpoint, windows, method, powers=True, **options))
    assert all(site.power is None for site in method.seen), "the method did not want it"
    codes = {weight: codes for result in results for weight, codes in result.quantized.items()}
    tensors = {}
    for weight, tensor in checkpoint.tensors.items():
        if weight in codes:
            values = codes[weight].dequantize()
            values = np.ascontiguousarray(values.T if values.shape != tensor.shape or name == "gpt2" else values)
            tensor = replace(tensor, read_rows=lambda start, stop, values=values: values[start:stop])
        tensors[weight] = tensor
    rounded = measured(replace(checkpoint, tensors=tensors), tmp_path, windows=windows).sums
    plain = measured(checkpoint, tmp_path, windows=windows).sums
    found = {weight: values for result in results for weight, values in result.powers.items()}
    assert set(found) == set(rounded)
    for weight, values in found.items():
        np.testing.assert_allclose(values, rounded[weight], rtol=TOLERANCE)
    last = next(weight for weight in found if not weight.startswith("blk."))
    assert np.abs(found[last] / plain[last] - 1).max() > 0.05, "two bits would have shown"


def test_without_being_asked_a_walk_measures_nothing(make: Make, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make("llama"))
    results = calibrate(checkpoint, some_windows(), Rounding(), targets=lambda _name: True, threads=1, folder=tmp_path)
    assert all(result.powers == {} for result in results)


def test_a_method_may_want_the_power_itself(make: Make, tmp_path: Path) -> None:
    method = Rounding(wants=frozenset({"power"}))
    checkpoint = open_checkpoint(make("llama"))
    options: dict[str, Any] = {"targets": lambda _name: True, "threads": 1, "folder": tmp_path}
    results = list(calibrate(checkpoint, some_windows(), method, powers=True, **options))
    for site in method.seen:
        assert site.power is not None
        for slot in site.weights:
            np.testing.assert_array_equal(site.power[None], results[site.layer].powers[f"blk.{site.layer}.{slot}"])


def test_the_power_of_columns_is_summed_in_float64() -> None:
    values = torch.ones(4, 3)
    values[1] = 2.0**-20
    values[2] = 2.0**-20
    # 1 + 2^-40 + 2^-40 + 1 is no float32
    np.testing.assert_array_equal(power_of(values), 2 + 2.0**-39)
    statistics = Statistics(frozenset({"power"}), 3, torch.device("cpu"))
    with Workers(1) as workers:
        submit = partial(workers.submit, "hessian")
        for part in values.split(2):
            statistics.add(statistics.measure(part), submit)
        np.testing.assert_array_equal(statistics.finish(submit)["power"], 2 + 2.0**-39)


def test_bfloat16_products_give_nearly_the_same(make: Make, tmp_path: Path) -> None:
    exact = measured(make("llama"), tmp_path).sums
    found = measured(make("llama"), tmp_path, precision="bf16").sums
    for weight, values in found.items():
        # inputs and weights of three layers are rounded by 2^-9 each, and random errors of about as much are squared
        np.testing.assert_allclose(values, exact[weight], rtol=0.05)
    assert any((values != exact[weight]).any() for weight, values in found.items())


@pytest.mark.parametrize(
    ("place", "said"), [("model.layers.1.mlp.up_proj.weight", "layer 1: 'blk.1.ffn_down.weight'"),
                        ("model.norm.weight", "output.weight")],
)  # fmt: skip
@pytest.mark.parametrize("walked", [False, True])
def test_inputs_that_are_not_finite_are_refused_by_name(
    place: str, said: str, walked: bool, make: Make, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(make("llama"))
    wrong = checkpoint.tensors[place].read().copy()
    wrong.reshape(-1)[0] = np.inf
    broken = replace(checkpoint.tensors[place], read_rows=lambda start, stop: wrong[start:stop])
    checkpoint = replace(checkpoint, tensors={**checkpoint.tensors, place: broken})
    run: Callable[[], Any] = partial(measured, checkpoint, tmp_path)
    if walked:
        options: dict[str, Any] = {"targets": lambda _name: False, "threads": 1, "folder": tmp_path, "powers": True}
        run = partial(list, calibrate(checkpoint, some_windows(), Rounding(), **options))
        said = said.replace("'blk.1.ffn_down.weight'", "ffn_down.weight")
    with pytest.raises(InputError, match=f"{said}.*: its inputs are not finite"):
        run()


@pytest.mark.parametrize("windows", [[], [np.zeros(4, np.int32), np.zeros(5, np.int32)]])
def test_windows_must_be_of_one_length(windows: list[NDArray[np.int32]], make: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one window, and all of the same length"):
        measure_powers(open_checkpoint(make("llama")), windows, threads=1, folder=tmp_path)
