"""Bits for every tensor under a budget for all: those with the most to lose get more.

Pure arithmetic on losses. Knows neither models nor how a loss was measured, but for the measure that is usual.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from llmopt_cli.errors import UsageError
from llmopt_cli.quant.grid import output_error, quantize_weight
from llmopt_cli.spec.scheme import Scheme

HALVINGS = 60  # of the interval in which the price of a bit is sought


@dataclass(frozen=True)
class Stake:
    """What one tensor of `size` weights loses at each width it can be stored in. Losses add up over tensors."""

    name: str
    size: int
    losses: Mapping[int, float]


def sensitivity(weight: Tensor, gram: Tensor, scheme: Scheme, widths: Iterable[int]) -> dict[int, float]:
    """The loss at each width: tr(dW H dW^T), the mean squared output error of rounding, relative to the output.

    `weight` float32 [out, in], `gram` H [in, in] the mean of x x^T. It is relative since outputs of different linears
    have no common unit: norms and other factors come after them.
    """
    output = float(output_error(weight, weight.new_zeros(()), gram).sum())
    errors = {
        bits: output_error(weight, quantize_weight(weight, replace(scheme, weight_bits=bits)).dequantize(), gram)
        for bits in widths
    }
    return {bits: float(error.sum()) / max(output, 1e-30) for bits, error in errors.items()}


def spend(stakes: Sequence[Stake], target: float, costs: Mapping[int, float]) -> dict[str, int]:
    """The width of every tensor: least total loss at no more than `target` bits a weight on average.

    `costs` are the stored bits a weight, scales included, of each width. A Lagrangian relaxation: at any price of a bit
    every tensor chooses by itself, and the lowest price that keeps to the budget is found by bisection; what is left
    over goes to the tensors that gain most by a bit. UsageError if nothing is that small.
    """
    budget = target * sum(stake.size for stake in stakes)
    smallest = {stake.name: min(stake.losses, key=lambda bits: costs[bits]) for stake in stakes}
    if _spent(stakes, smallest, costs) > budget * (1 + 1e-9):
        least = _spent(stakes, smallest, costs) / sum(stake.size for stake in stakes)
        raise UsageError(
            f"{target:g} bits per weight are too few: the smallest that the method can do is {least:.3f}",
            f"give --target-bpw {least:.2f} or more",
        )
    low, high = 0.0, _dearest(stakes, costs)
    for _ in range(HALVINGS):
        price = (low + high) / 2
        fits = _spent(stakes, _choices(stakes, price, costs), costs) <= budget
        low, high = (low, price) if fits else (price, high)
    return _use_up(stakes, _choices(stakes, high, costs), budget, costs)


def _choices(stakes: Sequence[Stake], price: float, costs: Mapping[int, float]) -> dict[str, int]:
    return {
        stake.name: min(
            stake.losses, key=lambda bits: (stake.losses[bits] + price * stake.size * costs[bits], costs[bits])
        )
        for stake in stakes
    }


def _spent(stakes: Sequence[Stake], widths: Mapping[str, int], costs: Mapping[int, float]) -> float:
    return sum(stake.size * costs[widths[stake.name]] for stake in stakes)


def _dearest(stakes: Sequence[Stake], costs: Mapping[int, float]) -> float:
    """A price at which every tensor takes its smallest width."""
    steps = [abs(costs[a] - costs[b]) for a in costs for b in costs if costs[a] != costs[b]]
    spread = max(max(stake.losses.values()) - min(stake.losses.values()) for stake in stakes)
    return 1 + 2 * spread / (min(steps, default=1.0) * min(stake.size for stake in stakes))


def _use_up(
    stakes: Sequence[Stake], widths: dict[str, int], budget: float, costs: Mapping[int, float]
) -> dict[str, int]:
    """Spend what is left: again and again the step up that gains most for its bits and still fits."""
    while True:
        left = budget - _spent(stakes, widths, costs)
        steps = []
        for stake in stakes:
            now = widths[stake.name]
            for bits, loss in stake.losses.items():
                price, gain = stake.size * (costs[bits] - costs[now]), stake.losses[now] - loss
                if 0 < price <= left and gain > 0:
                    steps.append((gain / price, stake.name, bits))
        if not steps:
            return widths
        _, name, bits = max(steps)
        widths = widths | {name: bits}
