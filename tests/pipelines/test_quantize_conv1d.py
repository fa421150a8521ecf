"""GPT-2's layers are Conv1D; formats whose readers take `nn.Linear` only are refused for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quantpress.convert.open import open_checkpoint
from quantpress.pipelines.quantize_formats import find_format
from quantpress.pipelines.quantize_plan import plan_weights
from quantpress.pipelines.quantize_recipe import Recipe
from quantpress.quant.errors import LayoutError
from quantpress.quant.grid import Grid
from tests.tiny import tiny_checkpoint

pytest.importorskip("transformers")


@pytest.mark.parametrize(("form", "grid"), [("compressed-tensors", {}), ("awq", {"symmetric": False})])
def test_formats_that_transformers_would_fill_with_noise_are_refused(
    tmp_path: Path, form: str, grid: dict[str, Any]
) -> None:
    source = open_checkpoint(tiny_checkpoint(tmp_path, "gpt2"))
    recipe = Recipe("rtn", form, Grid(4, 32, **grid), None, (), ())
    with pytest.raises(LayoutError, match=f"{form} is not read for layers of Conv1D.*--format gptq"):
        plan_weights(source, recipe, find_format(form))


@pytest.mark.parametrize(("form", "grid"), [("gptq", Grid(4, 32)), ("bitsandbytes", Grid(8, -1, scale_type="F32"))])
def test_formats_that_are_read_for_them_are_not(tmp_path: Path, form: str, grid: Grid) -> None:
    source = open_checkpoint(tiny_checkpoint(tmp_path, "gpt2"))
    plan = plan_weights(source, Recipe("rtn", form, grid, None, (), ()), find_format(form))
    assert len(plan.weights) == 12
    assert all(weight.transposed for weight in plan.weights.values())
