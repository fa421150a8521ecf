"""Defaults and refusals of the settings of `quantize`."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantpress.convert.open import open_checkpoint
from quantpress.pipelines.commands import quantize
from quantpress.pipelines.quantize_recipe import CALIBRATED, FORMATS, METHODS, Asked, Override, Recipe, fill_recipe
from quantpress.pipelines.quantize_stage import Quantize
from quantpress.quant.errors import UsageError
from quantpress.quant.grid import Grid
from tests.tiny import tiny_checkpoint

# method -> bits, group size, symmetric, format, scale type of a BF16 model, input bits
DEFAULTS = {
    "rtn": (4, 128, True, "gptq", "F16", None),
    "gptq": (4, 128, True, "gptq", "F16", None),
    "hqq": (4, 128, False, "gptq_v2", "F16", None),
    "awq": (4, 128, False, "awq", "F16", None),
    "smoothquant": (8, -1, True, "compressed-tensors", "BF16", 8),
    "llm_int8": (8, -1, True, "bitsandbytes", "F32", None),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_the_defaults_that_its_readers_want(method: str) -> None:
    recipe = fill_recipe(method, Asked(), "BF16")
    grid = recipe.grid
    found = (grid.bits, grid.group_size, grid.symmetric, recipe.format, grid.scale_type, recipe.input_bits)
    assert found == DEFAULTS[method]


def test_what_is_asked_for_wins() -> None:
    asked = Asked(bits=3, group_size=64, symmetric=False, scale_type="F32", clip_search=True, form="compressed-tensors")
    recipe = fill_recipe("rtn", asked, "BF16")
    assert recipe.grid == Grid(3, 64, False, "F32", True)
    assert recipe.format == "compressed-tensors"
    assert fill_recipe("rtn", Asked(symmetric=False), "F16").format == "gptq_v2"
    rounded = fill_recipe("gptq", Asked(input_bits=8), "F16")
    assert (rounded.format, rounded.grid.bits, rounded.grid.group_size) == ("compressed-tensors", 8, -1)


@pytest.mark.parametrize(
    ("method", "asked", "message"),
    [
        ("best", Asked(), "--method best"),
        ("rtn", Asked(bits=5), "bits 5"),
        ("rtn", Asked(group_size=0), "group size 0"),
        ("rtn", Asked(form="ggml"), "--format ggml"),
        ("rtn", Asked(input_bits=4), "--activation-bits 4"),
        ("rtn", Asked(scale_type="F8"), "scale type F8"),
        ("llm_int8", Asked(bits=4), "llm_int8"),
        ("llm_int8", Asked(form="gptq"), "llm_int8"),
    ],
)
def test_what_does_not_exist_is_refused(method: str, asked: Asked, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fill_recipe(method, asked, "F16")


def test_the_first_override_whose_pattern_is_found_wins() -> None:
    overrides = ("layers\\.0\\..*down_proj=bits:8,group_size:-1", "down_proj=bits:3,symmetric:no")
    recipe = fill_recipe("rtn", Asked(overrides=overrides), "F16")
    assert recipe.grid_of("model.layers.0.mlp.down_proj.weight") == Grid(8, -1)
    assert recipe.grid_of("model.layers.1.mlp.down_proj.weight") == Grid(3, 128, symmetric=False)
    assert recipe.grid_of("model.layers.1.mlp.up_proj.weight") == Grid(4, 128)
    assert recipe.form_of("x.up_proj.weight", (8, 96)).group_size == 96
    assert recipe.form_of("x.up_proj.weight", (8, 256)).group_size == 128


def test_a_pattern_may_hold_an_equals_sign_and_a_colon() -> None:
    assert Override.parse("(?:a=b)=bits:2") == Override("(?:a=b)", bits=2)


@pytest.mark.parametrize(
    "text", ["down_proj", "=bits:4", "x=bits", "x=bits:four", "x=color:4", "x=symmetric:maybe", "x="]
)
def test_an_override_of_another_form_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(UsageError, match="--override") as caught:
        Override.parse(text)
    assert repr(text) in str(caught.value)


def test_patterns_that_find_nothing_are_refused() -> None:
    names = ["model.layers.0.mlp.down_proj.weight"]
    Recipe("rtn", "gptq", Grid(), skip=("down",)).check_patterns(names)
    for recipe in (
        Recipe("rtn", "gptq", Grid(), skip=("down", "dwn_proj")),
        Recipe("rtn", "gptq", Grid(), overrides=(Override("dwn_proj", bits=8),)),
    ):
        with pytest.raises(UsageError, match=r"dwn_proj.*down_proj"):
            recipe.check_patterns(names)
    with pytest.raises(UsageError, match="not a regular expression"):
        Recipe("rtn", "gptq", Grid(), skip=("(",)).check_patterns(names)


def test_the_command_knows_the_same_methods_and_formats() -> None:
    assert quantize.METHODS == METHODS
    assert quantize.FORMATS == FORMATS
    assert set(METHODS) >= CALIBRATED


@pytest.mark.parametrize(("bits", "asked", "drift", "clip_search"), [
    (None, None, 1.0, True), (3, None, 1.0, True), (8, None, 0.0, False), (8, 1.0, 1.0, True), (4, 0.0, 0.0, False),
])  # fmt: skip
def test_gptq_makes_up_for_drift_by_default_but_at_8_bits(
    bits: int | None, asked: float | None, drift: float, clip_search: bool, tmp_path: Path
) -> None:
    source = open_checkpoint(tiny_checkpoint(tmp_path / "model", "llama"))
    filled = Quantize(output=tmp_path / "out", method="gptq", bits=bits, drift=asked, samples=4).resolved(source)
    assert (filled.drift, filled.clip_search) == (drift, clip_search)
