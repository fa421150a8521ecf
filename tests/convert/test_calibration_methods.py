"""Calibrated methods on a layer: folding changes no output, GPTQ beats RTN, and rules for tokens that are missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from quantpress.convert.calibration.folding import Folding
from quantpress.convert.calibration.layer_weights import LayerWeights, ModelWeights
from quantpress.convert.calibration.methods import AwqMethod, GptqMethod, SmoothMethod
from quantpress.convert.calibration.site import Site
from quantpress.convert.layer import Layer
from quantpress.convert.open import open_checkpoint
from quantpress.convert.preflight import preflight
from quantpress.convert.rope import angles
from quantpress.convert.traits import Place, places_of, traits_of
from quantpress.quant.errors import InputError
from quantpress.quant.grid import Grid, round_to_nearest
from quantpress.quant.qtensor import QuantizedTensor
from tests.families import decoders_one, decoders_two, experts, gpt_oss, latent
from tests.families.cases import write_checkpoint
from tests.tiny import tiny_case, tiny_checkpoint

ALL = (*decoders_one.CASES, *decoders_two.CASES, *experts.CASES, *gpt_oss.CASES, *latent.CASES)
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")


class _Case:
    """Layer 0 of a tiny model, the sites' inputs that a random hidden state gives, and its output."""

    def __init__(self, folder: Path, name: str, dtype: str = "float32") -> None:
        line = next((line for line in ALL if line.id == name), None)
        if line is not None:
            write_checkpoint(line, folder / name)
        else:
            case = tiny_case(name)
            tiny_checkpoint(folder / name, case.family, dtype=dtype, **case.options)
        checked = preflight(open_checkpoint(str(folder / name)))
        self.hyper, self.traits = checked.hyper, traits_of(checked.spec, checked.hyper)
        self.turns = None
        if self.traits.latent and self.hyper.rope is not None:  # such attention is nothing without positions
            self.turns = angles(self.hyper.rope, self.hyper.context, torch.arange(40), 40, torch.float32)
        self.loaded: LayerWeights = ModelWeights(checked).layer(0, torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        power = torch.where(torch.rand(self.hyper.hidden, generator=generator) < 0.1, 8.0, 1.0)
        self.hidden = torch.randn(2, 40, self.hyper.hidden, generator=generator) * power
        self.inputs: dict[str, torch.Tensor] = {}
        self.output = self.run(self.loaded.values, self.inputs)

    def run(self, values: Mapping[str, torch.Tensor], seen: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        def observe(slot: str, inputs: torch.Tensor) -> None:
            if seen is not None:
                seen[slot] = inputs.reshape(-1, inputs.shape[-1])

        return Layer(0, self.traits, self.hyper, values, observe=observe).run(self.hidden, self.turns, None)

    def sites(self, skip: str = "") -> list[Site]:
        return [self.site(place, skip) for place in places_of(self.traits) if any(slot != skip for slot in place.slots)]

    def site(self, place: Place, skip: str) -> Site:
        inputs = self.inputs[place.slots[0]].numpy() if place.slots[0] in self.inputs else None
        if inputs is None:  # no token came to the expert
            inputs = np.zeros((0, self.hyper.dims[place.columns]), np.float32)
        routers = tuple(slot for slot in place.slots if self.loaded.is_router(slot))
        weights = {slot: self.loaded.values[slot].numpy().copy() for slot in place.slots if slot not in routers}
        if not len(inputs) or place.expert >= 0:
            power = np.square(inputs).sum(0, dtype=np.float64)
            seen = {"mean_abs": np.abs(inputs).mean(0), "power": power} if len(inputs) else {"power": power}
            found = {slot: weight for slot, weight in weights.items() if slot != skip}
            return Site(
                0, found, {slot: slot for slot in found}, len(inputs), **seen, before=place.before,
                left={slot: weight for slot, weight in weights.items() if slot == skip},
                read_back=self.loaded.read_back,
            )  # fmt: skip
        return Site(
            0,
            {slot: weight for slot, weight in weights.items() if slot != skip},
            {slot: slot for slot in weights if slot != skip},
            len(inputs),
            hessian=inputs.T @ inputs / len(inputs),
            mean_abs=np.abs(inputs).mean(0),
            max_abs=np.abs(inputs).max(0),
            before=place.before,
            routers=routers,
            left={slot: weight for slot, weight in weights.items() if slot == skip},
            read_back=self.loaded.read_back,
        )

    def with_values(self, *changes: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        values = dict(self.loaded.values)
        for change in changes:
            values |= {slot: torch.from_numpy(np.asarray(array, np.float32)) for slot, array in change.items()}
        return values


FOLDED = {
    "llama": 4,  # GQA
    "llama-bias": 4,
    "llama-mha": 4,
    "gpt2": 3,  # no gate: the activation before down is not linear
    "gptneox": 3,
    "phi3": 4,  # fused q, k, v and fused gate and up
    "qwen3": 4,
    "gemma3": 4,  # norms are stored minus one
    "falcon-7b": 2,  # attention and MLP read one norm
    "falcon-40b": 3,  # each has its own
    "olmo-unclipped": 2,  # norms have no weights
    "olmo": 1,  # and values that are clamped are not linear in their projection
    "olmo2": 2,  # norms stand behind attention and MLP
    "mixtral": 7,  # one scale for all experts, one before each down projection
    "qwen2_moe": 8,
    "deepseek2": 6,
    "gpt_oss": 3,  # what experts multiply is clamped
}


@pytest.mark.parametrize("name", sorted(FOLDED))
def test_folding_any_scale_leaves_the_layer_as_it_was(tmp_path: Path, name: str) -> None:
    case = _Case(tmp_path, name)
    folding, rng, done = Folding(case.sites(), case.loaded.plain(), case.hyper.head_dim), np.random.default_rng(0), 0
    for group in reversed(folding.groups()):
        columns = case.inputs[next(slot for site in group for slot in site.weights)].shape[1]

        def search(tie: np.ndarray | None, columns: int = columns) -> np.ndarray:
            scale = np.exp(rng.uniform(-1, 1, columns)).astype(np.float32)
            return scale if tie is None else scale[: tie.max() + 1][tie]

        done += folding.fold(group, search) is not None
    assert done == FOLDED[name]
    found = case.run(case.with_values(folding.weights, folding.changed))
    # float32 sums of values that were scaled by up to e and back: a few ulps of the largest
    assert torch.allclose(found, case.output, rtol=1e-4, atol=1e-5 * float(case.output.abs().max()))


def test_norms_are_rounded_to_their_type_and_the_exact_quotient_is_the_scale(tmp_path: Path) -> None:
    case = _Case(tmp_path, "llama", "bfloat16")
    folding = Folding(case.sites(), case.loaded.plain(), case.hyper.head_dim)
    scale = folding.fold(folding.groups()[0], lambda tie: np.linspace(0.5, 2, case.hyper.hidden, dtype=np.float32))
    new = folding.changed["attn_norm.weight"]
    assert scale is not None
    assert (new.astype(ml_dtypes.bfloat16).astype(np.float32) == new).all()
    found = case.run(case.with_values(folding.weights, folding.changed))
    assert torch.allclose(found, case.output, rtol=1e-4, atol=1e-5 * float(case.output.abs().max()))


@pytest.mark.parametrize(
    ("skip", "read_too", "fed_by_it"),
    [
        ("ffn_up.weight", "ffn_gate.weight", "ffn_down.weight"),
        ("ffn_gate.weight", "ffn_up.weight", ""),
        ("attn_v.weight", "attn_q.weight", "attn_output.weight"),
        ("attn_k.weight", "attn_v.weight", ""),
    ],
)
def test_nothing_is_folded_where_a_linear_that_stays_reads_the_same_input(
    tmp_path: Path, skip: str, read_too: str, fed_by_it: str
) -> None:
    case = _Case(tmp_path, "llama-mha")
    result = AwqMethod(lambda _: Grid(4, 16, False, clip_search=True)).quantize(case.sites(skip), case.loaded.plain())
    assert f"{skip[: skip.index('_')]}_norm.weight" not in result.changed
    # nor into its rows; but the rows of others that are quantized may take a scale
    unfolded = {slot for slot, report in result.reports.items() if not report["folded"]}
    assert read_too in unfolded
    assert unfolded & {"attn_output.weight", "ffn_down.weight"} == ({fed_by_it} if fed_by_it else set())
    values = {slot: tensor.dequantize() for slot, tensor in result.quantized.items()}
    # int4 in groups of 16 with everything in its place; a scale that is lost changes the output by its own size
    difference = (case.run(case.with_values(values, result.changed)) - case.output).double().square().mean()
    assert float(difference) < 0.05 * float(case.output.double().square().mean())


def test_norm_weights_of_zero_stay_and_their_columns_are_not_scaled(tmp_path: Path) -> None:
    case = _Case(tmp_path, "llama")
    case.loaded.values["attn_norm.weight"][[1, 5]] = 0
    case.output = case.run(case.loaded.values, case.inputs)
    folding = Folding(case.sites(), case.loaded.plain(), case.hyper.head_dim)
    scale = folding.fold(folding.groups()[0], lambda tie: np.linspace(0.5, 2, case.hyper.hidden, dtype=np.float32))
    assert scale is not None
    assert (scale[[1, 5]] == 1).all()
    found = case.run(case.with_values(folding.weights, folding.changed))
    assert torch.allclose(found, case.output, rtol=1e-4, atol=1e-5 * float(case.output.abs().max()))


def test_norms_that_their_type_cannot_hold_once_scaled_stay(tmp_path: Path) -> None:
    case = _Case(tmp_path, "llama", "float16")
    folding = Folding(case.sites(), case.loaded.plain(), case.hyper.head_dim)
    wanted = np.ones(case.hyper.hidden, np.float32)
    wanted[[2, 3]] = 1e-9, 1e12  # beyond float16, and rounded to 0
    scale = folding.fold(folding.groups()[0], lambda tie: wanted)
    assert scale is not None
    assert (scale[[2, 3]] == 1).all()
    assert np.isfinite(folding.changed["attn_norm.weight"]).all()


def _error(case: _Case, quantized: Mapping[str, QuantizedTensor], changed: Mapping[str, np.ndarray]) -> float:
    values = case.with_values({slot: tensor.dequantize() for slot, tensor in quantized.items()}, changed)
    return float((case.run(values) - case.output).double().square().mean())


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_awq_has_a_smaller_error_at_the_output_of_the_layer_than_rtn(tmp_path: Path, name: str) -> None:
    case, grid = _Case(tmp_path, name), Grid(3, 16, False)
    sites = case.sites()
    rtn = {slot: round_to_nearest(weight, grid) for site in sites for slot, weight in site.weights.items()}
    method = AwqMethod(lambda _: replace(grid, clip_search=True), head_dim=case.hyper.head_dim)
    result = method.quantize(sites, case.loaded.plain())
    assert _error(case, result.quantized, result.changed) < 0.9 * _error(case, rtn, {})
    for threads in (2, 3):
        method.threads = threads
        other = method.quantize(case.sites(), case.loaded.plain())
        assert all((other.quantized[slot].codes == tensor.codes).all() for slot, tensor in result.quantized.items())
        assert all((other.changed[slot] == values).all() for slot, values in result.changed.items())


def test_smoothquant_changes_only_values_and_leaves_int8_near_the_layer(tmp_path: Path) -> None:
    case = _Case(tmp_path, "llama")
    result = SmoothMethod(lambda _: Grid(8, -1), head_dim=case.hyper.head_dim).quantize(
        case.sites(), case.loaded.plain()
    )
    assert all(report["folded"] for report in result.reports.values())
    power = float(case.output.double().square().mean())
    assert _error(case, result.quantized, result.changed) < 1e-4 * power  # int8 rows: 2^-8 of the range, squared


def test_gptq_loses_less_than_rtn_on_every_weight_and_reports_its_loss(tmp_path: Path) -> None:
    case = _Case(tmp_path, "llama-bias")
    for bits in (2, 3, 4, 8):
        grid = Grid(bits, 32)
        result = GptqMethod(lambda _, grid=grid: grid).quantize(case.sites(), {})
        for site in case.sites():
            assert site.hessian is not None
            for slot, weight in site.weights.items():
                losses = []
                for tensor in (result.quantized[slot], round_to_nearest(weight, grid)):
                    error = tensor.dequantize().astype(np.float64) - weight
                    losses.append(float(((error @ site.hessian.astype(np.float64)) * error).sum()))
                assert losses[0] <= losses[1]
                assert result.reports[slot]["loss"] == pytest.approx(losses[0], rel=1e-3)


def test_sites_with_few_tokens_say_so_and_without_any_are_rounded_to_nearest(tmp_path: Path) -> None:
    case, grid = _Case(tmp_path, "llama"), Grid(4, 16)
    site = case.sites()[0]
    few = GptqMethod(lambda _: grid).quantize([replace(site, tokens=7)], {})
    assert case.hyper.hidden == 64
    assert few.reports["attn_q.weight"]["few_tokens"] is True
    assert (
        "few_tokens" not in GptqMethod(lambda _: grid).quantize([replace(site, tokens=8)], {}).reports["attn_q.weight"]
    )
    none = GptqMethod(lambda _: grid).quantize([replace(site, tokens=0, hessian=np.zeros((64, 64), np.float32))], {})
    assert none.reports["attn_q.weight"] == {"tokens": 0}
    wanted = round_to_nearest(site.weights["attn_q.weight"], grid)
    assert (none.quantized["attn_q.weight"].codes == wanted.codes).all()


def test_statistics_that_were_not_gathered_are_asked_for(tmp_path: Path) -> None:
    case, grid = _Case(tmp_path, "llama"), Grid(4, 16)
    bare = [replace(site, hessian=None, mean_abs=None, max_abs=None) for site in case.sites()]
    for method in (GptqMethod(lambda _: grid), AwqMethod(lambda _: grid), SmoothMethod(lambda _: grid)):
        with pytest.raises(InputError, match="needs the"):
            method.quantize(bare, case.loaded.plain())
