"""Bits under a budget: as good as trying everything, never over it, and what a loss is."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llmopt_cli.errors import UsageError
from llmopt_cli.quant.budget import Stake, sensitivity, spend
from llmopt_cli.quant.grid import quantize_weight
from llmopt_cli.spec.scheme import find_scheme

COSTS = {2: 2.125, 3: 3.125, 4: 4.125, 8: 8.125}


def random(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def stakes_of(count: int, seed: int) -> list[Stake]:
    """Tensors whose loss falls fourfold with every bit, from very different starts."""
    starts = torch.exp(3 * random(count, seed=seed)).tolist()
    sizes = (1 + (3 * random(count, seed=seed + 1)).long()).tolist()
    return [
        Stake(str(index), size * 1000, {bits: start * 4.0**-bits for bits in COSTS})
        for index, (start, size) in enumerate(zip(starts, sizes, strict=True))
    ]


def spent(stakes: list[Stake], widths: dict[str, int]) -> float:
    return sum(stake.size * COSTS[widths[stake.name]] for stake in stakes) / sum(stake.size for stake in stakes)


def lost(stakes: list[Stake], widths: dict[str, int]) -> float:
    return sum(stake.losses[widths[stake.name]] for stake in stakes)


@pytest.mark.parametrize("target", [2.125, 3.0, 4.5, 6.0, 9.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_is_nearly_as_good_as_trying_everything(target: float, seed: int) -> None:
    stakes = stakes_of(6, seed)
    found = spend(stakes, target, COSTS)
    names = [stake.name for stake in stakes]
    trials = (dict(zip(names, widths, strict=True)) for widths in itertools.product(COSTS, repeat=len(stakes)))
    best = min(lost(stakes, widths) for widths in trials if spent(stakes, widths) <= target + 1e-9)
    assert spent(stakes, found) <= target + 1e-9
    assert lost(stakes, found) <= 1.5 * best  # a few large tensors: what is left over does not pay for a step


def test_among_many_tensors_the_budget_is_used_up() -> None:
    stakes = stakes_of(200, seed=3)
    found = spend(stakes, 4.5, COSTS)
    assert 4.48 < spent(stakes, found) <= 4.5
    uniform = {stake.name: 4 for stake in stakes}
    assert lost(stakes, found) < 0.8 * lost(stakes, uniform)


def test_who_has_more_to_lose_gets_more() -> None:
    stakes = [Stake("calm", 1000, {4: 0.1, 8: 0.01}), Stake("loud", 1000, {4: 10.0, 8: 1.0})]
    assert spend(stakes, 6.125, COSTS) == {"calm": 4, "loud": 8}


def test_a_width_that_makes_things_worse_is_not_taken() -> None:
    assert spend([Stake("odd", 1000, {4: 0.1, 8: 0.2})], 9, COSTS) == {"odd": 4}


def test_a_budget_below_the_smallest_is_refused() -> None:
    with pytest.raises(UsageError, match=r"2 bits per weight are too few: the smallest .* is 2\.125"):
        spend(stakes_of(3, seed=0), 2.0, COSTS)


def test_the_loss_is_the_relative_output_error_of_rounding() -> None:
    weight, inputs = random(16, 64, seed=0) - 0.5, random(500, 64, seed=1)
    scheme = replace(find_scheme("gptq"), group_size=32)
    found = sensitivity(weight, inputs.T @ inputs / 500, scheme, (3, 4, 8))
    for bits in (3, 4, 8):
        approximate = quantize_weight(weight, replace(scheme, weight_bits=bits)).dequantize()
        direct = ((inputs @ (approximate - weight).T).norm() / (inputs @ weight.T).norm()) ** 2
        assert found[bits] == pytest.approx(float(direct), rel=1e-3)
    assert found[3] > found[4] > found[8]
