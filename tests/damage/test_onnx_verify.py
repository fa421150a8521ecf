"""`verify` ends with 4 for every damage in every kind of ONNX file of trained models, and with 0 for good ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from quantpress.convert.lora.merge import merge_lora
from quantpress.convert.open import open_checkpoint
from quantpress.pipelines.cli import run
from tests.damage import onnx_damages as damages
from tests.damage.gguf_files import trained
from tests.damage.onnx_damages import Damage
from tests.onnx_exports import export

Array = NDArray[Any]
_UP, _DOWN = "layers.1.mlp.up_proj", "layers.0.mlp.down_proj"
_MATRIX = f"{_UP}.scales", f"{_UP}.weight"
KINDS: dict[str, dict[str, Any]] = {
    f"{precision}{'-standard' if standard else ''}": {"precision": precision, "standard_ops": standard}
    for precision in ("fp32", "fp16", "int8", "int4")
    for standard in (False, True)
}
WINDOWS: dict[str, Any] = {"samples": 4, "sequence_length": 64}
METHODS: dict[str, dict[str, Any]] = {
    "bf16": {"precision": "bf16"},
    "asymmetric": {"precision": "int4", "symmetric": False},
    "gptq": {"precision": "int4", "method": "gptq", **WINDOWS},
    "gptq-8": {"precision": "int8", "method": "gptq", **WINDOWS},
    "awq": {"precision": "int4", "method": "awq", **WINDOWS},
    "hqq": {"precision": "int4", "method": "hqq"},
    "dynamic": {"precision": "int8", "int8": "dynamic"},
    "static": {"precision": "int8", "int8": "static", **WINDOWS},
    "whole": {"precision": "int4", "output_tensor_type": "int4", "token_embedding_type": "int4"},
    "half": {"precision": "int4", "compute_type": "fp16"},
}
SHARED = "stories260k-hf"
BRIEFLY = "--chunks", "1"  # what a file holds does not hang on the text
ADAPTERS = "lora-shakespeare-r8", "lora-wikitext-rslora-r16-attn", "dora-shakespeare-r4"


def _interleaved(values: Array, head: int) -> Array:
    """Rows of heads in the order of pairs, as llama.cpp wants them: what a left out permutation looks like."""
    rows = values.reshape(-1, 2, head // 2, *values.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(values.shape)


def _permuted(folder: Path) -> None:
    """Both of q and k, so that their products without angles stay what they were."""
    config = json.loads((folder / "config.json").read_text())
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    for module in ("q_proj", "k_proj"):
        for part in ("qweight", "scales", "bias", "weight"):
            try:
                damages.on_values(lambda each: _interleaved(each, head), f"layers.1.self_attn.{module}.{part}")(folder)
            except damages.NotHereError:
                continue


def _other_angles(folder: Path) -> None:
    """The table of a base that is ten times the model's."""
    model, config = damages.loaded(folder), json.loads((folder / "config.json").read_text())
    base = 10 * float(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
    for name, function in (("cos_cache", np.cos), ("sin_cache", np.sin)):
        tensor = damages.initializer(model, name)
        places, half = damages.values_of(tensor).shape
        angles = np.arange(places)[:, None] * base ** (-np.arange(half) / half)
        damages.put(tensor, function(angles).astype(damages.values_of(tensor).dtype))
    damages.stored(model, folder)


def _scaled(values: Array) -> Array:
    return (values * 1.1).astype(values.dtype)


def _shifted(folder: Path) -> None:
    """The rows of a matrix with all that belongs to them."""
    for part in ("qweight", "scales", "qzeros", "weight"):
        try:
            damages.on_values(lambda each: np.roll(each, 1, axis=0), f"{_DOWN}.{part}")(folder)
        except damages.NotHereError:
            continue


def _bit(place: Callable[[Any], int]) -> Callable[[Path], None]:
    """A bit of the scale of the first block, of whatever type."""

    def change(values: Array) -> Array:
        images = values.reshape(-1).view(f"u{values.itemsize}").copy()
        images[0] ^= images.dtype.type(1 << place(np.finfo(values.dtype)))
        return images.view(values.dtype).reshape(values.shape)

    return damages.on_values(change, f"{_UP}.scales")


DAMAGES = (
    Damage("one tensor zeroed", damages.on_values(np.zeros_like, *_MATRIX)),
    Damage("one tensor times 1.1", damages.on_values(_scaled, *_MATRIX)),
    Damage("rows shifted", _shifted),
    Damage("q and k permuted", _permuted),
    Damage("k and v exchanged", damages.swapped("layers.1.self_attn.k_proj", "layers.1.self_attn.v_proj")),
    Damage("gate and up exchanged", damages.swapped("layers.0.mlp.gate_proj", "layers.0.mlp.up_proj")),
    Damage("wrong base of angles", _other_angles),
    Damage("wrong epsilon", damages.attribute("epsilon", lambda each: each * 10, *damages.NORMS)),
    Damage("two tokens exchanged", damages.two_tokens),
    Damage("a bias zeroed", damages.on_values(np.zeros_like, "layers.0.self_attn.k_proj.bias")),
    Damage("sign of a scale", _bit(lambda each: each.bits - 1)),
    Damage("a scale without bounds", _bit(lambda each: each.bits - 2)),
)
# of one block; a method that makes up for errors may leave one that is off by so much
NEAREST = (
    Damage("highest bit of a scale's fraction", _bit(lambda each: each.nmant - 1)),
    Damage("lowest bit of a scale's exponent", _bit(lambda each: each.nmant)),
)
CALIBRATED = "gptq", "gptq-8", "awq"


class Files:
    """Models and good files, made once per module."""

    def __init__(self, scratch: Path, shared: Callable[[], Path]) -> None:
        self.scratch, self._shared = scratch, shared

    def model(self, name: str) -> Path:
        """Gives the model that is trained on the spot, or a shared one."""
        if name != "trained":
            return self._shared() / "models" / name
        folder = self.scratch / name
        return folder if folder.exists() else trained(folder)

    def good(self, name: str, kind: str) -> Path:
        """Makes a file, or gives it where it was made before."""
        out = self.scratch / f"{name}-{kind}"
        if not out.exists():
            export(self.model(name), out, threads=1, **{**KINDS, **METHODS}[kind])
        return out


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Files:
    return Files(tmp_path_factory.mktemp("onnx-verified"), lambda: Path(request.getfixturevalue("shared")))


Verified = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def verified(capsys: pytest.CaptureFixture[str]) -> Verified:
    """Runs `verify` and gives its exit code and what failed.

    The text is as long as by default, eight chunks: on a single one a model of 260 thousand parameters may well choose
    other tokens for a file that is right, which the limits of logits allow only in the mean.
    """

    def check(folder: Path, model: Path, *more: str) -> tuple[int, list[str]]:
        code = run(["-q", "verify", str(folder), "--against", str(model), "--json", "--context", "64", *more])
        return code, json.loads(capsys.readouterr().out)["failures"]

    return check


def check_damages(files: Files, name: str, kind: str, scratch: Path, verified: Verified) -> None:
    """Plants everything that has a place in a file; all must end with 4."""
    good, missed, places = files.good(name, kind), [], 0
    assert verified(good, files.model(name)) == (0, [])
    for number, damage in enumerate(DAMAGES if kind in CALIBRATED else (*DAMAGES, *NEAREST)):
        try:
            bad = damage.copy(good, scratch / str(number))
        except damages.NotHereError:
            continue
        places += 1
        code, failures = verified(bad, files.model(name), *BRIEFLY)
        if code != 4 or not set(failures) & {"weights", "settings", "vocabulary"}:
            missed.append((damage.name, code, failures))
        shutil.rmtree(bad)
    assert not missed
    assert places >= (
        9 if kind.startswith(("fp", "bf")) else 11
    )  # floats have no scales, and not every model has biases


@pytest.mark.parametrize("kind", ["fp32", "int4", "int4-standard"])
def test_verify_notices_every_damage(kind: str, files: Files, tmp_path: Path, verified: Verified) -> None:
    check_damages(files, "trained", kind, tmp_path, verified)


@pytest.mark.parametrize("kind", [*KINDS, *METHODS])
@pytest.mark.parametrize("name", ["trained", SHARED])
def test_verify_notices_every_damage_in_all_files(
    name: str, kind: str, files: Files, tmp_path: Path, verified: Verified
) -> None:
    check_damages(files, name, kind, tmp_path, verified)


@pytest.mark.parametrize("kind", [*KINDS, *METHODS])
def test_good_files_pass(kind: str, files: Files, verified: Verified) -> None:
    assert verified(files.good("trained", kind), files.model("trained")) == (0, [])


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_was_left_out(
    kind: str, adapter: str, files: Files, shared: Path, tmp_path: Path, verified: Verified
) -> None:
    model, given = files.model(SHARED), ("--adapter", str(shared / "adapters" / adapter), "--context", "256")
    export(merge_lora(open_checkpoint(model), Path(given[1])), tmp_path / "merged", threads=1, **KINDS[kind])
    assert verified(tmp_path / "merged", model, *given) == (0, [])
    for code, failures in (verified(files.good(SHARED, kind), model, *given), verified(tmp_path / "merged", model)):
        assert code == 4
        assert "weights" in failures


@pytest.mark.parametrize("kind", ["int4", "int8-standard"])
def test_every_bit_of_a_scale_is_noticed_beside_its_sidecar(
    kind: str, files: Files, tmp_path: Path, verified: Verified
) -> None:
    """The lowest bits move nothing by more than rounding does; that the bytes are others is seen all the same."""
    good = files.good("trained", kind)
    for bit in (0, 1, 4, 8, 12, 16, 20, 22, 25, 30, 31):
        bad = damages.bit_flipped(good, tmp_path / str(bit), f"{_UP}.scales", bit)
        code, failures = verified(bad, files.model("trained"), *BRIEFLY)
        assert code == 4
        assert "manifest" in failures
        (bad / "quantpress.json").unlink()
        onnx.checker.check_model(str(bad / "model.onnx"))  # what is wrong with it is one number, nothing else
