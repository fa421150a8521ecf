"""What a user may ask for, and what does not depend on the rules of llama-quantize (test_gguf_mixture_rules.py)."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest

from quantpress.convert.arch.spec import Role
from quantpress.convert.checkpoint import LazyTensor
from quantpress.convert.gguf.file_types import ALIASES
from quantpress.convert.gguf.mixture import FILE_TYPES, Choice, Matrix, Mixture, TypeOptions, resolve_outtype
from quantpress.convert.gguf.mixture_rules import ModelFacts
from quantpress.quant.errors import UsageError

FACTS = ModelFacts("llama", 2, 8, 4)
MODEL = {
    "token_embd.weight": (Role.EMBEDDING, (64, 512)),
    "output.weight": (Role.HEAD, (64, 512)),
    "output_norm.weight": (Role.NORM, (512,)),
    "position_embd.weight": (Role.POSITION, (32, 512)),
    "blk.0.attn_q.weight": (Role.LINEAR, (512, 512)),
    "blk.0.attn_q.bias": (Role.BIAS, (512,)),
    "blk.0.attn_v.weight": (Role.LINEAR, (64, 512)),
    "blk.0.ffn_down.weight": (Role.LINEAR, (512, 172)),
    "blk.0.ffn_gate_inp.weight": (Role.LINEAR, (8, 512)),
    "blk.1.attn_v.weight": (Role.LINEAR, (64, 512)),
}


def choices(outtype: str, *, tied: bool = False, stored: str = "BF16", **options: Any) -> dict[str, Choice]:
    matrices = [
        Matrix(name, role, shape, stored) for name, (role, shape) in MODEL.items() if not (tied and role is Role.HEAD)
    ]
    return Mixture(TypeOptions(**options), outtype, FACTS).choose(matrices)


def choose(outtype: str, **options: Any) -> dict[str, str]:
    return {name: choice.type for name, choice in choices(outtype, **options).items()}


def choose_one(outtype: str, name: str, role: Role, shape: tuple[int, ...], **options: Any) -> Choice:
    mixture = Mixture(TypeOptions(**options), outtype, FACTS)
    return mixture.choose([Matrix(name, role, shape, "F16")])[name]


@pytest.mark.parametrize("outtype", ["F32", "F16", "BF16", "Q8_0"])
def test_the_converters_types_go_to_every_matrix(outtype: str) -> None:
    chosen = choose(outtype)
    vectors = {"output_norm.weight", "position_embd.weight", "blk.0.attn_q.bias", "blk.0.ffn_gate_inp.weight"}
    assert {name for name, kind in chosen.items() if kind != outtype} - {"blk.0.ffn_down.weight"} == (
        set() if outtype == "F32" else vectors
    )
    assert {chosen[name] for name in vectors} == {"F32"}
    assert chosen["blk.0.ffn_down.weight"] == ("F16" if outtype == "Q8_0" else outtype)


@pytest.mark.parametrize("outtype", ["Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("tied", [False, True])
def test_quantize_keeps_the_head_finer(outtype: str, tied: bool) -> None:
    chosen = choose(outtype, tied=tied)
    assert chosen["token_embd.weight" if tied else "output.weight"] == "Q6_K"
    if not tied:
        assert chosen["token_embd.weight"] == outtype
    assert chosen["blk.0.attn_q.weight"] == outtype
    assert chosen["blk.0.ffn_down.weight"] == "F16"


def test_the_note_says_why_a_type_is_another_one() -> None:
    assert choose_one("Q4_0", "output.weight", Role.HEAD, (64, 512)).note == ""
    choice = choose_one("Q4_0", "output.weight", Role.HEAD, (64, 576))
    assert choice.note == "rows of 576 values do not divide into blocks of 256 of Q6_K: written as Q8_0"
    choice = choose_one("Q4_0", "blk.0.ffn_down.weight", Role.LINEAR, (64, 172))
    assert choice.note == "rows of 172 values do not divide into blocks of 32 of Q4_0: written as F16"
    choice = choose_one("Q4_K_S", "blk.0.ffn_up.weight", Role.LINEAR, (64, 172))
    assert choice.note == "rows of 172 values do not divide into blocks of 256 of Q4_K: written as F16"


def test_a_file_for_experts_says_that_there_are_none() -> None:
    choice = choose_one("MXFP4_MOE", "blk.0.ffn_up.weight", Role.LINEAR, (64, 512))
    assert (choice.type, "without experts" in choice.note) == ("Q8_0", True)
    assert choose_one("Q8_0", "blk.0.ffn_up.weight", Role.LINEAR, (64, 512)).note == ""


def test_a_head_that_does_not_divide_is_f16() -> None:
    assert choose_one("Q4_0", "output.weight", Role.HEAD, (64, 100)).type == "F16"


def test_pure_means_one_type() -> None:
    chosen = choose("Q4_0", pure=True)
    assert {chosen["output.weight"], chosen["token_embd.weight"], chosen["blk.0.attn_v.weight"]} == {"Q4_0"}
    assert choose("Q4_K_M", pure=True)["output.weight"] == "Q4_K"


def test_pure_does_not_give_a_tied_embedding_the_type_of_the_output_and_says_so() -> None:
    choice = choices("Q4_K_M", tied=True, pure=True, output_tensor_type="q8_0")["token_embd.weight"]
    assert choice.type == "Q4_K"
    assert "--output-tensor-type" in choice.note


def test_the_first_pattern_that_is_found_wins() -> None:
    chosen = choose("Q4_0", tensor_types=((r"blk\.1\.", "q5_1"), ("attn_v", "Q8_0"), ("v", "f32")))
    assert chosen["blk.0.attn_v.weight"] == "Q8_0"
    assert chosen["blk.1.attn_v.weight"] == "Q5_1"
    assert chosen["blk.0.attn_q.weight"] == "Q4_0"
    assert chosen["output_norm.weight"] == "F32"


@pytest.mark.parametrize("outtype", ["F16", "Q8_0"])
def test_patterns_work_for_the_converters_types_too(outtype: str) -> None:
    chosen = choose(outtype, tensor_types=(("attn_v", "iq4_xs"), ("ffn_down", "q6_k")))
    assert chosen["blk.0.attn_v.weight"] == "IQ4_XS"
    assert chosen["blk.0.ffn_down.weight"] == "F16"  # 172 values
    assert chosen["blk.0.attn_q.weight"] == outtype


def test_a_pattern_wins_over_the_rule_for_the_head_but_not_over_its_own_option() -> None:
    assert choose("Q4_0", tensor_types=(("output", "q5_0"),))["output.weight"] == "Q5_0"
    chosen = choose("Q4_0", tensor_types=(("output|token", "q5_0"),), output_tensor_type="f16",
                    token_embedding_type="q4_1")  # fmt: skip
    assert (chosen["output.weight"], chosen["token_embd.weight"]) == ("F16", "Q4_1")


def test_the_type_of_the_output_is_that_of_a_tied_embedding_as_well() -> None:
    assert choose("Q4_0", tied=True, output_tensor_type="q5_1")["token_embd.weight"] == "Q5_1"
    assert choose("Q4_0", tied=False, output_tensor_type="q5_1")["token_embd.weight"] == "Q4_0"
    assert choose("F16", tied=True, output_tensor_type="q5_1")["token_embd.weight"] == "Q5_1"
    both = choose("Q4_0", tied=True, output_tensor_type="q5_1", token_embedding_type="f16")
    assert both["token_embd.weight"] == "F16"


@pytest.mark.parametrize(("stored", "kept"), [("BF16", "BF16"), ("F16", "F16"), ("F32", "F32"), ("F64", "F32")])
def test_the_output_is_left_as_it_is_stored(stored: str, kept: str) -> None:
    assert choose("Q4_0", stored=stored, leave_output_tensor=True)["output.weight"] == kept


def test_a_pattern_that_meets_nothing_is_a_mistake() -> None:
    with pytest.raises(UsageError, match="'attn_w'"):
        choose("Q4_0", tensor_types=(("attn_v", "q8_0"), ("attn_w", "q8_0")))
    with pytest.raises(UsageError, match="'norm'"):
        choose("Q4_0", tensor_types=(("norm", "q8_0"),))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_types": (("(", "q8_0"),)}, r"--tensor-type: '\(' is not a regular expression"),
        ({"tensor_types": (("a", "q9_0"),)}, "--tensor-type a: type 'q9_0' is not known"),
        ({"tensor_types": (("a", "q4_k_m"),)}, "--tensor-type a: 'q4_k_m' is a mixture of types"),
        ({"output_tensor_type": "best"}, "--output-tensor-type: type 'best' is not known"),
        ({"token_embedding_type": "iq1_s"}, "--token-embedding-type: type 'iq1_s' cannot be written yet"),
    ],
)
def test_a_wrong_option_is_a_usage_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Mixture(TypeOptions(**options), "Q4_0", FACTS)


def _tensor(dtype: str, *shape: int) -> LazyTensor:
    return LazyTensor("t", shape, dtype, "file", lambda start, stop: np.zeros((stop - start, *shape[1:])))


@pytest.mark.parametrize(
    ("tensors", "outtype"),
    [
        ([_tensor("F16", 4), _tensor("BF16", 4, 4)], "BF16"),
        ([_tensor("F32", 4, 4), _tensor("F16", 4, 4), _tensor("BF16", 4, 4)], "F16"),
        ([_tensor("F32", 4, 4)], "F16"),
    ],
)
def test_auto_is_the_first_sixteen_bit_type_of_a_matrix(tensors: list[LazyTensor], outtype: str) -> None:
    assert resolve_outtype("auto", tensors) == outtype
    assert resolve_outtype(" bf16 ", tensors) == "BF16"
    with pytest.raises(UsageError, match="--outtype: type 'q7'"):
        resolve_outtype("q7", tensors)


def test_the_aliases_are_llama_quantizes() -> None:
    assert [resolve_outtype(name, []) for name in ("q3_k", "Q4_K", "q5_k")] == ["Q3_K_M", "Q4_K_M", "Q5_K_M"]
    assert not ALIASES.keys() & FILE_TYPES.keys()


def test_the_numbers_of_file_types_are_llama_cpps() -> None:
    names = {name: f"MOSTLY_{name}" for name in FILE_TYPES} | {"F32": "ALL_F32"}
    assert dict(FILE_TYPES) == {name: gguf.LlamaFileType[full].value for name, full in names.items()}
