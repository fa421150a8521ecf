"""Encoders as ONNX against transformers: padded batches, token types, both kinds of operators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.onnx.export import plan_onnx, write_onnx
from quantpress.convert.onnx.options import OnnxOptions
from quantpress.convert.open import open_checkpoint
from quantpress.convert.preflight import preflight
from tests.onnx_graphs import checked, operators

# float32 sums of up to 96 products through 3 layers that are normalized after each sum, in another order
TOLERANCE = 2e-5
_SIZES = {
    "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96,
    "max_position_embeddings": 66,
}  # fmt: skip
_OPTIONS: dict[str, dict[str, Any]] = {
    "contrib": {},
    "opset-21": {"opset": 21},
    "standard": {"standard_ops": True},
}

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")


class Encoder:
    """A tiny random encoder and transformers' model of it."""

    def __init__(self, family: str, folder: Path) -> None:
        from transformers import AutoConfig, AutoModel, logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.set_num_threads(1)
        torch.manual_seed(4)
        pad = {"pad_token_id": 1, "type_vocab_size": 1} if family == "roberta" else {}
        config = AutoConfig.for_model(family, **_SIZES, **pad)
        self.model = AutoModel.from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.15)
        self.model.save_pretrained(folder)
        self.source: Checkpoint = open_checkpoint(folder)
        self.types = family == "bert"
        random = np.random.default_rng(2)
        self.mask = np.ones((2, 20), np.int64)
        self.mask[1, 13:] = 0
        self.ids = np.where(self.mask == 1, random.integers(5, 300, (2, 20)), 1)
        self.given = {"input_ids": self.ids, "attention_mask": self.mask}
        if self.types:
            self.given["token_type_ids"] = (np.arange(20) > 7).astype(np.int64)[None].repeat(2, 0)

    def wanted(self) -> NDArray[np.float32]:
        with torch.no_grad():
            found = self.model(**{name: torch.from_numpy(value) for name, value in self.given.items()})
        states: NDArray[np.float32] = found.last_hidden_state.numpy()
        return states


@pytest.fixture(scope="module", params=["bert", "roberta", "distilbert"])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return Encoder(request.param, tmp_path_factory.mktemp("encoder") / request.param)


def export(folder: Path, source: Checkpoint, **options: Any) -> onnxruntime.InferenceSession:
    write_onnx(folder, plan_onnx(source, preflight(source), OnnxOptions(**options)), threads=1)
    return onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", _OPTIONS)
def test_states_of_a_padded_batch_are_those_of_transformers(encoder: Encoder, tmp_path: Path, name: str) -> None:
    session = export(tmp_path / "onnx", encoder.source, **_OPTIONS[name])
    model = checked(tmp_path / "onnx")
    assert {each.name for each in session.get_inputs()} == set(encoder.given)
    assert [each.name for each in session.get_outputs()] == ["last_hidden_state"]
    assert ("MultiHeadAttention*" in operators(model)) == (name != "standard")
    assert all(node.domain == "" for node in model.graph.node) or name != "standard"
    found = session.run(None, encoder.given)[0]
    real = encoder.mask == 1
    np.testing.assert_allclose(found[real], encoder.wanted()[real], rtol=0, atol=TOLERANCE)


def test_there_are_no_settings_for_a_generator(encoder: Encoder, tmp_path: Path) -> None:
    export(tmp_path / "onnx", encoder.source)
    assert not (tmp_path / "onnx" / "genai_config.json").exists()


@pytest.mark.parametrize("embedding", [None, "int8"])
def test_the_embedding_has_the_type_that_is_asked_for_and_nothing_is_stored_in_vain(
    encoder: Encoder, tmp_path: Path, embedding: str | None
) -> None:
    """Rounded to 8 bits, a state of a few units is off by a few hundredths after three layers."""
    session = export(tmp_path / "onnx", encoder.source, precision="int8", block_size=32, token_embedding_type=embedding)
    model = checked(tmp_path / "onnx")
    assert ("GatherBlockQuantized*" in operators(model)) == (embedding == "int8")
    used = {name for node in model.graph.node for name in node.input}
    assert [each.name for each in model.graph.initializer if each.name not in used] == []
    found, wanted = session.run(None, encoder.given)[0], encoder.wanted()
    real = encoder.mask == 1
    assert np.abs(found[real] - wanted[real]).max() < 0.05 * np.abs(wanted).max()
