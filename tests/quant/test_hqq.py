"""Half-quadratic quantization: its prior against a search, and less of the error that it minimises than rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llmopt_cli.model.codes import IntCodes
from llmopt_cli.quant.grid import quantize_weight
from llmopt_cli.quant.hqq import NORM, hqq, shrink
from llmopt_cli.quant.methods import METHODS
from llmopt_cli.spec.scheme import Scheme

SCHEME = replace(METHODS["hqq"].scheme, group_size=32)


def heavy(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Weights with rare large ones, which is what the norm below 1 is for."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    return torch.where(torch.rand(rows, columns, generator=generator) < 0.01, weight * 6, weight)


def loss(weight: Tensor, codes: IntCodes) -> Tensor:
    """The error of each group [out, G]."""
    error = (weight - codes.dequantize()).abs().pow(NORM)
    return error.view(*codes.scales.shape, -1).sum(-1)


def solved(weight: Tensor, scheme: Scheme) -> IntCodes:
    codes = hqq(weight, None, scheme).codes
    assert isinstance(codes, IntCodes)
    return codes


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_group_has_more_error_than_rounding_leaves(bits: int, symmetric: bool) -> None:
    weight = heavy(16, 128)
    scheme = replace(SCHEME, weight_bits=bits, symmetric=symmetric)
    found, rounded = solved(weight, scheme), quantize_weight(weight, scheme)
    assert bool((loss(weight, found) <= loss(weight, rounded) * (1 + 1e-5)).all())
    assert found.symmetric or not symmetric
    assert found.bits == bits


@pytest.mark.parametrize(("bits", "share"), [(3, 0.94), (4, 0.97)])
def test_less_error_is_left_in_all_where_few_weights_are_large(bits: int, share: float) -> None:
    weight = heavy(64, 256)
    scheme = replace(SCHEME, weight_bits=bits)
    found, rounded = (loss(weight, codes).sum() for codes in (solved(weight, scheme), quantize_weight(weight, scheme)))
    assert float(found) < share * float(rounded)


def test_what_the_grid_holds_exactly_stays() -> None:
    codes = torch.randint(0, 16, (4, 64), generator=torch.Generator().manual_seed(0))
    codes[:, ::32], codes[:, 1::32] = 0, 15
    weight = (codes - 7).float() / 64
    assert torch.equal(solved(weight, SCHEME).dequantize(), weight)


def test_a_group_of_zeros_stays_one() -> None:
    assert not solved(torch.zeros(2, 64), SCHEME).dequantize().any()


def test_small_errors_vanish_and_large_ones_stay_nearly_whole() -> None:
    found = shrink(torch.tensor([0.0, 0.1, -0.1, 5.0, -5.0]), beta=10.0)
    assert found[:3].tolist() == [0.0, 0.0, 0.0]
    assert found[3].item() == pytest.approx(5 - 5**-0.3 / 10)
    assert found[4].item() == -found[3].item()


def test_shrinking_is_near_the_least_of_its_problem() -> None:
    """Up to the factor p that the original leaves out, e minimises |e|^p + beta / (2 p) (e - x)^2 for large x."""
    x, beta = 2.0, 10.0
    tries = torch.linspace(0, 3, 30001)
    best = tries[(tries.pow(NORM) + beta * NORM / 2 * (tries - x).square()).argmin()]
    assert shrink(torch.tensor([x]), beta).item() == pytest.approx(float(best), abs=0.01)
