"""Verdicts that change because of what else was found: how much of the adapters is in a file, what a proof says."""

from __future__ import annotations

import dataclasses

from quantpress.pipelines.adapter_share import AdapterShare
from quantpress.pipelines.content_proof import ContentProof
from quantpress.pipelines.parity import Parity

__all__ = ["failed", "with_content", "with_share"]


def failed(parity: Parity, problem: str, *measures: str) -> Parity:
    """Gives a verdict that is not passed, for one more reason that these measures have noticed."""
    reason = f"{parity.reason}; {problem}" if parity.reason and not parity.passed else problem
    failures = tuple(dict.fromkeys((*parity.failures, *measures)))
    return dataclasses.replace(parity, passed=False, reason=reason, failures=failures)


def with_content(parity: Parity, content: ContentProof) -> Parity:
    """Turns a verdict into a failure where a file does not hold what its source does."""
    found = dataclasses.replace(parity, content=content)
    if not content.findings:
        return found
    first, more = content.findings[0], len(content.findings) - 1
    problem = str(first) + (f", and {more} more like it (content.findings)" if more else "")
    return failed(found, problem, *(each.measure for each in content.findings))


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
        failures=(*parity.failures, *(("adapter_share",) if share.problem else ())),
    )
