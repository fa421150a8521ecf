"""Rotary frequencies against transformers' own functions, with the settings of published models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quantpress.convert.arch.rotary import attention_factor, llama3_factors, read_rope
from quantpress.convert.rope import angles, depends_on_length, frequencies, turn

GROWING = [1.0 + 0.7 * step for step in range(48)]
PUBLISHED: dict[str, tuple[int, int, float, dict[str, Any]]] = {  # head size, context, theta, settings
    "llama-3.1-8b": (
        128,
        131072,
        500000.0,
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 8192},
    ),
    "llama-3.2-1b": (
        64,
        131072,
        500000.0,
        {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 8192},
    ),
    "qwen2.5-yarn": (
        128,
        131072,
        1e6,
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    ),
    "yarn-all": (
        64,
        8192,
        10000.0,
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.707}
        | {"mscale_all_dim": 1.0, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    ),
    "yarn-below-one": (64, 4096, 10000.0, {"rope_type": "yarn", "factor": 0.5}),
    "vicuna-16k": (128, 16384, 10000.0, {"rope_type": "linear", "factor": 8.0}),
    "dynamic": (128, 4096, 10000.0, {"rope_type": "dynamic", "factor": 4.0}),
    "phi-3-128k": (
        96,
        131072,
        10000.0,
        {"rope_type": "longrope", "short_factor": [1.1] * 48, "long_factor": GROWING}
        | {"original_max_position_embeddings": 4096},
    ),
    "longrope-factors": (
        96,
        131072,
        10000.0,
        {"rope_type": "longrope", "short_factor": [1.1] * 48, "long_factor": GROWING, "factor": 16.0}
        | {"original_max_position_embeddings": 4096, "attention_factor": 1.3},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("length", [100, 5000, 20000])
def test_frequencies_and_magnitude_equal_those_of_transformers(name: str, length: int) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    head_dim, context, theta, settings = PUBLISHED[name]
    config = LlamaConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        max_position_embeddings=context,
        rope_parameters={**settings, "rope_theta": theta},
    )
    wanted, magnitude = ROPE_INIT_FUNCTIONS[settings["rope_type"]](config, "cpu", seq_len=length)
    rope = read_rope(settings, {}, head_dim=head_dim, context=context, theta=theta)
    assert torch.equal(frequencies(rope, context, length), wanted)
    assert attention_factor(rope, context) == magnitude


def test_llama3_factors_are_what_transformers_divides_by() -> None:
    head_dim, context, theta, settings = PUBLISHED["llama-3.1-8b"]
    rope = read_rope(settings, {}, head_dim=head_dim, context=context, theta=theta)
    plain = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    ratio = plain / frequencies(rope, context, 1).double()
    # float32 frequencies: the power, the wavelength and the ramp round about ten times
    torch.testing.assert_close(
        torch.tensor(llama3_factors(rope), dtype=torch.float64), ratio, rtol=10 * 2.0**-24, atol=0
    )
    assert min(llama3_factors(rope)) == 1.0
    assert max(llama3_factors(rope)) == 8.0


def test_turning_is_a_rotation_by_position_times_frequency() -> None:
    """Brute force in complex numbers: value j and value j + dim/2 are one number, turned by its angle."""
    rope = read_rope({}, {}, head_dim=12, context=64, partial=0.67)
    assert rope.dim == 8
    values = torch.randn(2, 3, 5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    positions = torch.arange(7, 12)
    found = turn(values, *angles(rope, 64, positions, 12, torch.float64))
    for pair in range(4):
        number = torch.complex(values[..., pair], values[..., pair + 4])
        angle = positions.double() * 10000.0 ** (-2 * pair / 8)
        turned = number * torch.polar(torch.ones_like(angle), angle)
        # cosine and sine come from float32 angles of up to 12
        torch.testing.assert_close(found[..., pair], turned.real, atol=12 * 2.0**-23, rtol=1e-6)
        torch.testing.assert_close(found[..., pair + 4], turned.imag, atol=12 * 2.0**-23, rtol=1e-6)
    assert torch.equal(found[..., 8:], values[..., 8:])


@pytest.mark.parametrize(
    ("name", "before", "after", "changes"),
    [
        ("llama-3.1-8b", 10, 100000, False),
        ("phi-3-128k", 4095, 4096, False),
        ("phi-3-128k", 4096, 4097, True),
        ("dynamic", 4000, 4096, False),
        ("dynamic", 4096, 4097, True),
    ],
)
def test_only_dynamic_and_longrope_turn_old_positions_anew(name: str, before: int, after: int, changes: bool) -> None:
    head_dim, context, theta, settings = PUBLISHED[name]
    rope = read_rope(settings, {}, head_dim=head_dim, context=context, theta=theta)
    assert depends_on_length(rope, context, (before, after)) is changes
    assert not depends_on_length(None, context, (before, after))
