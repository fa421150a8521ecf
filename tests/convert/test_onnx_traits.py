"""What families have beside the plain layer, as ONNX: against the families' own references, in both kinds of operators.

Whole texts, texts that run through the cache in pieces, and padded batches: ALiBi, sinks, latents and experts all look
at more than one token's own values, or at how many tokens there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from quantpress.convert.checkpoint import Checkpoint, LazyTensor
from quantpress.convert.onnx import experts
from quantpress.convert.onnx.export import plan_onnx, write_onnx
from quantpress.convert.onnx.options import OnnxOptions
from quantpress.convert.onnx.precision import precision_of
from quantpress.convert.onnx.read import open_onnx
from quantpress.convert.open import open_checkpoint
from quantpress.convert.preflight import preflight
from quantpress.quant.errors import InputError, UsageError
from tests.families.cases import Case, write_checkpoint
from tests.families.registered import ALL
from tests.onnx_graphs import checked, operators
from tests.onnx_runs import OnnxRun

# as in test_onnx_graph.py, with one layer of three in which experts add some twenty operators more
TOLERANCE = 1e-4
LENGTH = 48
TOKENS = np.random.default_rng(3).integers(1, 300, LENGTH)
# ALiBi; q, k and v one after another; clipped; head norms of every kind; norms after the sum and of no weights;
# another width of embeddings; interleaved and partial rotary; scales; rotary in some layers; sinks; latents; experts
NAMES = (
    "bloom-heads-no-power-of-two", "falcon-40b", "mpt-clipped", "olmo", "olmo2", "opt-350m", "gptj", "stablelm-2-12b",
    "cohere2", "granite", "chatglm", "baichuan2-13b", "gpt_oss", "deepseek3", "qwen2_moe-dense-layers",
)  # fmt: skip
MIXTURES = ("mixtral-stacked", "qwen2_moe", "olmoe", "deepseek3", "gpt_oss")

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")

Make = Callable[[str], "Made"]


@dataclass(frozen=True)
class Made:
    """A case's checkpoint."""

    case: Case
    folder: Path
    source: Checkpoint
    known: dict[bytes, NDArray[np.float32]] = field(default_factory=dict)

    def logits(self, tokens: NDArray[Any] = TOKENS) -> NDArray[np.float32]:
        """Gives the logits of the reference, computed once."""
        key = tokens.tobytes()
        if key not in self.known:
            self.known[key] = self.case.logits(self.folder, tokens)
        return self.known[key]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Gives a function that makes the checkpoint of a case once."""
    made: dict[str, Made] = {}

    def one(name: str) -> Made:
        if name not in made:
            (case,) = (each for each in ALL if each.id == name)
            folder = write_checkpoint(case, tmp_path_factory.mktemp("case") / name)
            made[name] = Made(case, folder, open_checkpoint(folder))
        return made[name]

    return one


def export(folder: Path, source: Checkpoint, **options: Any) -> Path:
    write_onnx(folder, plan_onnx(source, preflight(source), OnnxOptions(**options)), threads=1)
    return folder


def close(found: NDArray[Any], expected: NDArray[Any]) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("standard", [False, True], ids=["contrib", "standard"])
@pytest.mark.parametrize("name", NAMES)
def test_texts_in_pieces_and_padded_batches_get_the_logits_of_the_reference(
    make: Make, tmp_path: Path, name: str, standard: bool
) -> None:
    made = make(name)
    folder = export(tmp_path / "onnx", made.source, standard_ops=standard)
    model, run, expected = checked(folder), OnnxRun(folder), made.logits()
    assert np.abs(expected).max() > 1
    assert all(node.domain == "" for node in model.graph.node) or not standard
    close(run.logits(TOKENS), expected)
    close(run.in_chunks(TOKENS, (5, 1, 20)), expected)
    texts = [TOKENS[:20], TOKENS[9:35]]
    alone = [made.logits(text) for text in texts]
    for left in (False, True):
        for found, one in zip(run.in_batch(texts, prefill=(15, 21), left=left), alone, strict=True):
            close(found, one)


def test_what_a_layer_needs_is_all_that_is_built(make: Make, tmp_path: Path) -> None:
    model = checked(export(tmp_path / "onnx", make("falcon-7b").source))
    assert operators(model, under="/layers.1/") == [
        "SkipLayerNormalization*", "FusedMatMul*", "GroupQueryAttention*", "FusedMatMul*", "FusedMatMul*", "Gelu",
        "FusedMatMul*", "Add",
    ]  # fmt: skip


def test_sixteen_experts_are_one_node_and_fewer_are_cut_apart(make: Make, tmp_path: Path) -> None:
    case, few = make("mixtral-eight").case, make("mixtral-eight").source
    counted = Counter(operators(checked(export(tmp_path / "few", few)), under="/layers.1/"))
    assert (counted["MoE*"], counted["Split"]) == (0, 1)
    many = replace(case, options={**case.options, "num_local_experts": 16})
    source = open_checkpoint(write_checkpoint(many, tmp_path / "many"))
    for precision, node in (("fp32", "MoE*"), ("int4", "QMoE*")):
        folder = export(tmp_path / precision, source, precision=precision, block_size=16)
        counted = Counter(operators(onnx.load(folder / "model.onnx", load_external_data=False), under="/layers.1/"))
        assert (counted[node], counted["Split"]) == (1, 0)
    run = OnnxRun(tmp_path / "fp32")
    close(run.logits(TOKENS), case.logits(tmp_path / "many", TOKENS))


@pytest.mark.parametrize(
    ("name", "precision", "compute"),
    [
        *((name, precision, "fp32") for name in MIXTURES for precision in ("float", "int4")),
        ("qwen2_moe", "int4-asymmetric", "fp32"),
        ("gpt_oss", "float", "fp16"),
        ("olmoe", "int4-asymmetric", "fp16"),
    ],
)
def test_one_node_computes_what_a_node_for_each_linear_does(
    make: Make, tmp_path: Path, name: str, precision: str, compute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same codes and the same types, so that only the order of sums and where halves are rounded differ."""
    source, found = make(name).source, list[NDArray[Any]]()
    bits = {"precision": compute if precision == "float" else "int4", "symmetric": precision != "int4-asymmetric"}
    for many in (1, 1000):
        monkeypatch.setattr(experts, "_MANY", many)
        folder = export(tmp_path / str(many), source, compute_type=compute, block_size=16, **bits)
        found.append(OnnxRun(folder).logits(TOKENS))
    operator = {"float": ("com.microsoft", "MoE")}.get(precision, ("com.microsoft", "QMoE"))
    assert [operator in open_onnx(tmp_path / str(many)).ops for many in (1, 1000)] == [True, False]
    if compute == "fp32":
        close(*found)
    else:  # a rounded score may choose another expert for single tokens, not for half of them
        assert np.median(np.abs(found[0] - found[1]).max(axis=-1)) < 0.01 * np.abs(found[1]).max()


