"""Counters by which programs that share a sum find out which of them is the last."""

from __future__ import annotations

import torch

__all__ = ["counters"]

_kept: dict[tuple[torch.device, int], torch.Tensor] = {}


def counters(device: torch.device, count: int) -> torch.Tensor:
    """Gives int32 counters that are zero; a kernel that uses them leaves them zero.

    They are kept per device and stream, whose launches follow each other. A launch that is captured in a CUDA graph may
    be replayed beside anything: it gets counters of its own, zeroed by the graph.

    Args:
        device: of the launch.
        count: counters that are needed.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    kept = _kept.get(key)
    if kept is None or len(kept) < count:
        _kept[key] = kept = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
    return kept
