"""Half-quadratic quantization (Badri and Shaji, github.com/mobiusml/hqq): a grid fitted to most weights, without data.

A pure function on tensors. It differs from the original in three points. Zeros are rounded to codes, so that every
integer format holds the result and every engine runs it; since a rounded zero can hardly move, scales are fitted, too.
Errors are counted in steps of the grid, so that the prior means the same for weights of any size. And of all grids
met, that of the least error is kept, the one of plain rounding among them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmopt_cli.quant.grid import Grid, extremes, grouped, settled, storable
from llmopt_cli.quant.solved import Solved
from llmopt_cli.spec.scheme import Scheme

NORM = 0.7  # p of the error |w - w'|^p: below 1, a few large errors count little
STRENGTH, GROWTH = 10.0, 1.01  # beta of the half-quadratic problem, and by what it grows
ROUNDS = 20


def hqq(weight: Tensor, gram: Tensor | None, scheme: Scheme) -> Solved:
    """Quantize `weight` float32 [out, in] with the grid of each group that leaves the least sum of |w - w'|^0.7."""
    groups = grouped(weight, scheme)
    grid = best = extremes(groups, scheme)
    least = _loss(groups, best)
    beta = STRENGTH
    for _ in range(ROUNDS):
        grid = _fitted(groups, grid, beta, scheme.symmetric)
        loss = _loss(groups, grid)
        best, least = best.better(grid, loss < least), torch.minimum(least, loss)
        beta *= GROWTH
    return Solved(settled(best.codes(groups).view(weight.shape), best), "hqq")


def shrink(errors: Tensor, beta: float) -> Tensor:
    """The e that is least in |e|^p + beta/2 (e - errors)^2, nearly: sign(x) relu(|x| - |x|^(p-1) / beta)."""
    size = errors.abs()
    return errors.sign() * (size - size.pow(NORM - 1) / beta).clamp_(min=0)


def _fitted(groups: Tensor, grid: Grid, beta: float, symmetric: bool) -> Grid:
    """The grid that is best in least squares for the weights less their sparse errors, with codes as they are."""
    codes = grid.codes(groups)
    weights = groups / grid.scales[..., None]
    errors = shrink(weights - (codes - grid.zeros[..., None]), beta)
    regular = weights - errors
    zeros = grid.zeros
    if not symmetric:
        zeros = (codes - regular).mean(-1).round().clamp(0, 2**grid.bits - 1)
    steps = codes - zeros[..., None]
    square = (steps * steps).sum(-1)
    factor = torch.where(square > 0, (steps * regular).sum(-1) / square.clamp(min=1), 1.0)
    return Grid(storable(grid.scales * factor), zeros, grid.bits)


def _loss(groups: Tensor, grid: Grid) -> Tensor:
    return (groups - grid.nearest(groups)).abs_().pow_(NORM).sum(-1)
