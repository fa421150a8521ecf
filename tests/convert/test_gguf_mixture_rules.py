"""The rules of mixtures against the real llama-quantize: what it gave to many models is in mixture_golden.json."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantpress.convert.arch.spec import Role
from quantpress.convert.gguf.file_types import FILE_TYPES
from quantpress.convert.gguf.importance import Importance, ImportanceMatrix
from quantpress.convert.gguf.mixture import FLOATS, Matrix, Mixture, TypeOptions
from quantpress.convert.gguf.mixture_rules import MODEL_RULES, ModelFacts
from quantpress.convert.gguf.plan import TensorPlan, plan_tensors
from quantpress.pipelines.llama_cpp_find import ENVIRONMENT_VARIABLE, find_llama_cpp
from quantpress.quant.errors import UsageError
from tests.llama_quantize import LlamaQuantize, Model, Options, packed, quantizer, write
from tests.mixture_cases import FAMILY_CASES, MODEL_CASES, OPTION_CASES, named, random_model, random_options

GOLDEN: Mapping[str, Any] = json.loads(Path(__file__).with_name("mixture_golden.json").read_text("utf-8"))
RULED = [name for name in FILE_TYPES if name not in FLOATS]


def check(types: Mapping[str, str], expected: Mapping[str, str], layers: int) -> None:
    """Types by name are those of the file: `*` is the usual one, and what differs is named."""
    rows = {name for name in expected if name != "*"}
    listed = {name.format(layer) for name in rows for layer in range(layers if "{}" in name else 1)}
    found = packed(types, sorted(rows), layers)
    assert found == {name: expected[name] for name in found}
    assert {kind for name, kind in types.items() if name not in listed} <= {expected["*"]}


def choose(model: Model, ftype: str, options: Options) -> dict[str, str] | None:
    """Our types of a model; None where an importance matrix is missing."""
    facts = ModelFacts(model.arch, model.layers, model.heads, model.kv_heads, model.experts)
    asked = TypeOptions(
        tensor_types=tuple(options.tensor_types),
        output_tensor_type=options.output_tensor_type,
        token_embedding_type=options.token_embedding_type,
        leave_output_tensor=options.leave_output_tensor,
        pure=options.pure,
    )
    matrices = [Matrix(name, _role(name, shape), shape, model.stored) for name, shape in model.named().items()]
    chosen = Mixture(asked, ftype, facts, importance=options.imatrix).choose(matrices)
    if not options.imatrix and any(choice.needs_importance for choice in chosen.values()):
        return None
    return {name: choice.type for name, choice in chosen.items()}


def _role(name: str, shape: tuple[int, ...]) -> Role:
    if len(shape) == 1 or name.endswith("_norm.weight"):
        return Role.NORM
    return {"token_embd.weight": Role.EMBEDDING, "output.weight": Role.HEAD}.get(name, Role.LINEAR)


def _matrices(types: Mapping[str, str], model: Model) -> dict[str, str]:
    shapes = model.named()
    return {name: kind for name, kind in types.items() if len(shapes[name]) > 1}


def test_the_golden_types_are_of_the_version_that_the_rules_name() -> None:
    assert GOLDEN["made"].startswith(MODEL_RULES)
    assert (set(GOLDEN["families"]), set(GOLDEN["models"])) == (set(FAMILY_CASES), set(MODEL_CASES))
    for found in (*GOLDEN["families"].values(), *GOLDEN["models"].values()):
        assert set(RULED) <= set(found["files"])


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_every_file_of_a_family_has_the_types_that_llama_quantize_gives(case: str) -> None:
    checked = named(FAMILY_CASES[case])

    def plan(file: str) -> TensorPlan:
        ftype, _, imatrix = file.partition("+")
        return plan_tensors(
            checked.bindings, checked.spec, checked.hyper, TypeOptions(outtype=ftype), has_importance=bool(imatrix)
        )

    for file, expected in GOLDEN["families"][case]["files"].items():
        if expected is None:
            with pytest.raises(
                UsageError, match=r"--outtype q2_k_s: tensor 'blk\.\d+\.\w+\.weight' as Q2_K .*--imatrix"
            ):
                plan(file)
            continue
        tensors = plan(file).tensors
        types = {tensor.name: tensor.type for tensor in tensors if len(tensor.shape) > 1}
        check(types, expected, checked.hyper.layers)


@pytest.mark.parametrize("case", MODEL_CASES)
def test_models_that_no_family_here_has_get_the_types_that_llama_quantize_gives(case: str) -> None:
    model = MODEL_CASES[case]
    for file, expected in GOLDEN["models"][case]["files"].items():
        ftype, _, imatrix = file.partition("+")
        if case == "one-row" and ftype == "Q8_0":
            continue  # the rules of Q8_0 are the converter's, and that knows no such exception
        types = choose(model, ftype, Options(imatrix=bool(imatrix)))
        assert (types is None) == (expected is None), file
        if types is not None:
            check(_matrices(types, model), expected, model.layers)


@pytest.mark.parametrize("number", range(len(OPTION_CASES)))
def test_options_mean_what_they_mean_to_llama_quantize(number: int) -> None:
    case, ftype, options = OPTION_CASES[number]
    types, expected = choose(MODEL_CASES[case], ftype, options), GOLDEN["asked"][number]
    assert (types is None) == (expected is None)
    if types is not None:
        check(_matrices(types, MODEL_CASES[case]), expected, MODEL_CASES[case].layers)


def test_the_order_of_the_tensors_does_not_matter() -> None:
    model = MODEL_CASES["values-in-some-layers"]
    facts = ModelFacts(model.arch, model.layers, model.heads, model.kv_heads)
    matrices = [Matrix(name, _role(name, shape), shape, "F16") for name, shape in model.named().items()]
    mixture = Mixture(TypeOptions(), "Q4_K_M", facts)
    chosen = mixture.choose(matrices)
    for seed in range(5):
        random.Random(seed).shuffle(matrices)
        assert mixture.choose(matrices) == chosen


def test_an_importance_matrix_without_the_tensor_is_as_none_at_all() -> None:
    checked = named(FAMILY_CASES["llama-3.2-1b"])

    def plan(**more: Any) -> TensorPlan:
        options = TypeOptions(outtype="q2_k_s")
        return plan_tensors(checked.bindings, checked.spec, checked.hyper, options, **more)

    tensors = plan(has_importance=True).tensors
    lacking = next(tensor for tensor in tensors if tensor.type == "Q2_K")
    entries = {
        tensor.name: Importance(np.ones((1, tensor.shape[-1]), np.float32), np.ones(1, np.float32))
        for tensor in tensors
        if len(tensor.shape) == 2 and tensor.name not in (lacking.name, "token_embd.weight")
    }
    with pytest.raises(UsageError, match=f"tensor '{lacking.name}' as Q2_K is garbage"):
        plan(importance=ImportanceMatrix(entries))
    found = plan(importance=ImportanceMatrix(entries), blocks={lacking.source.name: lacking.source}).tensors
    assert [tensor.type for tensor in found] == [tensor.type for tensor in tensors]


@pytest.fixture(scope="module")
def llama_quantize() -> LlamaQuantize:
    named_one = find_llama_cpp() if os.environ.get(ENVIRONMENT_VARIABLE) else None
    found = quantizer(named_one.path) if named_one else None
    if found is None:
        pytest.skip(f"{ENVIRONMENT_VARIABLE} names no library of llama.cpp 0.5.0 with llama_model_quantize")
    return found


@pytest.mark.parametrize("seed", range(30))
def test_random_models_get_the_types_that_llama_quantize_gives(
    seed: int, llama_quantize: LlamaQuantize, tmp_path: Path
) -> None:
    draw = random.Random(seed)
    model = random_model(draw)
    source = write(tmp_path / "model.gguf", model)
    for ftype in draw.sample([name for name in RULED if name != "Q8_0"], 4):
        options = random_options(draw, model)
        try:
            types = choose(model, ftype, options)
        except UsageError:  # a pattern that meets nothing, which llama-quantize ignores
            continue
        assert types == llama_quantize.types(source, ftype, options)
