"""What a file holds, compared with what its source holds: weights, settings and vocabulary, one by one.

Figures of logits are sums over a whole model; a tensor scaled by a tenth, a block that is damaged or two tokens that
have changed places can hide in what quantization is allowed to lose. Here every tensor is read back and laid beside its
source's, every setting that the runtime reads beside the source's own, every token beside the tokenizer's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantpress.convert.checkpoint import Checkpoint

__all__ = ["ContentProof", "Finding", "chosen_keys", "prove_content"]

_FOLDERS = "quantpress.pipelines.checkpoint_proof"


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


def chosen_keys(stages: Any) -> frozenset[str]:
    """Gives the metadata keys that a user has set with --override-kv, of the `stages` that a sidecar names.

    Args:
        stages: as they are in the sidecar; a damaged one names none.
    """
    options = [each.get("options") for each in stages if isinstance(each, dict)] if isinstance(stages, list) else []
    given = [each.get("override_kv") for each in options if isinstance(each, dict)]
    texts = [text for each in given if isinstance(each, (list, tuple)) for text in each]
    return frozenset(text.partition("=")[0] for text in texts if isinstance(text, str))


def prove_content(
    source: Checkpoint,
    artifact: Path,
    chosen: Iterable[str] = (),
    ftype: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> ContentProof | None:
    """Compares what a file holds with its source; None where nothing compares files of its kind.

    Args:
        source: with adapters merged, where there are any.
        artifact: GGUF file (of a split model the first part), ONNX model or checkpoint folder.
        chosen: metadata keys of a GGUF file that the user has set by hand.
        ftype: type whose limits hold: where it is one of codes, floats of a GGUF file may stand for codes.
        progress: told the tensors of a GGUF file that have been compared.

    Raises:
        InputError: one of the two cannot be read.
    """
    from quantpress.convert.onnx.read_folder import is_onnx

    if is_onnx(artifact):
        from quantpress.pipelines.onnx_proof import onnx_content

        return onnx_content(source, artifact)
    if artifact.suffix.lower() == ".gguf":
        from quantpress.pipelines.gguf_proof import gguf_content

        return gguf_content(source, artifact, overridden=frozenset(chosen), ftype=ftype, progress=progress)
    if find_spec(_FOLDERS) is None:
        return None
    from quantpress.pipelines.checkpoint_proof import checkpoint_content

    found: ContentProof = checkpoint_content(source, artifact)
    return found
