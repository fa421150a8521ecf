"""Where the heads of q, k and v lie in a fused projection whose rows go head by head or group by group.

Sources: transformers' modeling_gpt_neox.py and modeling_bloom.py (a head's q, its k, its v); modeling_falcon.py,
`_split_heads` (the query heads of a group, then the key and the value that they share).
"""

from __future__ import annotations

from quantpress.convert.arch.hyper import Hyperparameters
from quantpress.convert.arch.spec import Layout

__all__ = ["FUSED", "stored_heads"]

FUSED = (Layout.HEADS_QKV, Layout.GROUPED_QKV)


def stored_heads(hyper: Hyperparameters) -> tuple[int, ...]:
    """Gives the blocks of `head_dim` stored rows that are all query heads, then all key heads, then all value heads.

    Rows that go head by head are those of groups of one query head each.

    Args:
        hyper: sizes; `kv_heads` groups.

    Returns:
        `heads + 2 * kv_heads` numbers of stored blocks.
    """
    queries = hyper.heads // hyper.kv_heads
    firsts = range(0, hyper.kv_heads * (queries + 2), queries + 2)
    return (
        *(first + place for first in firsts for place in range(queries)),
        *(first + queries for first in firsts),
        *(first + queries + 1 for first in firsts),
    )
