"""The end of a product whose sums along K several programs share: partial sums in slabs, added by the last program.

One launch does it: every program writes its sums into a slab of its own and counts itself; the one that finds that all
others of its block have come adds the slabs in their order and goes on to the bias, the rounding and the store. So the
order of the sum never changes, and nothing needs to be zeroed. Atomic additions into one slab would save the last
program the reading of `splits` small tiles that lie in the second-level cache, and cost a launch that zeroes the slab.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantpress.kernels.workspace import counters

__all__ = ["sum_slabs", "workspace"]


def workspace(device: torch.device, splits: int, rows_in: int, rows: int, blocks: int) -> tuple[torch.Tensor, ...]:
    """Gives slabs (splits, M, N) float32, uninitialized, and one counter for each block; of one element without splits.

    Args:
        device: of the launch.
        splits: programs that share the sums of a block.
        rows_in: M.
        rows: N.
        blocks: blocks of outputs.
    """
    if splits == 1:
        return torch.empty(1, device=device), torch.empty(1, dtype=torch.int32, device=device)
    return torch.empty((splits, rows_in, rows), device=device), counters(device, blocks)


@triton.jit  # type: ignore[untyped-decorator]
def sum_slabs(  # type: ignore[no-untyped-def]
    sums, slabs, arrived, block, split, place, inside, slab_size, splits: tl.constexpr,
):  # fmt: skip
    """Gives the sums of all programs of a block to the last of them, and whether this program is the last.

    `sums` are this program's, `place` (int64) and `inside` where they are in a slab of `slab_size` elements; `arrived`
    points to the counters of the blocks. What programs that are not the last get is of no use.
    """
    last = True
    if splits > 1:
        tl.store(slabs + split.to(tl.int64) * slab_size + place, sums, mask=inside)
        tl.debug_barrier()  # all threads' stores come before the one that counts
        before = tl.atomic_add(arrived + block, 1, sem="acq_rel")
        last = before == splits - 1
        if last:
            sums = tl.zeros_like(sums)
            for _ in range(splits):
                # past the first-level cache, which may hold what was there before
                sums += tl.load(slabs + place, mask=inside, cache_modifier=".cg")
                place += slab_size
            tl.store(arrived + block, 0)
    return sums, last
