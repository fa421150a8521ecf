"""Rows and settings that tables of mixtures of experts share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpress.convert.arch import fields
from quantpress.convert.arch.gguf_fields import whole
from quantpress.convert.arch.gguf_rotary import Entries
from quantpress.convert.arch.gguf_values import Metadata
from quantpress.convert.arch.spec import Hyperparameters, Layout, Role, TensorSpec
from quantpress.quant.errors import InputError

__all__ = [
    "all_layers",
    "expert_config",
    "expert_entries",
    "expert_rows",
    "expert_sizes",
    "shared_rows",
    "stacked_rows",
]

_BLOCK = "blk.{layer}."
_SHAPES: Mapping[str, tuple[str, str]] = {
    "gate": ("expert_ffn", "hidden"),
    "up": ("expert_ffn", "hidden"),
    "down": ("hidden", "expert_ffn"),
}


def expert_rows(
    module: str, *, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> tuple[TensorSpec, ...]:
    """The router and the projections of each expert, as checkpoints are published.

    Args:
        module: start of the names, with `{layer}`: "model.layers.{layer}.mlp.".
        gate: what the checkpoint calls the gate projection of one expert.
        up: the same of its up projection.
        down: the same of its down projection.
    """
    router = TensorSpec(
        f"{module}gate.weight", f"{_BLOCK}ffn_gate_inp.weight", ("experts", "hidden"), Role.ROUTER, layers="experts"
    )
    names = {"gate": gate, "up": up, "down": down}
    return router, *(
        TensorSpec(
            f"{module}experts.{{expert}}.{name}.weight",
            f"{_BLOCK}ffn_{part}_exps.weight",
            _SHAPES[part],
            Role.LINEAR,
            layers="experts",
        )
        for part, name in names.items()
    )


def stacked_rows(
    module: str, *, router: str = "gate.weight", up: str = "experts.gate_up_proj", down: str = "experts.down_proj"
) -> tuple[TensorSpec, ...]:
    """The same as transformers 5 holds them: all experts in one tensor, gate before up (conversion_mapping.py).

    Args:
        module: start of the names, with `{layer}`.
        router: name of the router's weight.
        up: name of gate and up of all experts.
        down: name of all down projections.
    """
    shape = ("experts", "expert_ffn2", "hidden")
    return (
        TensorSpec(
            f"{module}{router}", f"{_BLOCK}ffn_gate_inp.weight", ("experts", "hidden"), Role.ROUTER, layers="experts"
        ),
        _stacked(f"{module}{up}", "gate", shape, "gate"),
        _stacked(f"{module}{up}", "up", shape, "up"),
        _stacked(f"{module}{down}", "down", ("experts", "hidden", "expert_ffn"), ""),
    )


def _stacked(hf: str, part: str, shape: tuple[str, ...], rows: str) -> TensorSpec:
    gguf = f"{_BLOCK}ffn_{part}_exps.weight"
    return TensorSpec(hf, gguf, shape, Role.LINEAR, layout=Layout.STACKED, part=rows, layers="experts")


def shared_rows(module: str, gate: str = "") -> tuple[TensorSpec, ...]:
    """The MLP that every token goes to beside its experts.

    Args:
        module: start of its names: "model.layers.{layer}.mlp.shared_expert.".
        gate: name of what its output is weighed by; "" if it is not.
    """
    rows = [
        TensorSpec(
            f"{module}{part}_proj.weight",
            f"{_BLOCK}ffn_{part}_shexp.weight",
            tuple("shared_ffn" if dim == "expert_ffn" else dim for dim in shape),
            Role.LINEAR,
            layers="experts",
        )
        for part, shape in _SHAPES.items()
    ]
    if gate:
        gguf = f"{_BLOCK}ffn_gate_inp_shexp.weight"
        rows.insert(0, TensorSpec(gate, gguf, ("one", "hidden"), Role.ROUTER, layers="experts"))
    return tuple(rows)


def expert_sizes(config: fields.Config, layers: tuple[bool, ...], *, count: str, intermediate: str) -> dict[str, Any]:
    """Reads how many experts there are and how many of them a token goes to.

    Args:
        config: contents of config.json.
        layers: per layer, whether it has experts.
        count: key of their number.
        intermediate: key of the inner values of one.

    Returns:
        Keyword arguments of `Experts`.

    Raises:
        InputError: a token goes to more experts than there are.
    """
    number, used = fields.size(config, count), fields.size(config, "num_experts_per_tok")
    if used > number:
        raise InputError(f"config.json: 'num_experts_per_tok' is {used}, there are only {number} experts ({count!r})")
    return {
        "count": number, "used": used, "intermediate": fields.size(config, intermediate), "layers": layers,
    }  # fmt: skip


def expert_entries(hyper: Hyperparameters, *, inner: bool = True) -> Entries:
    """Gives llama.cpp's keys of a mixture.

    Args:
        hyper: what config.json says.
        inner: whether the sizes of an expert and of the shared MLP have keys of their own; else the inner values of one
            are `feed_forward_length`.
    """
    experts = hyper.experts
    assert experts is not None, "the family has experts"
    entries: Entries = {
        "expert_count": ("uint32", experts.count),
        "expert_used_count": ("uint32", experts.used),
    }
    if inner:
        entries["expert_feed_forward_length"] = ("uint32", experts.intermediate)
        if experts.shared:
            entries["expert_shared_feed_forward_length"] = ("uint32", experts.shared)
    return entries


def expert_config(metadata: Metadata, arch: str, *, count: str) -> dict[str, int]:
    """Gives the keys of config.json for what `expert_entries` wrote.

    Args:
        metadata: full keys, plain values.
        arch: `general.architecture`.
        count: what config.json calls the number of experts.
    """
    return {
        count: whole(metadata, f"{arch}.expert_count"),
        "num_experts_per_tok": whole(metadata, f"{arch}.expert_used_count"),
    }


def all_layers(config: fields.Config) -> tuple[bool, ...]:
    """Gives that every layer has experts."""
    return (True,) * fields.size(config, "num_hidden_layers")
