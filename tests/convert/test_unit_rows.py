"""The head of Baichuan 2: rows of length 1 wherever it is read, against torch's own normalize."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import quantpress as qp
from quantpress.convert.open import open_checkpoint
from quantpress.convert.preflight import preflight
from quantpress.convert.weights import CheckpointWeights
from quantpress.quant.errors import InputError
from tests.families.baichuan import CASES
from tests.families.cases import write_checkpoint
from tests.gguf_exports import tensors_of, values_of

HEAD = "lm_head.weight"
# a float32 sum of 64 squares, a root and a division: each at most half a unit in the last place of numbers up to 1
CLOSE = 2.0**-22


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Baichuan 2 with a row of zeros, in two types."""
    made = write_checkpoint(
        next(case for case in CASES if case.id == "baichuan2-7b"), tmp_path_factory.mktemp("head") / "model"
    )
    tensors: dict[str, Any] = load_file(made / "model.safetensors")
    tensors[HEAD][5] = 0.0
    kind = np.float32 if request.param == "float32" else ml_dtypes.bfloat16
    save_file({name: values.astype(kind) for name, values in tensors.items()}, made / "model.safetensors")
    return made


def wanted(folder: Path) -> np.ndarray:
    stored = load_file(folder / "model.safetensors")[HEAD].astype(np.float32)
    found: np.ndarray = torch.nn.functional.normalize(torch.from_numpy(stored)).numpy()
    return found


def test_the_decoder_has_rows_of_length_one(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    checked = preflight(checkpoint)
    head = CheckpointWeights(checkpoint, checked.spec, checked.hyper)("output.weight", -1)
    assert head is not None
    np.testing.assert_allclose(head.float().numpy(), wanted(folder), rtol=0, atol=CLOSE)


def test_a_gguf_file_has_rows_of_length_one_and_is_opened_as_it_is(folder: Path, tmp_path: Path) -> None:
    qp.export_gguf(folder, tmp_path / "m.gguf", outtype="f32", verify=False, threads=2)
    found = values_of(tensors_of(tmp_path / "m.gguf")["output.weight"])
    np.testing.assert_allclose(found, wanted(folder), rtol=0, atol=CLOSE)
    again = preflight(open_checkpoint(tmp_path / "m.gguf"))
    head = next(tensor for row, _, tensor in again.bindings if row.slot == "output.weight")
    np.testing.assert_array_equal(head.read(), found)


def test_a_copy_keeps_the_rows_as_they_are_stored(folder: Path, tmp_path: Path) -> None:
    qp.export_safetensors(folder, tmp_path / "out", verify=False)
    left, right = (load_file(each / "model.safetensors")[HEAD] for each in (folder, tmp_path / "out"))
    np.testing.assert_array_equal(left.astype(np.float32), right.astype(np.float32))


def test_a_head_of_codes_is_refused(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    codes: Any = {HEAD: object()}
    with pytest.raises(InputError, match=r"'lm_head\.weight' is codes"):
        preflight(replace(checkpoint, quantized=codes))
