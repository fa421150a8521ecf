"""What a GGUF file holds, compared with its source: tensors, settings, vocabulary.

The file is read by the official `gguf` package (`gguf_readback`), which shares nothing with the exporter.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.preflight import preflight
from quantpress.pipelines.candidate import first_part
from quantpress.pipelines.content_proof import ContentProof
from quantpress.pipelines.gguf_proof_metadata import compare_metadata
from quantpress.pipelines.gguf_proof_weights import WeightsFound, compare_weights
from quantpress.pipelines.gguf_readback import read_back

__all__ = ["gguf_content"]


def gguf_content(
    source: Checkpoint,
    artifact: Path,
    *,
    overridden: frozenset[str] = frozenset(),
    ftype: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> ContentProof:
    """Compares a file with its source.

    Args:
        source: with adapters merged, where there are any.
        artifact: the file; of a split model any part.
        overridden: metadata keys that the user has set.
        ftype: type whose limits hold; "" for that of the file.
        progress: called after each tensor.

    Raises:
        InputError: file or source cannot be read.
    """
    checked, read = preflight(source), read_back(first_part(artifact))
    metadata = compare_metadata(source, checked, read.metadata, overridden)
    if not checked.spec.gguf_opens:
        weights = WeightsFound(skipped=[f"weights: files of {checked.spec.family} cannot be read back"])
    else:
        weights = compare_weights(source, checked, read, ftype, progress)
    return ContentProof(
        tensors=weights.tensors,
        settings=metadata.settings,
        tokens=metadata.tokens,
        skipped=(*weights.skipped, *metadata.skipped),
        findings=(*weights.findings, *metadata.findings),
    )
