"""What a file holds, compared with what its source holds: weights, settings and vocabulary, one by one.

Figures of logits are sums over a whole model; a tensor scaled by a tenth, a block that is damaged or two tokens that
have changed places can hide in what quantization is allowed to lose. Here every tensor is read back and laid beside its
source's, every setting that the runtime reads beside the source's own, every token beside the tokenizer's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["ContentProof", "Finding"]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something in a file that is not what its source says.

    Attributes:
        measure: what noticed it: "weights", "settings" or "vocabulary".
        name: the tensor, metadata key or token.
        found: in words, with the figure.
        wanted: in words, with the limit.
    """

    measure: str
    name: str
    found: str
    wanted: str

    def __str__(self) -> str:
        return f"{self.name}: {self.found}, wanted {self.wanted}"


@dataclass(frozen=True, slots=True)
class ContentProof:
    """What was compared and what was found.

    Attributes:
        tensors: number of tensors that were compared with the source's.
        settings: number of settings that were compared.
        tokens: number of tokens of the vocabulary that were compared.
        skipped: what could not be compared, each with the reason.
        findings: what differs by more than the type of the file explains; empty for a good file.
    """

    tensors: int = 0
    settings: int = 0
    tokens: int = 0
    skipped: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The ``content`` object of a parity report."""
        return {
            "tensors": self.tensors,
            "settings": self.settings,
            "tokens": self.tokens,
            "skipped": list(self.skipped),
            "findings": [
                {"measure": each.measure, "name": each.name, "found": each.found, "wanted": each.wanted}
                for each in self.findings
            ],
        }
