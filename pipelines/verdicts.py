"""Verdicts that change because of what else was found: how much of the adapters is in a file, what a proof says."""

from __future__ import annotations

import dataclasses

from quantpress.pipelines.adapter_share import AdapterShare
from quantpress.pipelines.parity import Parity

__all__ = ["failed", "with_share"]


def failed(parity: Parity, problem: str) -> Parity:
    """Gives a verdict that is not passed, for one more reason."""
    reason = f"{parity.reason}; {problem}" if parity.reason and not parity.passed else problem
    return dataclasses.replace(parity, passed=False, reason=reason)


def with_share(parity: Parity, share: AdapterShare | None) -> Parity:
    """Turns a verdict into a failure where the adapters' effect is not in the file."""
    if share is None or not parity.tokens:
        return parity
    said = share.problem or (share.doubt if parity.passed else "")
    return dataclasses.replace(
        parity,
        passed=parity.passed and not share.problem,
        reason="; ".join(filter(None, ("" if parity.passed and share.problem else parity.reason, said))),
        adapter_share=share,
    )
