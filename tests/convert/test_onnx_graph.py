"""The ONNX graph against transformers: whole texts, in onnxruntime's operators and in those of the standard."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from quantpress.convert.onnx.decoder import check_graph, shares_cache
from quantpress.convert.onnx.options import OnnxOptions
from quantpress.quant.errors import UsageError
from tests.onnx_graphs import Source, checked, operators, tiny_source, write_model
from tests.onnx_runs import OnnxRun
from tests.tiny import tiny_case

LENGTH = 40  # longer than every window (8, 5) and training length (16, 32) of the tiny models
# float32 sums of up to 160 products through 3 to 6 layers, in another order: 1.4e-5 was the most seen; a wrong formula
# is off by 1e-2 or more
TOLERANCE = 5e-5
# every option of the layer is on in one of them and off in another; tests/pipelines/test_onnx_families.py has them all
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    name: (tiny_case(name).family, dict(tiny_case(name).options))
    for name in (
        "llama", "llama-bias", "llama-longrope-factor", "mistral-head_dim", "qwen3-window", "gemma2-caps",
        "gemma3-linear", "phi3-mini4", "gpt2-inverse", "gpt2-erf", "gptneox",
    )
}  # fmt: skip
CASES["llama-8"] = ("llama", {"head_dim": 8, "rms_norm_eps": 0.01})
CASES["llama-12"] = ("llama", {"head_dim": 12})

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")

Make = Callable[[str], Source]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Gives a function that makes the checkpoint of a case once."""
    made: dict[str, Source] = {}

    def one(name: str) -> Source:
        if name not in made:
            family, options = CASES[name]
            made[name] = tiny_source(tmp_path_factory.mktemp("tiny") / name, family, **options)
        return made[name]

    return one


def some_tokens(length: int = LENGTH) -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).integers(4, 320, length)


@pytest.mark.parametrize("standard", [False, True], ids=["contrib", "standard"])
@pytest.mark.parametrize("name", CASES)
def test_a_text_gets_the_logits_of_transformers_and_the_checker_passes(
    make: Make, tmp_path: Path, name: str, standard: bool
) -> None:
    source, tokens = make(name), some_tokens()
    folder = write_model(tmp_path / "onnx", source, standard=standard)
    model = checked(folder)
    found, wanted = OnnxRun(folder).logits(tokens), source.logits(tokens)
    assert np.abs(wanted).max() > 1
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)
    grouped = not standard and source.hyper.head_dim % 8 == 0
    assert ("GroupQueryAttention*" in operators(model)) == grouped
    assert all(node.domain == "" for node in model.graph.node) or not standard


@pytest.mark.parametrize(
    ("name", "standard", "opset"),
    [
        *(("qwen3-window", False, opset) for opset in (21, 22, 24, 25, 26)),
        *(("gemma2-caps", True, opset) for opset in (24, 25, 26)),
        ("gemma3-linear", False, 21),
        ("llama-8", False, 21),
        ("phi3-mini4", False, 22),
        ("gptneox", False, 21),
        ("llama-12", False, 26),
    ],
)
def test_every_opset_computes_the_same(make: Make, tmp_path: Path, name: str, standard: bool, opset: int) -> None:
    source, tokens = make(name), some_tokens()
    folder = write_model(tmp_path / "onnx", source, standard=standard, opset=opset)
    assert {each.domain: each.version for each in checked(folder).opset_import}[""] == opset
    np.testing.assert_allclose(OnnxRun(folder).logits(tokens), source.logits(tokens), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("standard", [False, True], ids=["contrib", "standard"])
@pytest.mark.parametrize("name", ["llama", "mistral-head_dim", "qwen3-window", "gemma2-caps", "phi3-mini4", "gptneox"])
def test_float16_differs_by_its_rounding_only(make: Make, tmp_path: Path, name: str, standard: bool) -> None:
    """About 15 roundings a layer of 2^-11 each, half of them of values that end up in the logits; they add up as
    errors of random sign do: 2^-11 * sqrt(15 * 4) = 0.4 % of the largest logits. Twice that is allowed."""
    source, tokens = make(name), some_tokens()
    folder = write_model(tmp_path / "onnx", source, standard=standard, half=True)
    checked(folder)
    found, wanted = OnnxRun(folder).logits(tokens), source.logits(tokens)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.008 * np.abs(wanted).max())


