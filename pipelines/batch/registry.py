"""Finds stages by their names: those of this package, and those of packages that offer theirs by an entry point."""

from __future__ import annotations

import dataclasses
import importlib
import logging
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType

from quantpress.pipelines.batch.problems import nearest
from quantpress.pipelines.stage import BuildingStage, PreparingStage, Stage
from quantpress.pipelines.verify_stage import Verify
from quantpress.quant.errors import UsageError

__all__ = ["BUILT_IN", "GROUP", "OWN_PACKAGE", "find_stage", "kind_of", "package_of", "stage_classes", "stage_names"]

log = logging.getLogger(__name__)

OWN_PACKAGE = "quantpress"
"""What `package_of` says of the stages that come with the program."""

GROUP = "quantpress.stages"
# what modules raise while they are imported; anything else is as odd as to be worth its traceback
_IMPORT_FAILURES = (
    ImportError, AttributeError, NameError, SyntaxError, TypeError, ValueError, LookupError, OSError, RuntimeError,
)  # fmt: skip
BUILT_IN: Mapping[str, str] = MappingProxyType(
    {
        "merge_lora": "quantpress.pipelines.merge_stage",
        "qlora_base": "quantpress.pipelines.qlora_choice",
        "rtn": "quantpress.pipelines.codes_stage",
        "hqq": "quantpress.pipelines.codes_stage",
        "gptq": "quantpress.pipelines.codes_stage",
        "awq": "quantpress.pipelines.codes_stage",
        "smoothquant": "quantpress.pipelines.codes_stage",
        "imatrix": "quantpress.pipelines.imatrix_stage",
        "gguf": "quantpress.pipelines.gguf_stage",
        "onnx": "quantpress.pipelines.onnx_stage",
        "safetensors": "quantpress.pipelines.safetensors_stage",
        "quantize": "quantpress.pipelines.quantize_stage",
        "verify": "quantpress.pipelines.verify_stage",
    }
)
"""Name -> module; a module is imported when a stage of it is used."""


def stage_names() -> tuple[str, ...]:
    """Gives the names of all installed stages; imports none of them."""
    return (*BUILT_IN, *(name for name in sorted(_offered()) if name not in BUILT_IN))


def find_stage(name: str) -> type[Stage]:
    """Gives the class of a stage.

    Raises:
        UsageError: there is none of this name, or the package that offers it is broken.
    """
    if name in BUILT_IN:
        return _built_in(name)
    offers = _offered().get(name, [])
    if not offers:
        known = ", ".join(stage_names())
        raise UsageError(f'no stage is called "{name[:80]}"{nearest(name, stage_names())}; installed are {known}')
    if len(offers) > 1:
        packages = " and ".join(_package(offer) for offer in offers)
        raise UsageError(f'stage "{name}" is offered by {packages}; uninstall one of them')
    return _loaded(offers[0])


def stage_classes() -> Mapping[str, type[Stage]]:
    """Gives every stage that can be used; says of the others, by a warning, why they cannot."""
    found: dict[str, type[Stage]] = {}
    for name, offers in _offered().items():
        if name in BUILT_IN:
            packages = " and ".join(_package(offer) for offer in offers)
            log.warning('stage "%s" of %s is not used: quantpress has a stage of that name', name, packages)
    for name in stage_names():
        stage = _usable(name)
        if stage is not None:
            found[name] = stage
    return found


def _usable(name: str) -> type[Stage] | None:
    try:
        return find_stage(name)
    except UsageError as error:
        log.warning("%s", error)
        return None


def kind_of(stage: type[Stage]) -> str:
    """Gives "building", "preparing", "verify" or "lazy"."""
    kinds = ((BuildingStage, "building"), (PreparingStage, "preparing"), (Verify, "verify"))
    return next((kind for parent, kind in kinds if issubclass(stage, parent)), "lazy")


def package_of(stage: type[Stage]) -> str:
    """Gives name and version of the package that a stage comes from, without a version for our own."""
    if stage.name in BUILT_IN:
        return OWN_PACKAGE
    offers = _offered().get(stage.name, [])
    return _package(offers[0]) if offers else stage.__module__.partition(".")[0]


def _built_in(name: str) -> type[Stage]:
    module = importlib.import_module(BUILT_IN[name])
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Stage) and getattr(value, "name", None) == name:
            return value
    raise TypeError(f"{module.__name__} has no stage {name}")


def _offered() -> dict[str, list[EntryPoint]]:
    """Gives the entry points by name; a package that is found at two places of the path counts once."""
    found: dict[str, dict[tuple[str, str], EntryPoint]] = {}
    for offer in entry_points(group=GROUP):
        found.setdefault(offer.name, {}).setdefault((_distribution(offer), offer.value), offer)
    return {name: list(offers.values()) for name, offers in found.items()}


def _distribution(offer: EntryPoint) -> str:
    return offer.dist.name if offer.dist is not None else ""


def _package(offer: EntryPoint) -> str:
    """Names the package of an entry point for messages."""
    return f"{offer.dist.name} {offer.dist.version}" if offer.dist is not None else offer.value


def _loaded(offer: EntryPoint) -> type[Stage]:
    """Imports a third-party stage and checks that it is one.

    Raises:
        UsageError: it cannot be imported, or is no frozen dataclass derived from Stage.
    """
    where = f'stage "{offer.name}" of {_package(offer)} ({offer.value})'
    try:
        found = offer.load()
    except _IMPORT_FAILURES as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{where} cannot be imported: {type(error).__name__}: {reason}") from error
    if not isinstance(found, type) or not issubclass(found, Stage):
        raise UsageError(f"{where} is not a class derived from quantpress.pipelines.stage.Stage")
    frozen = dataclasses.is_dataclass(found) and found.__dataclass_params__.frozen  # type: ignore[attr-defined]
    if not frozen or "__dataclass_params__" not in vars(found):
        raise UsageError(f"{where} is not a frozen dataclass; write @dataclass(frozen=True, kw_only=True) above it")
    if getattr(found, "name", None) != offer.name or not isinstance(getattr(found, "version", None), int):
        raise UsageError(f'{where} must have the class attributes name = "{offer.name}" and a whole number as version')
    return found
