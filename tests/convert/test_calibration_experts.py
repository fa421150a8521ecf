"""Calibration where a router sends tokens to experts, by hooks in transformers' own models and in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from quantpress.convert.arch.spec import Role
from quantpress.convert.calibration import rounds
from quantpress.convert.calibration.methods import AwqMethod, GptqMethod, SmoothMethod
from quantpress.convert.calibration.powers import measure_powers
from quantpress.convert.calibration.walk import calibrate
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.model import Decoder
from quantpress.convert.open import open_checkpoint
from quantpress.convert.preflight import preflight
from quantpress.convert.weights import CheckpointWeights
from quantpress.quant.floats import to_float32
from quantpress.quant.grid import Grid, round_to_nearest
from tests.convert.test_calibration_walk import Recorder, check_site, decoder_of, walk
from tests.families import decoders_one, decoders_two, experts, gpt_oss, latent
from tests.families.cases import write_checkpoint

ALL = (*decoders_one.CASES, *decoders_two.CASES, *experts.CASES, *gpt_oss.CASES, *latent.CASES)
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")

Make = Callable[[str], Path]
GRID = Grid(4, 16, False)
MODELS = ("mixtral", "qwen2_moe", "qwen2_moe-dense-layers")
# what else layers may be like: shared norms, none, behind the sums, clamped values, a latent, clamped experts
OTHERS = ("falcon-7b", "olmo", "olmo2", "opt-350m", "bloom", "deepseek2", "gpt_oss", "cohere", "granite")


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Gives a function that makes the checkpoint of a case once."""
    made: dict[str, Path] = {}

    def one(name: str) -> Path:
        if name not in made:
            case = next(case for case in ALL if case.id == name)
            made[name] = write_checkpoint(case, tmp_path_factory.mktemp("families") / name)
        return made[name]

    return one


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Keeps tiny products from waiting for threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def some_windows(samples: int = 3, length: int = 24) -> list[NDArray[np.int32]]:
    return list(np.random.default_rng(1).integers(4, 320, (samples, length)).astype(np.int32))


def linear_names(checkpoint: Checkpoint) -> set[str]:
    bindings = preflight(checkpoint).bindings
    return {tensor.name for row, layer, tensor in bindings if row.role is Role.LINEAR and layer >= 0}


@pytest.mark.parametrize("name", [*MODELS, *OTHERS])
def test_inputs_are_those_of_the_decoder_when_codes_are_exact(name: str, make: Make, tmp_path: Path) -> None:
    """The decoder is proved against transformers for these same models, see tests/families."""
    checkpoint, method, windows = open_checkpoint(make(name)), Recorder(), some_windows()
    walk(checkpoint, method, tmp_path, windows, targets=linear_names(checkpoint).__contains__)
    decoder = decoder_of(checkpoint)
    seen: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        hidden = decoder.embed(torch.from_numpy(np.stack(windows).astype(np.int64)))
        for layer in range(decoder.hyper.layers):
            seen.clear()
            hidden = decoder.run_layer(layer, hidden, observe=lambda slot, values: seen.update({slot: values.clone()}))
            sites = [site for (number, _), site in method.seen.items() if number == layer]
            missed = {slot for site in sites if not site.tokens for slot in site.weights}
            chosen = {slot for site in sites for slot in site.weights}
            assert chosen | {slot for slot in seen if "_inp" in slot} == {*seen} | missed
            for site in sites:
                for slot in set(site.weights) - missed:
                    check_site(site, seen[slot].reshape(-1, seen[slot].shape[-1]).double().numpy())


