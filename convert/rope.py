"""Rotary position embedding in torch: frequencies of every kind, and turning q and k by them.

Source: transformers' modeling_rope_utils.py (the formulas of each kind, in float32 and in that order of operations, so
that the results are equal bit for bit), papers arXiv:2309.00071 (YaRN) and arXiv:2402.13753 (LongRoPE).
"""

from __future__ import annotations

import math

import torch

from quantpress.convert.arch.rotary import attention_factor
from quantpress.convert.arch.spec import Rope


def frequencies(rope: Rope, context: int, length: int) -> torch.Tensor:
    """Gives the angle per token of each pair of turned values.

    Args:
        rope: settings of the layer.
        context: `max_position_embeddings`, to which "dynamic" compares the length.
        length: tokens of the text, counted from its first: "dynamic" and "longrope" depend on it.

    Returns:
        (dim / 2,) float32 on the CPU.
    """
    theta, parameters = rope.theta, rope.parameters
    if rope.kind == "dynamic":
        factor, reached = parameters["factor"], max(length, context)
        stretch = (factor * reached / context) - (factor - 1)
        theta = theta * stretch ** (rope.dim / (rope.dim - 2))
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim
    powers = torch.pow(theta, exponents)
    if rope.kind == "longrope":
        chosen = "long_factor" if length > parameters["original_max_position_embeddings"] else "short_factor"
        return torch.reciprocal(torch.tensor(parameters[chosen], dtype=torch.float32) * powers)
    plain = torch.reciprocal(powers)
    if rope.kind == "linear":
        return plain / float(parameters["factor"])
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    if rope.kind == "yarn":
        return _yarn(rope, powers, context)
    return plain


def depends_on_length(rope: Rope | None, context: int, lengths: tuple[int, int]) -> bool:
    """Whether a text's earlier positions turn otherwise at the second length than at the first."""
    if rope is None or rope.kind not in ("dynamic", "longrope"):
        return False
    before, after = (frequencies(rope, context, length) for length in lengths)
    return not torch.equal(before, after)


def angles(
    rope: Rope, context: int, positions: torch.Tensor, length: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gives cosine and sine of the turns, with YaRN's and LongRoPE's magnitude.

    Args:
        rope: settings of the layer.
        context: `max_position_embeddings`.
        positions: (T,) int64 positions of the tokens.
        length: tokens of the text up to the last position.
        dtype: of the result; computed in float32.

    Returns:
        Two (T, dim) tensors on the device of `positions`; the second half repeats the first.
    """
    turns = positions[:, None].float() * frequencies(rope, context, length).to(positions.device)
    both = torch.cat((turns, turns), dim=-1)
    magnitude = attention_factor(rope, context)
    return (both.cos() * magnitude).to(dtype), (both.sin() * magnitude).to(dtype)


def turn(values: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, *, interleaved: bool = False) -> torch.Tensor:
    """Turns the first `dim` values of each head.

    Args:
        values: (B, heads, T, head_dim).
        cosine: (T, dim), the second half repeats the first.
        sine: (T, dim), likewise.
        interleaved: neighbours are pairs; else pairs lie half of `dim` apart.

    Returns:
        Shape and type of `values`.
    """
    dim = cosine.shape[-1]
    turned, rest = values[..., :dim], values[..., dim:]
    if interleaved:
        left, right = turned[..., 0::2], turned[..., 1::2]
        cosine, sine = cosine[..., : dim // 2], sine[..., : dim // 2]
        turned = torch.stack((left * cosine - right * sine, right * cosine + left * sine), dim=-1).flatten(-2)
    else:
        left, right = turned[..., : dim // 2], turned[..., dim // 2 :]
        turned = turned * cosine + torch.cat((-right, left), dim=-1) * sine
    return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), dim=-1)


def _llama3(rope: Rope, plain: torch.Tensor) -> torch.Tensor:
    parameters = rope.parameters
    factor, low, high = parameters["factor"], parameters["low_freq_factor"], parameters["high_freq_factor"]
    original = parameters["original_max_position_embeddings"]
    wavelength = 2 * math.pi / plain
    slowed = torch.where(wavelength > original / low, plain / factor, plain)
    smooth = (original / wavelength - low) / (high - low)
    ramp = (1 - smooth) * slowed / factor + smooth * slowed
    between: torch.Tensor = (wavelength >= original / high) & (wavelength <= original / low)
    return torch.where(between, ramp, slowed)


def _yarn(rope: Rope, powers: torch.Tensor, context: int) -> torch.Tensor:
    parameters, dim = rope.parameters, rope.dim
    original = parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or context / original

    def boundary(rotations: float) -> float:
        return (dim * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(rope.theta))

    start, end = boundary(parameters.get("beta_fast") or 32), boundary(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        start, end = math.floor(start), math.ceil(end)
    start, end = max(start, 0), min(end, dim - 1)
    span = end - start if end != start else 0.001  # as in the reference: keeps a step from dividing by zero
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - start) / span, 0, 1)
    kept = 1 - ramp
    slow, plain = torch.reciprocal(factor * powers), torch.reciprocal(powers)
    mixed: torch.Tensor = slow * (1 - kept) + plain * kept
    return mixed