@pytest.mark.parametrize("style", ["dynamic", "weight-only"])
def test_experts_that_no_token_goes_to_compute_in_integers_too(make: Make, tmp_path: Path, style: str) -> None:
    """One token of two experts of four leaves two without any; 8 bits cost less than a tenth of the logits."""
    made = make("mixtral-eight")
    run = OnnxRun(export(tmp_path / "onnx", made.source, precision="int8", int8=style, block_size=16))
    for token in range(4, 12):
        one = np.array([token])
        expected = made.logits(one)
        assert np.abs(run.logits(one) - expected).max() < 0.1 * np.abs(expected).max()


def test_routers_keep_their_own_type(make: Make, tmp_path: Path) -> None:
    source = make("qwen2_moe").source
    plan = plan_onnx(source, preflight(source), OnnxOptions(precision="int4", block_size=16))
    labels = {group.source: group.label for group, _ in plan.groups}
    routers = {name: label for name, label in labels.items() if "mlp.gate." in name or "shared_expert_gate" in name}
    assert len(routers) == 2 * preflight(source).hyper.layers
    assert set(routers.values()) == {"F32"}
    assert {label for name, label in labels.items() if "experts." in name} == {"INT4 g16"}


def test_types_of_stacked_experts_are_read_back(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make("olmoe").source
    sizes = []
    for many in (1, 1000):
        monkeypatch.setattr(experts, "_MANY", many)
        folder = export(tmp_path / str(many), source, precision="int4", block_size=16)
        sizes.append(precision_of(open_onnx(folder)).parameters)
    assert sizes[0] == sizes[1]
    assert max(sizes[0], key=lambda label: sizes[0][label]) == "INT4 g16"


def whole(tensor: LazyTensor) -> NDArray[Any]:
    return tensor.read_rows(0, tensor.rows)


def stacks(experts_of: Sequence[Any], rows: int) -> NDArray[Any]:
    return np.stack([np.stack(parts, 1).reshape(rows, -1) for parts in experts_of])


def test_rows_of_gate_and_up_alternate_in_a_stack(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "_MANY", 1)
    source = make("qwen2_moe").source
    folder = export(tmp_path / "onnx", source)
    model = onnx.load(folder / "model.onnx")
    (stored,) = (each for each in model.graph.initializer if each.name == "layers.1.experts.gate_up_proj")
    prefix = "model.layers.1.mlp.experts."
    count = preflight(source).hyper.experts
    assert count is not None
    pairs = [
        [whole(source.tensors[f"{prefix}{number}.{part}_proj.weight"]) for part in ("gate", "up")]
        for number in range(count.count)
    ]
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(stored), stacks(pairs, 2 * len(pairs[0][0])))


def test_attention_that_needs_the_standard_says_which_opset_has_it(make: Make) -> None:
    source = make("deepseek3").source
    with pytest.raises(UsageError, match=r"--opset 22: this model's attention.*--opset 23"):
        plan_onnx(source, preflight(source), OnnxOptions(opset=22))


def test_a_latent_has_no_settings_for_onnxruntime_genai(make: Make, tmp_path: Path) -> None:
    assert not (export(tmp_path / "one", make("deepseek3").source) / "genai_config.json").exists()
    assert (export(tmp_path / "two", make("olmo2").source) / "genai_config.json").exists()


def test_a_tensor_that_the_graph_has_no_use_for_is_refused(make: Make) -> None:
    source = make("olmo2").source
    found = preflight(source)
    row, layer, tensor = next(each for each in found.bindings if each[0].slot == "ffn_up.weight")
    extra = replace(row, gguf="blk.{layer}.ffn_other.weight"), layer, tensor
    with pytest.raises(InputError, match=r"up_proj\.weight.*written without it"):
        plan_onnx(source, replace(found, bindings=(*found.bindings, extra)), OnnxOptions())


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"causal": False, "alibi": (0.5, 0.25)}, "ALiBi in an encoder"), ({"token_types": 2}, "token types"),
     ({"causal": False, "sliding_window": 4}, "a sliding window in an encoder")],
)  # fmt: skip
def test_what_no_graph_is_built_of_is_named(make: Make, changes: dict[str, Any], named: str) -> None:
    source = make("olmo2").source
    found = preflight(source)
    with pytest.raises(InputError, match=named):
        plan_onnx(source, replace(found, hyper=replace(found.hyper, **changes)), OnnxOptions())