def theirs(folder: Path, windows: Sequence[NDArray[np.int32]]) -> dict[str, NDArray[np.float64]]:
    """What each expert of transformers' model is given, by layer and expert: (n, hidden) and (n, inner) float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    model.set_experts_implementation("eager")
    seen: dict[str, NDArray[np.float64]] = {}

    def watch(number: int, block: Any) -> None:
        def before(module: Any, inputs: Any) -> None:
            hidden, chosen, _ = inputs
            for expert in range(module.num_experts):
                tokens = (chosen == expert).any(-1).nonzero()[:, 0]
                gate, up = (hidden[tokens] @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
                seen[f"{number} up {expert}"] = hidden[tokens].numpy()
                seen[f"{number} down {expert}"] = (torch.nn.functional.silu(gate) * up).numpy()

        block.experts.register_forward_pre_hook(before)
        if hasattr(block, "shared_expert"):
            block.shared_expert.down_proj.register_forward_pre_hook(
                lambda _module, inputs: seen.update({f"{number} shared": inputs[0].flatten(0, -2).numpy()})
            )

    for number, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "experts"):
            watch(number, layer.mlp)
    with torch.no_grad():
        model(torch.from_numpy(np.stack(windows).astype(np.int64)))
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_hessians_and_powers_of_experts_are_those_of_transformers_in_float64(
    name: str, make: Make, tmp_path: Path
) -> None:
    checkpoint, windows = open_checkpoint(make(name)), some_windows()
    method = Recorder(wants=frozenset({"hessian", "max_abs"}))
    walk(checkpoint, method, tmp_path / "walk", windows, targets=lambda name: "expert" in name and "gate." not in name)
    powers = measure_powers(checkpoint, windows, threads=1, folder=tmp_path)
    wanted, checked = theirs(make(name), windows), 0
    for (layer, slots), site in method.seen.items():
        stem, _, expert = slots[0].removesuffix(".weight").partition(".")
        kind = f"{layer} {'down' if 'down' in stem else 'up'} {expert}" if expert else f"{layer} shared"
        if kind not in wanted or (not expert and "down" not in stem):
            continue
        inputs, checked = wanted[kind], checked + 1
        assert site.tokens == len(inputs)
        if not len(inputs):
            assert site.hessian is None
            continue
        # the decoder's float32 values are within 5e-5 of these; products of two double that
        scale = np.abs(inputs).max() ** 2
        np.testing.assert_allclose(site.hessian, inputs.T @ inputs / len(inputs), rtol=2e-4, atol=2e-5 * scale)
        name_ = f"blk.{layer}.{stem}.weight"
        row = int(expert or 0)
        assert powers.counts[name_][row] == len(inputs)
        power = np.square(inputs).sum(0)
        np.testing.assert_allclose(powers.sums[name_][row], power, rtol=2e-4, atol=2e-4 * power.mean())
    assert checked >= 4 * 2  # one layer with four experts


def gptq(**options: Any) -> GptqMethod:
    return GptqMethod(lambda _name: GRID, **options)


def codes_of(checkpoint: Checkpoint, folder: Path, method: Any, **options: Any) -> dict[str, Any]:
    options = {"threads": 1, "targets": linear_names(checkpoint).__contains__, **options}
    folder.mkdir(exist_ok=True)
    found: dict[str, Any] = {}
    for result in calibrate(checkpoint, some_windows(8, 64), method, folder=folder, **options):
        found |= {name: (codes.codes, codes.scale) for name, codes in result.quantized.items()}
        found |= {f"changed {name}": (values,) for name, values in result.changed.items()}
        found |= {f"powers {name}": (values,) for name, values in result.powers.items()}
        found |= {f"tokens {name}": (np.array(report["tokens"]),) for name, report in result.reports.items()}
    return found


@pytest.mark.parametrize("drift", [0.0, 1.0])
def test_rounds_threads_and_budget_change_no_bit(
    drift: float, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(make("qwen2_moe"))
    first = codes_of(checkpoint, tmp_path / "a", gptq(drift=drift), powers=True)
    assert any("experts.3.down_proj" in name for name in first)
    for number, options in enumerate(({"threads": 3}, {"max_memory": 0, "threads": 2}, {"max_memory": 50_000})):
        again = codes_of(checkpoint, tmp_path / f"b{number}", gptq(drift=drift), powers=True, **options)
        same(first, again)
    monkeypatch.setattr(rounds, "STATISTICS_BYTES", 64 * 64 * 4 * 3)  # three experts at a time
    same(first, codes_of(checkpoint, tmp_path / "c", gptq(drift=drift), powers=True))


def same(first: dict[str, Any], again: dict[str, Any]) -> None:
    assert set(first) == set(again)
    for name, values in first.items():
        for one, other in zip(values, again[name], strict=True):
            np.testing.assert_array_equal(one, other, err_msg=name)


METHODS: dict[str, Callable[[Callable[[str], Grid], int], Any]] = {
    "gptq": lambda grid_of, _size: GptqMethod(grid_of),
    "drift": lambda grid_of, _size: GptqMethod(grid_of, drift=1.0),
    "awq": lambda grid_of, size: AwqMethod(grid_of, head_dim=size),
    "smooth": lambda grid_of, size: SmoothMethod(grid_of, head_dim=size),
}


def logits(checkpoint: Checkpoint, values: dict[str, NDArray[np.float32]]) -> torch.Tensor:
    """What the decoder gives for another text with some tensors replaced."""
    checked = preflight(checkpoint)
    stored = {(row.slot, layer): tensor.name for row, layer, tensor in checked.bindings}
    weights = CheckpointWeights(checkpoint, checked.spec, checked.hyper)

    def weight(slot: str, layer: int) -> torch.Tensor | None:
        changed = values.get(stored.get((slot, layer), ""))
        return weights(slot, layer) if changed is None else torch.from_numpy(np.asarray(changed, np.float32))

    tokens = np.random.default_rng(9).integers(4, 320, (2, 48))
    with torch.no_grad():
        return Decoder(weight, checked.spec, checked.hyper).logits(torch.from_numpy(tokens)).log_softmax(-1).double()


def divergence(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.exp() * (one - other)).sum(-1).mean())


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_methods_lose_less_than_rounding_and_keep_the_mixture(name: str, make: Make, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make(name))
    checked = preflight(checkpoint)
    names = linear_names(checkpoint)
    plain = {tensor.name: to_float32(tensor.read()) for _, _, tensor in checked.bindings}
    exact = logits(checkpoint, {})
    rounded = divergence(exact, logits(checkpoint, {n: round_to_nearest(plain[n], GRID).dequantize() for n in names}))
    losses = {}
    for method, make_method in METHODS.items():
        bits = Grid(8, -1) if method == "smooth" else GRID
        values: dict[str, NDArray[np.float32]] = {}
        found = calibrate(
            checkpoint, some_windows(16, 64), make_method(lambda _name, bits=bits: bits, checked.hyper.head_dim),
            targets=names.__contains__, threads=1, folder=tmp_path,
        )  # fmt: skip
        for result in found:
            values |= {name: codes.dequantize() for name, codes in result.quantized.items()}
            values |= result.changed
            assert not any("gate_inp" in report or "mlp.gate.weight" in report for report in result.reports)
        assert names <= set(values), "every expert, reached or not"
        losses[method] = divergence(exact, logits(checkpoint, values))
    # tiny random models: what GPTQ and AWQ gain is small and sure, int8 of whole rows costs a hundredth
    assert losses["gptq"] < rounded
    assert losses["drift"] < rounded
    assert losses["awq"] < 1.1 * rounded
    assert losses["smooth"] < 0.1 * rounded, f"{losses} against {rounded}"


def test_experts_that_no_token_reaches_are_rounded_and_said_to_be(make: Make, tmp_path: Path) -> None:
    checkpoint, window = open_checkpoint(make("mixtral")), np.full(4, 7, np.int32)
    names = linear_names(checkpoint)
    for method in (GptqMethod(lambda _name: GRID), AwqMethod(lambda _name: GRID)):
        (result, *_) = calibrate(
            checkpoint, [window], method, targets=names.__contains__, threads=1, folder=tmp_path
        )  # fmt: skip
        seen = {name: report["tokens"] for name, report in result.reports.items() if ".experts." in name}
        missed = [name for name, tokens in seen.items() if not tokens]
        assert set(seen.values()) == {0, 4}, "one token four times, to two of four experts"
        assert len(missed) == 6
        if method.sequential:
            for name in missed:
                plain = round_to_nearest(to_float32(checkpoint.tensors[name].read()), GRID)
                np.testing.assert_array_equal(result.quantized[name].codes, plain.codes)
