"""Types of tensors, against what llama.cpp's converter and llama-quantize choose (src/llama-quant.cpp)."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest

from quantpress.convert.arch.spec import Role
from quantpress.convert.checkpoint import LazyTensor
from quantpress.convert.gguf.mixture import FILE_TYPES, Mixture, TypeOptions, resolve_outtype
from quantpress.quant.errors import UsageError

MODEL = {
    "token_embd.weight": (Role.EMBEDDING, (64, 512)),
    "output.weight": (Role.HEAD, (64, 512)),
    "output_norm.weight": (Role.NORM, (512,)),
    "position_embd.weight": (Role.POSITION, (32, 512)),
    "blk.0.attn_q.weight": (Role.LINEAR, (512, 512)),
    "blk.0.attn_q.bias": (Role.BIAS, (512,)),
    "blk.0.attn_v.weight": (Role.LINEAR, (64, 512)),
    "blk.0.ffn_down.weight": (Role.LINEAR, (512, 172)),
    "blk.1.attn_v.weight": (Role.LINEAR, (64, 512)),
}


def choose(outtype: str, *, tied: bool = False, stored: str = "BF16", **options: Any) -> dict[str, str]:
    mixture = Mixture(TypeOptions(**options), outtype, tied=tied)
    model = {name: row for name, row in MODEL.items() if not (tied and row[0] is Role.HEAD)}
    return {name: mixture.choose(name, role, shape, stored).type for name, (role, shape) in model.items()}


@pytest.mark.parametrize("outtype", ["F32", "F16", "BF16", "Q8_0"])
def test_the_converters_types_go_to_every_matrix(outtype: str) -> None:
    chosen = choose(outtype)
    vectors = {"output_norm.weight", "position_embd.weight", "blk.0.attn_q.bias"}
    assert {name for name, kind in chosen.items() if kind != outtype} - {"blk.0.ffn_down.weight"} == (
        set() if outtype == "F32" else vectors
    )
    assert {chosen[name] for name in vectors} == {"F32"}
    assert chosen["blk.0.ffn_down.weight"] == ("F16" if outtype == "Q8_0" else outtype)


@pytest.mark.parametrize("outtype", ["Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("tied", [False, True])
def test_quantize_keeps_the_head_finer(outtype: str, tied: bool) -> None:
    chosen = choose(outtype, tied=tied)
    assert chosen["token_embd.weight" if tied else "output.weight"] == "Q8_0"
    if not tied:
        assert chosen["token_embd.weight"] == outtype
    assert chosen["blk.0.attn_q.weight"] == outtype
    assert chosen["blk.0.ffn_down.weight"] == "F16"


def test_the_note_says_when_llama_quantize_would_write_another_type() -> None:
    mixture = Mixture(TypeOptions(), "Q4_0", tied=False)
    assert "Q6_K" in mixture.choose("output.weight", Role.HEAD, (64, 512), "F16").note
    assert mixture.choose("output.weight", Role.HEAD, (64, 576), "F16").note == ""  # Q6_K falls back to Q8_0 there too
    note = mixture.choose("blk.0.ffn_down.weight", Role.LINEAR, (64, 172), "F16").note
    assert note == "rows of 172 values do not divide into blocks of 32 of Q4_0: written as F16"


def test_a_head_that_does_not_divide_is_f16() -> None:
    mixture = Mixture(TypeOptions(), "Q4_0", tied=False)
    assert mixture.choose("output.weight", Role.HEAD, (64, 100), "F16").type == "F16"


def test_pure_means_one_type() -> None:
    chosen = choose("Q4_0", pure=True)
    assert {chosen["output.weight"], chosen["token_embd.weight"], chosen["blk.0.attn_v.weight"]} == {"Q4_0"}


def test_the_first_pattern_that_is_found_wins() -> None:
    chosen = choose("Q4_0", tensor_types=((r"blk\.1\.", "q5_1"), ("attn_v", "Q8_0"), ("v", "f32")))
    assert chosen["blk.0.attn_v.weight"] == "Q8_0"
    assert chosen["blk.1.attn_v.weight"] == "Q5_1"
    assert chosen["blk.0.attn_q.weight"] == "Q4_0"
    assert chosen["output_norm.weight"] == "F32"


def test_a_pattern_wins_over_the_rule_for_the_head_but_not_over_its_own_option() -> None:
    assert choose("Q4_0", tensor_types=(("output", "q5_0"),))["output.weight"] == "Q5_0"
    chosen = choose("Q4_0", tensor_types=(("output|token", "q5_0"),), output_tensor_type="f16",
                    token_embedding_type="q4_1")  # fmt: skip
    assert (chosen["output.weight"], chosen["token_embd.weight"]) == ("F16", "Q4_1")


def test_the_type_of_the_output_is_that_of_a_tied_embedding_as_well() -> None:
    assert choose("Q4_0", tied=True, output_tensor_type="q5_1")["token_embd.weight"] == "Q5_1"
    assert choose("Q4_0", tied=False, output_tensor_type="q5_1")["token_embd.weight"] == "Q4_0"
    both = choose("Q4_0", tied=True, output_tensor_type="q5_1", token_embedding_type="f16")
    assert both["token_embd.weight"] == "F16"


@pytest.mark.parametrize(("stored", "kept"), [("BF16", "BF16"), ("F16", "F16"), ("F32", "F32"), ("F64", "F32")])
def test_the_output_is_left_as_it_is_stored(stored: str, kept: str) -> None:
    assert choose("Q4_0", stored=stored, leave_output_tensor=True)["output.weight"] == kept


def test_a_pattern_that_meets_nothing_is_a_mistake() -> None:
    mixture = Mixture(TypeOptions(tensor_types=(("attn_v", "q8_0"), ("attn_w", "q8_0"))), "Q4_0", tied=False)
    mixture.choose("blk.0.attn_v.weight", Role.LINEAR, (64, 512), "F16")
    with pytest.raises(UsageError, match="'attn_w'"):
        mixture.check_used()


@pytest.mark.parametrize(
    "options",
    [
        {"tensor_types": (("(", "q8_0"),)},
        {"tensor_types": (("a", "q9_0"),)},
        {"output_tensor_type": "best"},
        {"token_embedding_type": "i8"},
    ],
)
def test_a_wrong_option_is_a_usage_error(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"--t|--o"):
        Mixture(TypeOptions(**options), "Q4_0", tied=False)


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


def test_the_numbers_of_file_types_are_llama_cpps() -> None:
    names = {"F32": "ALL_F32"} | {name: f"MOSTLY_{name}" for name in FILE_TYPES if name != "F32"}
    assert dict(FILE_TYPES) == {name: gguf.LlamaFileType[full].value for name, full in names.items()}
