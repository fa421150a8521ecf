"""The table of types against libggml's and the gguf package's own tables."""

from __future__ import annotations

import gguf
import pytest

from quantpress.quant.errors import InputError, LayoutError
from quantpress.quant.ggml.types import GGML_TYPES, ggml_type, row_bytes


def test_names_ids_and_sizes_are_libggmls(libggml):
    for kind in GGML_TYPES.values():
        name, block_size, block_bytes = libggml.describe(kind.type_id)
        assert (name.upper(), block_size, block_bytes) == (kind.name, kind.block_size, kind.block_bytes)


def test_names_ids_and_sizes_are_the_gguf_packages():
    stale = {"Q8_1", "Q8_K"}  # run-time types that no file holds; the package's Q8_1 is older than its C layout
    for theirs, (block_size, block_bytes) in gguf.constants.GGML_QUANT_SIZES.items():
        kind = ggml_type(int(theirs))
        assert (kind.name, kind.block_size) == (theirs.name, block_size)
        if kind.name not in stale:
            assert kind.block_bytes == block_bytes


def test_every_type_is_found_by_its_id_and_by_its_name_in_any_case():
    assert len({kind.type_id for kind in GGML_TYPES.values()}) == len(GGML_TYPES)
    for name, kind in GGML_TYPES.items():
        assert name == kind.name
        assert ggml_type(kind.type_id) is ggml_type(name) is ggml_type(name.lower()) is kind


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(InputError, match=r"'Q8_00'; did you mean Q8_0;"):
        ggml_type("Q8_00")
    with pytest.raises(InputError, match="unknown ggml type 'zzz'; known: F32"):
        ggml_type("zzz")


@pytest.mark.parametrize("type_id", [-1, 43, 2**32 - 1])
def test_an_unknown_id_is_an_input_error(type_id):
    with pytest.raises(InputError, match=str(type_id)):
        ggml_type(type_id)


@pytest.mark.parametrize("type_id", [4, 5, 31, 32, 33, 36, 37, 38])
def test_a_removed_id_says_so(type_id):
    with pytest.raises(InputError, match=f"id {type_id} .*removed"):
        ggml_type(type_id)


def test_row_bytes_are_blocks_times_block_bytes():
    assert row_bytes(ggml_type("F16"), 7) == 14
    assert row_bytes(ggml_type("Q8_0"), 576) == 18 * 34
    assert row_bytes(ggml_type("Q6_K"), 256) == 210
    assert row_bytes(ggml_type("Q4_0"), 0) == 0
    assert ggml_type("Q8_0").bits_per_weight == 8.5


@pytest.mark.parametrize(("name", "columns"), [("Q8_0", 172), ("Q8_0", 341), ("Q4_K", 576), ("Q4_0", -32)])
def test_a_row_that_does_not_divide_is_a_layout_error(name, columns):
    with pytest.raises(LayoutError, match=rf"{name}.*{columns}"):
        row_bytes(ggml_type(name), columns)
