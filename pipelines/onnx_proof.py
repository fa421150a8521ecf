"""What an ONNX model holds, compared with its source: weights, the numbers of its operators, configuration, tokenizer.

Names of tensors and nodes are those that this program gives; of other programs' models only the tokenizer and
config.json are compared, for what their names mean is not known.
"""

from __future__ import annotations

from pathlib import Path

from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.onnx.read import open_onnx
from quantpress.convert.preflight import preflight
from quantpress.pipelines.content_proof import ContentProof
from quantpress.pipelines.onnx_proof_config import compare_config
from quantpress.pipelines.onnx_proof_settings import SettingsFound, compare_settings
from quantpress.pipelines.onnx_proof_tokens import compare_tokens
from quantpress.pipelines.onnx_proof_weights import WeightsFound, compare_weights

__all__ = ["onnx_content"]

_OURS = "quantpress"


def onnx_content(source: Checkpoint, artifact: Path) -> ContentProof:
    """Compares a model with its source.

    Args:
        source: with adapters merged, where there are any.
        artifact: the folder or the .onnx file.

    Raises:
        InputError: the model or the source cannot be read.
    """
    model, checked = open_onnx(artifact), preflight(source)
    tokens = compare_tokens(source, model.folder.tokenizer_files)
    settings = SettingsFound()
    weights, skipped = WeightsFound(), tuple[str, ...]()
    if not model.producer.startswith(_OURS):
        skipped = (f"weights and settings: made by {model.producer or 'another program'}, whose names are not known",)
    elif checked.spec.kind == "encoder_decoder":
        skipped = ("weights and settings: an encoder-decoder has two graphs, which are judged by what they compute",)
    else:
        compare_config(settings, model, source, checked)
        compare_settings(settings, model, checked.hyper)
        weights = compare_weights(model, source, checked)
    return ContentProof(
        tensors=weights.tensors,
        settings=settings.count,
        tokens=tokens.tokens,
        skipped=(*skipped, *weights.skipped, *settings.skipped, *tokens.skipped),
        findings=(*weights.findings, *settings.findings, *tokens.findings),
    )
