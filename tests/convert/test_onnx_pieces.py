"""Codes of a matrix that a family keeps with others in one are codes in the ONNX model too."""

from __future__ import annotations

from pathlib import Path

import onnx

from tests.families.cases import write_checkpoint
from tests.families.registered import ALL
from tests.onnx_exports import export


def test_codes_of_pieces_of_a_fused_matrix_stay_codes(tmp_path: Path) -> None:
    case = next(each for each in ALL if str(each) == "internlm2")
    model = write_checkpoint(case, tmp_path / "model")
    export(model, tmp_path / "out", precision="int4", method="hqq", block_size=32)
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    pieces = [each.name for each in graph.initializer if ":q" in each.name]
    assert pieces
    assert all(":q." in name for name in pieces), pieces  # ":q" alone is a matrix of floats
