"""The grid against naive loops: min/max rounding, the range search, and what groups of one sign do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llmopt_cli.errors import ModelError
from llmopt_cli.quant.grid import (
    SHRINKS,
    divide_rows,
    extremes,
    grouped,
    output_error,
    quantize_weight,
    relative_error,
    weighted,
)
from llmopt_cli.spec.scheme import Scheme, find_scheme


def scheme(group_size: int, bits: int = 4, symmetric: bool = False) -> Scheme:
    return replace(find_scheme("rtn"), group_size=group_size, weight_bits=bits, symmetric=symmetric)


def random(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def gram_of(inputs: Tensor) -> Tensor:
    return inputs.T @ inputs / len(inputs)


def naive_group(weights: list[float], low: float, high: float) -> tuple[list[int], float, int]:
    """One group, one weight at a time: codes, scale (as float16 stores it), zero."""
    scale = float(torch.tensor(max((high - low) / 15, 2.0**-24)).half())
    zero = min(15, max(0, round(-low / scale)))
    return [min(15, max(0, round(weight / scale) + zero)) for weight in weights], scale, zero


def test_rounding_equals_naive_loops() -> None:
    weight = random(5, 24)
    found = quantize_weight(weight, scheme(8))
    for row in range(5):
        for group in range(3):
            members = weight[row, group * 8 : group * 8 + 8].tolist()
            codes, scale, zero = naive_group(members, min(0.0, *members), max(0.0, *members))
            assert found.codes[row, group * 8 : group * 8 + 8].tolist() == codes
            assert float(found.scales[row, group]) == scale
            assert int(found.zeros[row, group]) == zero


def test_the_search_of_a_lone_group_tries_every_range_and_takes_the_best() -> None:
    weight, gram = random(4, 8), gram_of(random(50, 8, seed=1) * torch.linspace(0.2, 3, 8))
    found = quantize_weight(weight, scheme(8), gram)
    for row in range(4):
        members = weight[row].tolist()
        losses = []
        for low in SHRINKS:
            for high in SHRINKS:
                codes, scale, zero = naive_group(members, low * min(0.0, *members), high * max(0.0, *members))
                error = [(code - zero) * scale - value for code, value in zip(codes, members, strict=True)]
                losses.append(sum(error[i] * float(gram[i, j]) * error[j] for i in range(8) for j in range(8)))
        mine = float(output_error(weight, found.dequantize(), gram)[row])
        assert mine == pytest.approx(min(losses), rel=1e-4)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_search_beats_rounding_by_15_percent_on_correlated_inputs(seed: int) -> None:
    mixing = random(64, 64, seed=seed + 10)
    inputs = random(512, 64, seed=seed) @ mixing
    weight, held_out = random(48, 64, seed=seed + 20), random(512, 64, seed=seed + 30) @ mixing
    plain = quantize_weight(weight, scheme(16))
    searched = quantize_weight(weight, scheme(16), gram_of(inputs))
    errors = [relative_error(weight, one.dequantize(), gram_of(held_out)) for one in (plain, searched)]
    assert errors[1] < 0.85 * errors[0]


def test_relative_error_is_that_of_the_outputs() -> None:
    weight, inputs = random(6, 16), random(40, 16, seed=1)
    approximation = quantize_weight(weight, scheme(8)).dequantize()
    direct = (inputs @ (approximation - weight).T).norm() / (inputs @ weight.T).norm()
    assert relative_error(weight, approximation, gram_of(inputs)) == pytest.approx(float(direct), rel=1e-4)


@pytest.mark.parametrize("sign", [1, -1])
def test_groups_of_one_sign_keep_zero_on_the_grid(sign: int) -> None:
    weight = sign * (5 + random(4, 16).abs())
    found = quantize_weight(weight, scheme(16))
    assert bool((found.zeros == (0 if sign > 0 else 15)).all())
    assert float((found.dequantize() - weight).abs().max()) <= float(found.scales.max()) * 0.51


def test_zeros_stay_exactly_zero() -> None:
    weight = random(4, 32)
    weight[:, ::3] = 0
    weight[1] = 0
    found = quantize_weight(weight, scheme(16)).dequantize()
    assert bool((found[weight == 0] == 0).all())


def test_one_group_a_row() -> None:
    found = quantize_weight(random(3, 20), scheme(0))
    assert found.scales.shape == found.zeros.shape == (3, 1)


def test_dividing_rows_changes_scales_alone() -> None:
    found = quantize_weight(random(8, 32), scheme(16))
    divisor = torch.linspace(0.3, 4, 8)
    divided = divide_rows(found, divisor)
    assert divided.codes is found.codes
    assert torch.allclose(divided.dequantize(), found.dequantize() / divisor[:, None], rtol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_a_weight_that_no_scale_can_hold_is_refused(value: float) -> None:
    weight = random(8, 16)
    weight[3, 3] = value
    with pytest.raises(ModelError, match="too large for a float16 scale"):
        quantize_weight(weight, scheme(16))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_rounding_spans_plus_and_minus_the_largest(bits: int) -> None:
    weight, middle, top = random(6, 32), 2 ** (bits - 1), 2**bits - 1
    found = quantize_weight(weight, scheme(16, bits, symmetric=True))
    assert found.symmetric
    for row in range(6):
        for group in range(2):
            members = weight[row, group * 16 : group * 16 + 16].tolist()
            scale = float(torch.tensor(2 * max(map(abs, members)) / top).half())
            codes = [min(top, max(0, round(weight / scale) + middle)) for weight in members]
            assert float(found.scales[row, group]) == scale
            assert found.codes[row, group * 16 : group * 16 + 16].tolist() == codes


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_weighted_grid_has_no_larger_weighted_error_in_any_group(bits: int, symmetric: bool) -> None:
    plan, importance = scheme(16, bits, symmetric), torch.exp(2 * random(1, 64, seed=1))[0]
    groups = grouped(random(40, 64), plan)

    def error(values: Tensor) -> Tensor:
        return ((values - groups).square() * importance.view(4, 16)).sum(-1)

    before, after = (
        error(grid.nearest(groups)) for grid in (extremes(groups, plan), weighted(groups, importance, plan))
    )
    assert bool((after <= before).all())
    assert float(after.sum()) < (0.95 if bits < 8 else 1) * float(before.sum())


def test_a_symmetric_search_uses_the_whole_range() -> None:
    """The larger side goes to the lowest code, which is one further out, whatever the sign: by a negative scale."""
    weight = torch.tensor([[-8.0, 7, 3, 1], [8.0, -7, -3, -1]])
    found = quantize_weight(weight, scheme(4, symmetric=True), torch.eye(4))
    assert torch.equal(found.dequantize(), weight)
    assert found.scales.flatten().tolist() == [1.0, -1.0]
    assert found.symmetric


@pytest.mark.parametrize("symmetric", [True, False])
def test_searching_in_parts_changes_nothing(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, gram = scheme(16, 3, symmetric), gram_of(random(100, 64, seed=2))
    groups = grouped(random(10, 64), plan)
    whole = weighted(groups, gram.diagonal(), plan).scales, quantize_weight(random(10, 64), plan, gram).codes
    monkeypatch.setattr("llmopt_cli.quant.grid.WEIGHTS_AT_ONCE", 64 * 3)
    parts = weighted(groups, gram.diagonal(), plan).scales, quantize_weight(random(10, 64), plan, gram).codes
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))


def test_dividing_rows_keeps_the_sign_of_scales() -> None:
    found = quantize_weight(torch.tensor([[8.0, -7, -3, -1]]), scheme(4, symmetric=True), torch.eye(4))
    divided = divide_rows(found, torch.tensor([2.0]))
    assert torch.equal(divided.dequantize(), found.dequantize() / 2)
