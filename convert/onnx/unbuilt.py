"""What a family or config.json may ask for that the graph does not compute: refused, never left out."""

from __future__ import annotations

from quantpress.convert.arch.spec import ArchSpec, Hyperparameters
from quantpress.convert.traits import traits_of
from quantpress.quant.errors import InputError

__all__ = ["refuse_unbuilt"]


def refuse_unbuilt(spec: ArchSpec, hyper: Hyperparameters) -> None:
    """Refuses a model that has something the graph would leave out.

    Args:
        spec: the family.
        hyper: what config.json says.

    Raises:
        InputError: naming what it has.
    """
    traits = [traits_of(spec, hyper, layer) for layer in range(hyper.layers)]
    encoder = not hyper.causal
    found = {
        "attention sinks in an encoder": encoder and any(each.sinks for each in traits),
        "attention sinks over a latent": hyper.latent is not None and any(each.sinks for each in traits),
        "a sliding window in an encoder": encoder and hyper.sliding_window is not None,
        "ALiBi in an encoder": encoder and bool(hyper.alibi),
        "a decoder with token types": hyper.causal and hyper.token_types != 0,
        "a latent with a sliding window": hyper.latent is not None and hyper.sliding_window is not None,
        f"a {spec.kind}": spec.kind not in ("decoder", "encoder"),
    }
    if reasons := [what for what, present in found.items() if present]:
        raise InputError(f"{spec.family}: cannot be written as ONNX: {', '.join(reasons)}")
