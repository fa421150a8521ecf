"""Rotary tables of ONNX models against transformers' own rotary embedding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from quantpress.convert.arch.rotary import read_rope
from quantpress.convert.onnx.graph import GraphBuilder
from quantpress.convert.onnx.rotary import store_rotary, table_rows
from tests.convert.test_rope import PUBLISHED


def published(name: str) -> tuple[Any, Any, int]:
    """Gives transformers' rotary embedding, our settings and the context of a published model."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    head_dim, context, theta, settings = PUBLISHED[name]
    config = LlamaConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        max_position_embeddings=context,
        rope_parameters={**settings, "rope_theta": theta},
    )
    rope = read_rope(settings, {}, head_dim=head_dim, context=context, theta=theta)
    return LlamaRotaryEmbedding(config), rope, context


@pytest.mark.parametrize("length", [100, 4096, 5000, 20000])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_row_turns_by_the_angles_of_transformers(name: str, length: int) -> None:
    """Powers, reciprocals and ramps may differ by the last bit of a float32 each, so an angle by a few of its own; a
    cosine by that and by half a bit of one for each of three roundings."""
    embedding, rope, context = published(name)
    length = min(length, context)
    positions = torch.arange(length - 50, length)[None]
    cosine, sine = (each[0, :, : rope.dim // 2].numpy() for each in embedding(torch.zeros(1), positions))
    original = rope.parameters.get("original_max_position_embeddings", context)
    offset = original if rope.kind == "longrope" and length > original else 0
    found = table_rows(rope, context, offset + length - 50, offset + length)
    largest = (positions[0, :, None] * embedding.inv_freq).numpy() + 1
    for ours, theirs in zip(found, (cosine, sine), strict=True):
        assert np.all(np.abs(ours - theirs) <= 2.0**-22 * np.abs(largest) + 2.0**-21)


def test_rows_do_not_depend_on_how_many_are_made_at_once() -> None:
    _, rope, context = published("phi-3-128k")
    whole = table_rows(rope, context, 4000, 4200)
    for start, stop in ((4000, 4096), (4096, 4097), (4097, 4200)):
        for part, rows in zip(table_rows(rope, context, start, stop), whole, strict=True):
            np.testing.assert_array_equal(part, rows[start - 4000 : stop - 4000])


@pytest.mark.parametrize("compute", ["FLOAT", "FLOAT16"])
def test_a_stored_table_holds_short_rows_then_long_ones(compute: str) -> None:
    _, rope, context = published("longrope-factors")
    builder = GraphBuilder(compute=compute, standard=False, opset=23)
    table = store_rotary(builder, rope, context, name="cache")
    assert (table.switch, list(table.sine.shape or ())) == (4096, [4096 + context, 48])
    ((group, _),) = builder.groups
    pieces = [task() for task in group.tasks()]
    assert len(pieces) > 1
    for part in (0, 1):
        rows = np.concatenate([piece[part] for piece in pieces])
        assert (rows.nbytes, rows.dtype) == (group.tensors[part].nbytes, builder.numpy_type)
        for row in (0, 4095, 4096, 21845, 4096 + context - 1):
            wanted = table_rows(rope, context, row, row + 1)[part][0]
            np.testing.assert_array_equal(rows[row], wanted.astype(rows.dtype))


def test_a_text_that_never_outgrows_its_training_has_one_table() -> None:
    head_dim, _, theta, settings = PUBLISHED["phi-3-128k"]
    rope = read_rope(settings, {}, head_dim=head_dim, context=4096, theta=theta)
    table = store_rotary(GraphBuilder(compute="FLOAT", standard=False, opset=23), rope, 4096, name="cache")
    assert table.switch is None
    assert list(table.cosine.shape) == [4096, 48]
