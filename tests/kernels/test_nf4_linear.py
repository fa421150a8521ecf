"""The operator and the module for 4-bit levels on a processor, against bitsandbytes and the formula in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not here: install the extra gpu")

from quantpress.kernels.nf4.linear import Nf4Linear, nf4_linear
from quantpress.quant.bitsandbytes_levels import LEVELS
from tests.kernels.nf4_cases import Case, case, check

HALF, SINGLE, BRAIN = torch.float16, torch.float32, torch.bfloat16


def _module(one: Case, rounding: torch.dtype | None = None) -> Nf4Linear:
    return Nf4Linear(*one.weight, one.bias, rounding=rounding)


@pytest.mark.parametrize("dtype", [HALF, SINGLE, BRAIN])
@pytest.mark.parametrize("rounding", [None, HALF, BRAIN])
@pytest.mark.parametrize(("rows", "columns", "blocksize"), [(1, 1, 64), (5, 33, 32), (70, 96, 64), (3, 130, 4096)])
def test_the_operator_is_the_formula(
    rows: int, columns: int, blocksize: int, dtype: torch.dtype, rounding: torch.dtype | None
) -> None:
    one = case(3, rows, columns, blocksize, dtype, bias=rows > 1)
    check(_module(one, rounding)(one.x), one, rounding)


def test_blocks_of_outputs_may_begin_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in (7, 33, 100):
        monkeypatch.setattr("quantpress.kernels.nf4.linear._BLOCK", 3 * columns)
        one = case(2, 50, columns, 64, SINGLE, bias=True)
        check(_module(one)(one.x), one, None)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_matrix_that_bitsandbytes_quantized_is_multiplied_as_bitsandbytes_does(kind: str, nested: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not here")
    generator = torch.Generator().manual_seed(3)
    weight, x = (torch.randn(rows, 256, generator=generator) for rows in (40, 6))
    packed, state = functional.quantize_4bit(weight, quant_type=kind, blocksize=64, compress_statistics=nested)
    absmax = state.absmax
    if nested:
        absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    levels = torch.from_numpy(LEVELS[kind].copy())
    assert torch.allclose(levels, state.code, rtol=0, atol=1e-7)
    found = nf4_linear(x, packed.view(-1), absmax.float(), levels, None, 40, 256, 64, None)
    dense = functional.dequantize_4bit(packed, state)
    # both multiply the same float32 weights, up to a rounding of levels that are computed by division (FP4)
    bound = (x.abs() @ dense.abs().T) * (2 * 256 + 16) * 2.0**-24
    assert ((found - x @ dense.T).abs() <= bound).all()


def test_torch_finds_nothing_wrong_with_the_operator() -> None:
    for dtype, rounding in ((SINGLE, None), (HALF, BRAIN)):
        one = case(4, 9, 64, 64, dtype, bias=rounding is None)
        shaped = one.x.view(2, 2, 64)
        weight = one.weight
        arguments = (shaped, *weight[:3], one.bias, *weight[3:], rounding)
        torch.library.opcheck(torch.ops.quantpress.nf4_linear.default, arguments)


def test_a_compiled_module_keeps_the_operator_and_gives_the_same() -> None:
    one = case(4, 9, 64, 64, SINGLE, bias=True)
    module = _module(one)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(module, backend=keep, fullgraph=True)
    assert torch.equal(compiled(one.x), module(one.x))
    assert "quantpress.nf4_linear" in str([node.target for node in graphs[0].graph.nodes])


def test_changing_the_type_of_a_model_leaves_absmax_and_levels() -> None:
    one = case(2, 9, 64, 64, HALF, bias=True)
    module = torch.nn.Sequential(_module(one)).half()
    inner = module[0]
    assert (inner.absmax.dtype, inner.levels.dtype, inner.bias.dtype) == (SINGLE, SINGLE, HALF)
    check(module(one.x), one, None)
    assert np.array_equal(inner.absmax.numpy(), one.absmax.numpy())
    assert module.to("meta")[0].absmax.device.type == "meta"


def test_a_state_dict_carries_the_weight() -> None:
    one = case(2, 9, 64, 64, SINGLE, bias=True)
    other = Nf4Linear(*(torch.zeros_like(part) for part in one.weight[:3]), 9, 64, 64, torch.zeros(9))
    other.load_state_dict(_module(one).state_dict())
    assert torch.equal(other(one.x), _module(one)(one.x))
    assert "in_features=64, out_features=9, bias=True, blocksize=64" in str(other)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 65), "x is .*65"),
        (torch.zeros(3, 64, dtype=torch.float64), "float64"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x: torch.Tensor, message: str) -> None:
    one = case(2, 9, 64, 64, SINGLE)
    with pytest.raises(ValueError, match=message):
        _module(one)(x)
