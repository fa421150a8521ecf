"""Rows of tables whose layers are pairs of weight and bias, as the families before Llama have them."""

from __future__ import annotations

from quantpress.convert.arch.spec import Layout, Role, TensorSpec

__all__ = ["linear_rows", "norm_rows"]


def norm_rows(hf: str, gguf: str, *, flag: str = "", bias: str = "") -> tuple[TensorSpec, TensorSpec]:
    """Gives weight and bias of a norm over `hidden` values.

    Args:
        hf: name in the checkpoint without ".weight".
        gguf: name in llama.cpp without ".weight".
        flag: of both.
        bias: flag of the bias, by default that of both.
    """
    return (
        TensorSpec(f"{hf}.weight", f"{gguf}.weight", ("hidden",), Role.NORM, flag=flag),
        TensorSpec(f"{hf}.bias", f"{gguf}.bias", ("hidden",), Role.NORM, flag=bias or flag),
    )


def linear_rows(
    hf: str, gguf: str, shape: tuple[str, str], *, layout: Layout = Layout.PLAIN, bias: str = "", rotary: str = ""
) -> tuple[TensorSpec, TensorSpec]:
    """Gives weight and bias of a linear.

    Args:
        hf: name in the checkpoint without ".weight".
        gguf: name in llama.cpp without ".weight".
        shape: of the weight, (N, K).
        layout: of both.
        bias: flag of the bias; empty: there always is one.
        rotary: which heads positions turn.
    """
    return (
        TensorSpec(f"{hf}.weight", f"{gguf}.weight", shape, Role.LINEAR, layout=layout, rotary=rotary),
        TensorSpec(f"{hf}.bias", f"{gguf}.bias", shape[:1], Role.BIAS, layout=layout, flag=bias, rotary=rotary),
    )
