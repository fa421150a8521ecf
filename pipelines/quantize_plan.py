"""Decides which weights of a checkpoint are quantized and to what, from headers alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from quantpress.convert.arch.registry import find_arch
from quantpress.convert.arch.spec import ArchSpec, Role
from quantpress.convert.checkpoint import DTYPES, Checkpoint, LazyTensor
from quantpress.convert.linears import linear_weights
from quantpress.convert.quantized import PackedTensor, PackFormat
from quantpress.pipelines.quantize_recipe import Recipe
from quantpress.quant.errors import InputError, LayoutError
from quantpress.quant.grid import Grid
from quantpress.quant.qtensor import QuantizedForm

__all__ = ["PlannedWeight", "QuantizePlan", "main_type", "own_scale_type", "plan_weights"]

# GPTQ, AWQ and those who read their files know the linears of layers only
_OUTSIDE = "stands outside of the layers"

_SCALE_TYPES = {"F16": "F16", "BF16": "BF16", "F8_E4M3": "BF16", "F8_E5M2": "BF16"}

# transformers: integrations/awq.py, replace_with_awq_linear; compressed-tensors: quantization/lifecycle/apply.py
_LINEAR_ONLY = frozenset({"awq", "compressed-tensors"})

# its target is the class "Linear": whatever else has that class must be named, and names too many do no harm
_BY_CLASS = frozenset({"compressed-tensors"})


@dataclass(frozen=True, slots=True)
class PlannedWeight:
    """A weight that will be quantized.

    Attributes:
        tensor: as the source has it.
        transposed: stored as (K, N).
        form: what it becomes.
        grid: what its codes are chosen on.
        parts: the tensors that will be stored for it.
    """

    tensor: LazyTensor
    transposed: bool
    form: QuantizedForm
    grid: Grid
    parts: tuple[PackedTensor, ...]

    @property
    def name(self) -> str:
        """Name of the weight in the source."""
        return self.tensor.name

    @property
    def nbytes(self) -> int:
        """Bytes of all its parts."""
        return sum(math.prod(part.shape) * DTYPES[part.dtype].itemsize for part in self.parts)


@dataclass(frozen=True, slots=True)
class QuantizePlan:
    """What becomes of a checkpoint's weights.

    Attributes:
        weights: name -> what is quantized, in the checkpoint's order.
        left: name -> why a linear weight stays as it is; heads too.
        others: further matrices whose modules may be linear all the same, for a format that goes by the class: routers
            of families without a table, projections that are called embeddings, ...
    """

    weights: Mapping[str, PlannedWeight]
    left: Mapping[str, str]
    others: tuple[str, ...] = ()

    @property
    def unquantized(self) -> tuple[str, ...]:
        """Names that the format's settings must have as not quantized."""
        return *self.left, *self.others

    @property
    def forms(self) -> dict[str, QuantizedForm]:
        """Form of each weight."""
        return {name: weight.form for name, weight in self.weights.items()}


def main_type(forms: Iterable[QuantizedForm]) -> str:
    """Names what most values are quantized to: "int4", or "w8a8" where inputs are rounded too."""
    sizes: Counter[str] = Counter()
    for form in forms:
        sizes["w8a8" if form.input_bits else f"int{form.bits}"] += form.shape[0] * form.shape[1]
    return sizes.most_common(1)[0][0]


def own_scale_type(source: Checkpoint) -> str:
    """Gives the scale type of a model's own precision: that of its largest tensor."""
    largest = max(source.tensors.values(), key=lambda tensor: tensor.nbytes)
    return _SCALE_TYPES.get(largest.dtype, "F32")


