"""How weights are to be quantized: the options with every default filled in, and what single weights get instead."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass

from quantpress.quant.errors import UsageError
from quantpress.quant.grid import Grid
from quantpress.quant.qtensor import QuantizedForm

__all__ = ["CALIBRATED", "FORMATS", "METHODS", "Asked", "Override", "Recipe", "fill_recipe", "scale_type_of"]

METHODS = ("rtn", "hqq", "gptq", "awq", "smoothquant", "llm_int8")
CALIBRATED = frozenset({"gptq", "awq", "smoothquant"})
FORMATS = ("gptq", "gptq_v2", "awq", "compressed-tensors", "bitsandbytes")
_ASYMMETRIC = frozenset({"awq", "hqq"})  # whose authors quantize with zeros
_INT8 = frozenset({"smoothquant", "llm_int8"})
_CLIPPED = frozenset({"awq", "hqq"})  # clip search is part of the method
# what a format's readers multiply with; None: any type, so the model's own
_SCALE_TYPES = {"gptq": "F16", "gptq_v2": "F16", "awq": "F16", "compressed-tensors": None, "bitsandbytes": "F32"}
_TRUTHS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True, slots=True)
class Override:
    """What the weights whose names match get instead of the common settings.

    Attributes:
        pattern: a regular expression that is searched for in the name of the weight.
        bits, group_size, symmetric, clip_search: in place of the common ones; None leaves these.
    """

    pattern: str
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    clip_search: bool | None = None

    @classmethod
    def parse(cls, text: str) -> Override:
        """Reads `REGEX=key:value,...`.

        Raises:
            UsageError: not of this form, or a key or value that does not exist.
        """
        pattern, separator, settings = text.rpartition("=")
        if not separator or not pattern:
            raise UsageError(f"--override {text!r}: wanted REGEX=KEY:VALUE,..., as in down_proj=bits:8,group_size:64")
        values = dict(_setting(part, text) for part in settings.split(","))
        return cls(pattern, **values)  # type: ignore[arg-type]


def _setting(part: str, text: str) -> tuple[str, int | bool]:
    key, _, value = (word.strip() for word in part.partition(":"))
    if key in ("symmetric", "clip_search") and value.lower() in _TRUTHS:
        return key, _TRUTHS[value.lower()]
    if key in ("bits", "group_size") and re.fullmatch(r"-?\d+", value):
        return key, int(value)
    known = "bits:N, group_size:N, symmetric:true|false, clip_search:true|false"
    raise UsageError(f"--override {text!r}: {part!r} is not one of {known}")


@dataclass(frozen=True, slots=True)
class Recipe:
    """Settings of a whole run.

    Attributes:
        method: one of `METHODS`; None keeps the codes that the source has.
        format: one of `FORMATS`.
        grid: bits, group size and so on of the weights that nothing else is said of.
        input_bits: 8 where inputs are rounded too while the model runs.
        skip: regular expressions of names that stay as they are.
        overrides: in order; the first whose pattern is found wins.
    """

    method: str | None
    format: str
    grid: Grid
    input_bits: int | None = None
    skip: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()

    def grid_of(self, name: str) -> Grid:
        """Gives the settings of a weight."""
        for each in self.overrides:
            if re.search(each.pattern, name):
                fields = ("bits", "group_size", "symmetric", "clip_search")
                own = {field: getattr(each, field) for field in fields if getattr(each, field) is not None}
                return dataclasses.replace(self.grid, **own)
        return self.grid

    def form_of(self, name: str, shape: tuple[int, int]) -> QuantizedForm:
        """Gives what a weight (N, K) becomes."""
        grid = self.grid_of(name)
        return QuantizedForm(
            shape, grid.bits, grid.group(shape[1]), grid.symmetric, grid.scale_type, input_bits=self.input_bits
        )

    def skips(self, name: str) -> bool:
        """Whether a weight stays as it is."""
        return any(re.search(pattern, name) for pattern in self.skip)

    def check_patterns(self, names: Sequence[str]) -> None:
        """Refuses patterns that are no regular expressions, or that are found in no weight's name.

        Raises:
            UsageError: see above.
        """
        flags = [("--skip", pattern) for pattern in self.skip]
        for flag, pattern in (*flags, *(("--override", each.pattern) for each in self.overrides)):
            try:
                found = any(re.search(pattern, name) for name in names)
            except re.error as error:
                raise UsageError(f"{flag} {pattern!r}: not a regular expression: {error}") from error
            if not found:
                example = f"; weights are called like {names[0]}" if names else ""
                raise UsageError(f"{flag} {pattern!r}: found in the name of no weight{example}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the user says of a run; None where nothing was said.

    Attributes:
        bits, group_size, symmetric, scale_type, clip_search: of the common grid.
        form: the format.
        input_bits: 8 where inputs are to be rounded.
        skip: as `Recipe.skip`.
        overrides: `REGEX=key:value,...`, as the command line has them.
    """

    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    scale_type: str | None = None
    clip_search: bool | None = None
    form: str | None = None
    input_bits: int | None = None
    skip: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()


def fill_recipe(method: str, asked: Asked, own_type: str) -> Recipe:
    """Fills in what the user left open.

    Args:
        method: one of `METHODS`.
        asked: what was said.
        own_type: scale type of the model's own precision: "F16", "BF16" or "F32".

    Raises:
        UsageError: options that do not exist or do not go together.
    """
    if method not in METHODS:
        raise UsageError(f"--method {method}: must be one of {', '.join(METHODS)}")
    if asked.input_bits not in (None, 8):
        raise UsageError(f"--activation-bits {asked.input_bits}: only 8 is known")
    input_bits = 8 if method == "smoothquant" else asked.input_bits
    whole_rows = method in _INT8 or input_bits is not None
    symmetric = (method not in _ASYMMETRIC) if asked.symmetric is None else asked.symmetric
    chosen = asked.form or _default_format(method, symmetric=symmetric, input_bits=input_bits)
    if chosen not in FORMATS:
        raise UsageError(f"--format {chosen}: must be one of {', '.join(FORMATS)}")
    grid = Grid(
        bits=(8 if whole_rows else 4) if asked.bits is None else asked.bits,
        group_size=(-1 if whole_rows else 128) if asked.group_size is None else asked.group_size,
        symmetric=symmetric,
        scale_type=asked.scale_type or scale_type_of(chosen, own_type),
        clip_search=(method in _CLIPPED) if asked.clip_search is None else asked.clip_search,
    )
    if method == "llm_int8" and (grid.bits, grid.group_size, symmetric, chosen) != (8, -1, True, "bitsandbytes"):
        raise UsageError("--method llm_int8 is 8 bits per row, symmetric, in the format bitsandbytes; leave these out")
    overrides = tuple(Override.parse(text) for text in asked.overrides)
    return Recipe(method, chosen, grid, input_bits, asked.skip, overrides)


def _default_format(method: str, *, symmetric: bool, input_bits: int | None) -> str:
    """Gives the format that most readers of such weights want."""
    if method == "llm_int8":
        return "bitsandbytes"
    if input_bits is not None:
        return "compressed-tensors"
    if method == "awq":
        return "awq"
    return "gptq" if symmetric else "gptq_v2"


def scale_type_of(form: str, own_type: str) -> str:
    """Gives the type in which a format keeps scales, where the user does not say."""
    return _SCALE_TYPES[form] or own_type
