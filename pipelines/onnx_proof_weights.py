"""All weights of an ONNX model beside its source's: which belongs to which, and what is not there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from quantpress.convert.arch.spec import Role
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.onnx.read import OnnxModel
from quantpress.convert.preflight import Preflight
from quantpress.pipelines.content_proof import Finding
from quantpress.pipelines.onnx_proof_compare import Comparison, Key
from quantpress.pipelines.onnx_proof_read import AGAIN, HeldWeight, held_weights
from quantpress.pipelines.onnx_proof_stacks import stacked_weights

__all__ = ["WeightsFound", "compare_weights"]

_FEWEST_FOUND = 0.5  # of the source's tensors: with fewer by name the names are another program's


@dataclass(frozen=True, slots=True)
class WeightsFound:
    """How many tensors were compared, which could not be and why, and what is wrong."""

    tensors: int = 0
    skipped: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()


def compare_weights(model: OnnxModel, source: Checkpoint, checked: Preflight) -> WeightsFound:
    """Compares every tensor of the source with what the model holds under its name."""
    held = held_weights(model)
    if not held:
        return WeightsFound(skipped=("weights: the model has none that can be read",))
    comparison = Comparison(source, checked)
    pairs = _pairs(comparison, held)
    if len(pairs) < _FEWEST_FOUND * len(checked.bindings):
        return WeightsFound(skipped=("weights: the model's tensors do not have the checkpoint's names",))
    findings = [*_missing(comparison, pairs), *comparison.compare(pairs)]
    return WeightsFound(len(pairs), (), tuple(findings))


def _pairs(proof: Comparison, every: Mapping[str, HeldWeight]) -> dict[Key, HeldWeight]:
    """Gives what the file holds for each slot; a head that is tied too, where it is stored by itproof."""
    found: dict[Key, HeldWeight] = {}
    stacks = stacked_weights(every, proof.checked)
    for key, name in proof.names.items():
        held = every.get(name) or every.get(f"{name}.weight") or stacks.get(key)
        if held is not None:
            found[key] = replace(held, name=name)
    embedding = proof.names.get(("token_embd.weight", -1), "")
    if (again := every.get(f"{embedding}{AGAIN}")) is not None:
        found["output.weight", -1] = replace(again, name=f"{embedding}, as the head has it")
    for row in proof.checked.spec.tensors:
        if row.slot == "output.weight" and proof.checked.hyper.tied and row.hf in every:
            found.setdefault((row.slot, -1), replace(every[row.hf], name=row.hf))
    return found


def _missing(proof: Comparison, pairs: Mapping[Key, HeldWeight]) -> Iterator[Finding]:
    """Names tensors that are not there, or that nothing takes, or whose shape is another."""
    for key, name in proof.names.items():
        held = pairs.get(key)
        if held is None:
            if proof.checked.hyper.causal:  # an encoder is exported without its head for masked tokens
                yield Finding("weights", name, "missing", "a tensor as in the source")
        elif not held.users:
            yield Finding("weights", name, "taken by no operator", "a tensor that the model uses")
        elif wrong := _elsewhere(proof, key, held):
            yield Finding("weights", name, f"taken by {wrong}", f"taken by {_prefix(key)}")


def _elsewhere(proof: Comparison, key: Key, held: HeldWeight) -> str:
    """Names the layer's linear that takes a weight in another one's place."""
    prefix = _prefix(key)
    if proof.roles.get(key[0]) is not Role.LINEAR or key[1] < 0 or "_exps." in key[0]:
        return ""
    if any(user.startswith(prefix) for user in held.users) or not held.users[0].startswith("/layers."):
        return ""
    return held.users[0]


def _prefix(key: Key) -> str:
    slot, layer = key
    module = slot.removesuffix(".weight").removesuffix(".bias")
    return f"/layers.{layer}/{module}/" if layer >= 0 else f"/{module}/"
