"""Counters by which programs that share a sum find out which of them is the last."""

from __future__ import annotations

import torch

__all__ = ["counters"]

_SET_ASIDE = 1 << 20  # counters for captured launches: 4 MiB, thousands of launches

_kept: dict[tuple[torch.device, int], torch.Tensor] = {}
_set_aside: dict[torch.device, torch.Tensor] = {}
_taken: dict[torch.device, int] = {}


def counters(device: torch.device, count: int) -> torch.Tensor:
    """Gives int32 counters that are zero; a kernel that uses them leaves them zero.

    They are kept per device and stream, whose launches follow each other. A launch that is captured in a CUDA graph may
    be replayed beside anything: it gets counters of its own. They were zeroed before the capture, because zeroing them
    in the graph would be one more launch, as long as a small product.

    Args:
        device: of the launch.
        count: counters that are needed.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return _own(device, count)
    if device not in _set_aside:
        _set_aside[device] = torch.zeros(_SET_ASIDE, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    kept = _kept.get(key)
    if kept is None or len(kept) < count:
        _kept[key] = kept = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
    return kept


def _own(device: torch.device, count: int) -> torch.Tensor:
    """Gives counters that no other launch gets; they are never given back, because nobody says when a graph is gone.

    Where nothing ran before the capture, or too much was captured, the graph zeroes them.
    """
    first = _taken.get(device, 0)
    if device not in _set_aside or first + count > _SET_ASIDE:
        return torch.zeros(count, dtype=torch.int32, device=device)
    _taken[device] = first + -(-count // 32) * 32  # lines of the cache are not shared
    return _set_aside[device][first : first + count]