def plan_weights(source: Checkpoint, recipe: Recipe, form: PackFormat) -> QuantizePlan:
    """Goes through the linear weights of a checkpoint.

    Args:
        source: the model.
        recipe: what the weights become; where its method is None, those that have codes keep them.
        form: the format that is to hold them.

    Raises:
        UsageError: a pattern that is found in no name.
        LayoutError: codes that the format cannot hold, or a format that can hold none of the weights.
        InputError: there is nothing to quantize.
    """
    found, left = _linears(source)
    weights: dict[str, PlannedWeight] = {}
    if recipe.method is not None:
        recipe.check_patterns(list(found))
    for name, transposed in found.items():
        tensor = source.tensors[name]
        shape = (tensor.shape[1], tensor.shape[0]) if transposed else (tensor.shape[0], tensor.shape[1])
        wanted = _form(source, recipe, name, shape)
        if wanted is None or recipe.skips(name):
            left[name] = "--skip" if recipe.skips(name) else "not quantized in the source"
            continue
        try:
            _refuse_conv1d(form, transposed)
            form.check(wanted)
        except LayoutError as error:
            if recipe.method is None:
                raise LayoutError(f"{tensor.source}: tensor {name}: {error}") from error
            left[name] = str(error)
            continue
        weights[name] = PlannedWeight(tensor, transposed, wanted, recipe.grid_of(name), form.planned(name, wanted))
    if not weights:
        raise _nothing(source, left)
    others = _others(source, {*weights, *left}) if form.name in _BY_CLASS else ()
    return QuantizePlan(weights, left, others)


def _others(source: Checkpoint, known: set[str]) -> tuple[str, ...]:
    tensors = source.tensors.items()
    return tuple(name for name, tensor in tensors if _is_matrix(tensor) and name not in known)


def _is_matrix(tensor: LazyTensor) -> bool:
    return tensor.name.endswith(".weight") and len(tensor.shape) == 2


def _refuse_conv1d(form: PackFormat, transposed: bool) -> None:
    """Refuses formats whose readers look for `nn.Linear` only: transformers would fill GPT-2's layers with noise."""
    if transposed and form.name in _LINEAR_ONLY:
        raise LayoutError(f"{form.name} is not read for layers of Conv1D, as this model has them; give --format gptq")


def _form(source: Checkpoint, recipe: Recipe, name: str, shape: tuple[int, int]) -> QuantizedForm | None:
    if recipe.method is not None:
        return recipe.form_of(name, shape)
    if name not in source.quantized:
        return None
    kept = source.quantized[name].form
    return QuantizedForm(
        kept.shape, kept.bits, kept.group_size, kept.symmetric, recipe.grid.scale_type, kept.ordered, kept.input_bits
    )


def _nothing(source: Checkpoint, left: Mapping[str, str]) -> InputError:
    reasons = [
        reason for reason in left.values() if reason not in ("head", "--skip", "not a part that is quantized", _OUTSIDE)
    ]
    if reasons:
        return LayoutError(f"{source.name}: none of the weights can be stored: {reasons[0]}")
    return InputError(f"{source.name}: no linear weight to quantize was found")


def _linears(source: Checkpoint) -> tuple[dict[str, bool], dict[str, str]]:
    """Linear weights that are quantized (name -> stored as (K, N)), and others that readers may take for linear."""
    try:
        arch = find_arch(source.config)
    except InputError:
        arch = None
    foreign = () if arch is None else arch.foreign
    linear = linear_weights(source.config, source.tensors)
    left = dict.fromkeys(_heads(arch, source), "head")
    left |= {name: "not a part that is quantized" for name in linear if foreign and name.startswith(foreign)}
    left |= dict.fromkeys(_outside(arch, linear), _OUTSIDE)
    return {name: swapped for name, swapped in linear.items() if name not in left}, left


def _outside(arch: ArchSpec | None, names: Iterable[str]) -> list[str]:
    """Names of linears around the layers, such as OPT-350m's projections of embeddings."""
    if arch is None:
        return []
    rows = [row for row in arch.tensors if row.role is Role.LINEAR and not row.per_layer]
    found = {name for row in rows for name in arch.names(row, -1)}
    return [name for name in names if name in found]


def _heads(arch: ArchSpec | None, source: Checkpoint) -> list[str]:
    """Names of the head, also where it is tied and has no tensor: the module is there all the same."""
    if arch is None:
        return ["lm_head.weight"]
    rows = [row for row in arch.tensors if row.role is Role.HEAD]
    found = [name for row in rows for name in arch.names(row, -1) if name in source.tensors]
    return found or [arch.names(row, -1)[0] for row in rows]
