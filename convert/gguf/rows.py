"""The order of rows in GGUF against the order in a Hugging Face checkpoint, both ways, without reading whole tensors.

llama.cpp's NORM rope turns neighbouring values (0, 1), (2, 3), ...; Hugging Face turns value i together with value
i + dim/2. A file for NORM therefore holds the rows of each head interleaved (llama.cpp, conversion/llama.py, permute).
A family that turns neighbours in Hugging Face's form as well stays as it is for NORM, and for NEOX, which turns halves,
it is the other way round.
GPT-NeoX fuses q, k and v head by head, Falcon group by group; llama.cpp wants all q, then all k, then all v
(conversion/gptneox.py, conversion/falcon.py).
"""

from __future__ import annotations

from functools import cache

import numpy as np

from quantpress.convert.arch.fused_rows import FUSED, stored_heads
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, TensorSpec
from quantpress.convert.row_order import IN_PLACE, ReadRows, RowOrder, Transposed
from quantpress.quant.errors import LayoutError

__all__ = ["IN_PLACE", "ReadRows", "RowOrder", "Transposed", "row_order"]


def row_order(arch: ArchSpec, row: TensorSpec, hyper: Hyperparameters) -> RowOrder:
    """Gives the order in which GGUF holds the rows of a tensor, as seen from the checkpoint.

    Raises:
        LayoutError: the table asks for two reorderings at once, which no family needs.
    """
    turned = bool(row.rotary) and hyper.rope is not None and hyper.rope.interleaved == (arch.gguf_rope == "neox")
    if row.layout in FUSED:
        if turned:
            raise LayoutError(f"{row.hf}: rows fused head by head cannot be interleaved for llama.cpp as well")
        return RowOrder(hyper.head_dim, stored_heads(hyper))
    if not turned or hyper.rope is None:
        return IN_PLACE
    order = RowOrder(hyper.head_dim, within=_interleaved(hyper.head_dim, hyper.rope.dim))
    return order.inverse() if hyper.rope.interleaved else order


@cache
def _interleaved(head_dim: int, turned: int) -> tuple[int, ...]:
    """Row numbers 0, turned/2, 1, turned/2 + 1, ...; rows that no position turns keep their places."""
    pairs = np.arange(turned).reshape(2, turned // 2).T.reshape(-1)
    return (*(int(place) for place in pairs), *range(turned, head_dim))