def test_a_layer_of_a_plain_family_is_twelve_nodes(make: Make, tmp_path: Path) -> None:
    model = checked(write_model(tmp_path / "onnx", make("llama")))
    assert operators(model, under="/layers.1/") == [
        "SkipSimplifiedLayerNormalization*", *["FusedMatMul*"] * 3, "GroupQueryAttention*", "FusedMatMul*",
        "SkipSimplifiedLayerNormalization*", *["FusedMatMul*"] * 2, "QuickGelu*", "Mul", "FusedMatMul*",
    ]  # fmt: skip


@pytest.mark.parametrize("standard", [False, True], ids=["contrib", "standard"])
@pytest.mark.parametrize("name", ["gemma3-linear", "phi3-mini4", "gpt2-inverse"])
def test_no_layer_looks_at_the_mask_again(make: Make, tmp_path: Path, name: str, standard: bool) -> None:
    model = checked(write_model(tmp_path / "onnx", make(name), standard=standard))
    once = {"ArgMax", "Cast", "CumSum", "GatherElements", "Range", "ReduceSum", "Shape", "Slice", "Unsqueeze", "Where"}
    assert once & set(operators(model))
    assert not once & set(operators(model, under="/layers."))


@pytest.mark.parametrize("standard", [False, True], ids=["contrib", "standard"])
@pytest.mark.parametrize("name", ["llama-bias", "qwen3-window", "gemma2-caps", "phi3-mini4", "gpt2-inverse", "gptneox"])
def test_every_value_has_the_type_and_shape_that_the_file_says(
    make: Make, tmp_path: Path, name: str, standard: bool
) -> None:
    folder = write_model(tmp_path / "onnx", make(name), standard=standard)
    model = checked(folder)
    known = {each.name: each for each in (*model.graph.value_info, *model.graph.output)}
    names = [value for node in model.graph.node for value in node.output if value]
    assert [value for value in names if value not in known] == []
    outputs = {each.name for each in model.graph.output}
    model.graph.output.extend(known[value] for value in names if value not in outputs)
    onnx.save(model, folder / "model.onnx")
    for batch, new, past in ((3, 5, 0), (2, 1, 6)):
        run = OnnxRun(folder, optimize=False)
        cache = {key: np.zeros((batch, *each.shape[1:2], past, each.shape[3]), np.float32) for key, each in
                 run.inputs.items() if key.startswith("past")}  # fmt: skip
        mask = np.ones((batch, new + past), np.int64)
        values = run.session.run(None, {"input_ids": np.full((batch, new), 9), "attention_mask": mask, **cache})
        sizes = {
            "batch_size": batch,
            "sequence_length": new,
            "total_sequence_length": new + past,
            "earlier_sequence_length": past,
        }
        for output, value in zip(run.session.get_outputs(), values, strict=True):
            shape = known[output.name].type.tensor_type.shape.dim
            assert value.shape == tuple(sizes.get(dim.dim_param, dim.dim_value) for dim in shape), output.name
            wanted = onnx.helper.tensor_dtype_to_np_dtype(known[output.name].type.tensor_type.elem_type)
            assert value.dtype == wanted, output.name


def test_onnxruntime_has_nothing_to_warn_of(make: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = write_model(tmp_path / "onnx", make("gemma3-linear"))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 2
    onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    # the search for graphics processors warns on some machines
    assert [line for line in capfd.readouterr().err.splitlines() if "device_discovery" not in line] == []


def test_heads_that_need_the_standards_attention_want_its_opset(make: Make, tmp_path: Path) -> None:
    source = make("llama-12")
    with pytest.raises(UsageError, match=r"--opset 22: heads of 12 values .* use --opset 23"):
        write_model(tmp_path / "onnx", source, opset=22)
    check_graph(source.hyper, standard=False, opset=23)
    check_graph(make("llama-8").hyper, standard=False, opset=21)


def test_only_a_cache_of_group_query_attention_may_be_shared(make: Make) -> None:
    assert shares_cache(make("llama").hyper, OnnxOptions())
    assert not shares_cache(make("llama").hyper, OnnxOptions(standard_ops=True))
    assert not shares_cache(make("llama-12").hyper, OnnxOptions())
