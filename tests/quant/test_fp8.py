"""8-bit floats: rounding against the list of all values of e4m3, scales by row, block and whole, and fixed inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llmopt_cli.errors import ModelError
from llmopt_cli.model.codes import FloatCodes
from llmopt_cli.model.inputs import round_inputs
from llmopt_cli.quant.fp8 import fp8, with_fixed_inputs
from llmopt_cli.quant.methods import METHODS
from llmopt_cli.spec.scheme import Scheme

ROWS, STATIC, BLOCKS = (METHODS[name].scheme for name in ("fp8", "fp8_static", "fp8_block"))
# sign * 2**(e - 7) * (1 + m / 8), and below that m * 2**-9; the last number of the last exponent is NaN.
NORMAL = [2.0 ** (exponent - 7) * (1 + m / 8) for exponent in range(1, 16) for m in range(8)][:-1]
VALUES = sorted({sign * value for sign in (1, -1) for value in (*NORMAL, *(m * 2.0**-9 for m in range(8)))})


def random(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def solved(weight: Tensor, scheme: Scheme) -> FloatCodes:
    codes = fp8(weight, None, scheme).codes
    assert isinstance(codes, FloatCodes)
    return codes


def nearest(weight: Tensor, scales: Tensor) -> Tensor:
    """The nearest value of e4m3 times the scale [out, in] of each weight, one by one."""
    rounded = torch.empty_like(weight)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            value = float(weight[row, column] / scales[row, column])
            rounded[row, column] = min(VALUES, key=lambda one: abs(one - value)) * scales[row, column]
    return rounded


def test_a_row_is_rounded_to_the_nearest_values() -> None:
    weight = random(4, 24)
    scales = weight.abs().amax(1, keepdim=True) / 448
    found = solved(weight, ROWS)
    assert found.scales.shape == (4, 1)
    assert torch.allclose(found.dequantize(), nearest(weight, scales.expand_as(weight)), rtol=1e-6)


def test_blocks_have_scales_of_their_own_and_edges_may_be_short() -> None:
    weight = random(5, 10) * torch.linspace(0.1, 9, 10)
    found = solved(weight, replace(BLOCKS, group_size=4 * 4))
    assert found.scales.shape == (2, 3)
    assert found.block == 4
    scales = torch.empty_like(weight)
    for row in range(5):
        for column in range(10):
            top, left = row // 4 * 4, column // 4 * 4
            scales[row, column] = weight[top : top + 4, left : left + 4].abs().max() / 448
    assert torch.allclose(found.dequantize(), nearest(weight, scales), rtol=1e-6)


def test_one_scale_for_all_where_inputs_have_one() -> None:
    weight = random(4, 24)
    found = solved(weight, STATIC)
    assert found.scales.shape == (1, 1)
    assert float(found.scales) == pytest.approx(float(weight.abs().max()) / 448)


@pytest.mark.parametrize("scheme", [ROWS, STATIC, BLOCKS])
def test_the_error_of_a_weight_is_at_most_a_sixteenth_of_it(scheme: Scheme) -> None:
    weight = random(200, 300)
    error = (solved(weight, scheme).dequantize() - weight).abs()
    floor = float(weight.abs().max()) / 448 * 2**-10  # half of the smallest step, among the subnormal numbers
    assert bool((error <= weight.abs() / 16 * 1.001 + floor).all())


@pytest.mark.parametrize("scheme", [ROWS, STATIC, BLOCKS])
def test_zeros_stay_zeros(scheme: Scheme) -> None:
    assert not solved(torch.zeros(4, 8), scheme).dequantize().any()


def test_fixed_inputs_reach_the_largest_value_and_stop_there() -> None:
    seen = torch.tensor([0.5, 7.0, 3.0])
    found = with_fixed_inputs(solved(random(2, 3), STATIC), seen, "q")
    assert found.input_scale is not None
    assert float(found.input_scale) == pytest.approx(7 / 448)
    rounded = round_inputs(torch.tensor([[7.0, -7.0, 70.0]]), STATIC, found.input_scale)
    assert rounded.tolist() == [[7.0, -7.0, 7.0]]


def test_a_linear_that_saw_nothing_gets_no_fixed_scale() -> None:
    with pytest.raises(ModelError, match=r"`layers\.0\.w1` saw no inputs") as caught:
        with_fixed_inputs(solved(random(2, 3), STATIC), torch.zeros(3), "layers.0.w1")
    assert "--method fp8" in str(caught.value.hint)
