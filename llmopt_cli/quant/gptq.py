"""GPTQ (Frantar et al., arXiv 2210.17323): weights rounded one input at a time, the rest making good each error.

Pure functions on tensors. Inputs are taken in order of importance, and the grids of their groups are fixed beforehand
("static groups"), so that groups stay neighbours in the file. Afterwards scales and codes are fitted to each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmopt_cli.quant.grid import Grid, grouped, quantize_weight, settled, storable, weighted
from llmopt_cli.quant.solved import Solved
from llmopt_cli.spec.scheme import Scheme

DAMPINGS = (0.01, 0.1, 1.0)  # tried in turn, relative to the mean of the Hessian's diagonal
BLOCK = 128  # inputs between two updates of the rest
ROUNDS = 2  # of fitting scales to codes and codes to scales


def gptq(weight: Tensor, gram: Tensor | None, scheme: Scheme, name: str = "gptq") -> Solved:
    """Quantize `weight` float32 [out, in] so that outputs stay; `gram` [in, in] is the mean of x x^T over inputs.

    Where `gram` cannot be inverted whatever is added to its diagonal, weights are rounded to nearest, and the answer
    says so. Otherwise it goes by `name`. Peak memory: two matrices [in, in] beside `gram`, and a few of the weight.
    """
    assert gram is not None
    importance = gram.diagonal()
    order = importance.argsort(descending=True, stable=True)
    upper, damping = factor(gram, order)
    if upper is None:
        return Solved(quantize_weight(weight, scheme), "rtn")
    # By the root: the error of an important input is made good by others, so that it counts less than it would alone.
    grid = weighted(grouped(weight, scheme), importance.sqrt(), scheme)
    columns = weight.T.contiguous()
    codes = torch.empty_like(columns)
    codes[order] = round_in_turn(columns[order], upper, _of_inputs(grid, len(order)).at(order))
    del upper
    hessian = gram + torch.diag(_ridge(gram, damping))
    for _ in range(ROUNDS):
        grid = refit(columns, hessian, codes, grid)
        codes = improve(columns, hessian, codes, _of_inputs(grid, len(order)))
    return Solved(settled(codes.T.contiguous(), grid), name, damping)


def factor(gram: Tensor, order: Tensor) -> tuple[Tensor | None, float]:
    """The upper triangular U [in, in] with U^T U = H^-1 for the damped Hessian H in this order, and the damping.

    Single precision is enough nearly always; None if H is not positive under any damping.
    """
    last_first = order.flip(0)
    for damping in DAMPINGS:
        for dtype in (torch.float32, torch.float64):
            square = gram[last_first[:, None], last_first].to(dtype)
            square.diagonal().add_(_ridge(gram, damping)[last_first])
            upper = _inverse_factor(square)
            if upper is not None:
                return upper.float(), damping
    return None, 0.0


def _ridge(gram: Tensor, damping: float) -> Tensor:
    """What is added to the diagonal. Inputs that are always zero are decoupled so: any weight does for them."""
    diagonal = gram.diagonal()
    alive = diagonal > 0
    mean = diagonal[alive].mean() if bool(alive.any()) else gram.new_ones(())
    return torch.where(alive, damping * mean, mean)


def _inverse_factor(last_first: Tensor) -> Tensor | None:
    """U of H, of which rows and columns are given last first: so its Cholesky factor, turned back, is H = R R^T.

    R is upper triangular, and U its inverse: half the work, and half the matrices, of inverting H and factoring that.
    """
    lower, failed = torch.linalg.cholesky_ex(last_first)
    if int(failed):
        return None
    turned = lower.flip(0, 1)
    del lower
    upper = torch.eye(len(turned), dtype=turned.dtype, device=turned.device)
    torch.linalg.solve_triangular(turned, upper, upper=True, out=upper)
    return upper if bool(upper.sum().isfinite()) else None


def _of_inputs(grid: Grid, inputs: int) -> Grid:
    """The grid [out, G] of every weight [in, out]."""
    size = inputs // grid.scales.shape[1]
    return Grid(grid.scales.T.repeat_interleave(size, 0), grid.zeros.T.repeat_interleave(size, 0), grid.bits)


def round_in_turn(weight: Tensor, upper: Tensor, grid: Grid) -> Tensor:
    """Codes, as float32, of `weight` [in, out] on the `grid` of each weight; the first input comes first.

    Within a block every input takes over what those before it owe, when its turn comes; what follows the block is
    updated once for the whole block.
    """
    weight = weight.clone()
    codes = torch.empty_like(weight)
    for start in range(0, len(weight), BLOCK):
        block = slice(start, start + BLOCK)
        own = upper[block, block]
        errors = torch.empty_like(weight[block])
        for index, pivot in enumerate(own.diagonal().tolist()):
            row = start + index
            value = torch.addmv(weight[row], errors[:index].T, own[:index, index], alpha=-1)
            scale, zero = grid.scales[row], grid.zeros[row]
            code = codes[row] = (value / scale).round_().add_(zero).clamp_(0, 2**grid.bits - 1)
            errors[index] = (value - (code - zero) * scale) / pivot
        weight[start + BLOCK :].addmm_(upper[block, start + BLOCK :].T, errors, alpha=-1)
    return codes


def refit(weight: Tensor, hessian: Tensor, codes: Tensor, grid: Grid) -> Grid:
    """The scales [out, G] of least output error for codes [in, out], each given the others: a sweep of Gauss-Seidel."""
    scales = grid.scales.clone()
    columns = _of_inputs(grid, len(weight))
    steps = codes - columns.zeros
    error = steps * columns.scales - weight
    size = len(weight) // scales.shape[1]
    for group in range(scales.shape[1]):
        own = slice(group * size, (group + 1) * size)
        step = steps[own]
        slope = (step * (hessian[own] @ error)).sum(0)
        curvature = (step * (hessian[own, own] @ step)).sum(0)
        best = torch.where(curvature > 0, storable(scales[:, group] - slope / curvature), scales[:, group])
        error[own] += step * (best - scales[:, group])
        scales[:, group] = best
    return Grid(scales, grid.zeros, grid.bits)


def improve(weight: Tensor, hessian: Tensor, codes: Tensor, grid: Grid) -> Tensor:
    """Better codes [in, out]: each in turn the best one given all others, one sweep of coordinate descent.

    The best value of an input is its present one less the gradient H e over the curvature H_ii; rounded, since the
    error is a parabola in it (CDQuant, arXiv 2406.17542). Gradients are brought up to date as in `round_in_turn`.
    """
    values = (codes - grid.zeros) * grid.scales
    gradients = hessian @ (values - weight)
    curvatures = hessian.diagonal().tolist()
    codes = codes.clone()
    for start in range(0, len(weight), BLOCK):
        block = slice(start, start + BLOCK)
        own = hessian[block, block]
        changes = torch.empty_like(weight[block])
        for index in range(len(own)):
            row = start + index
            gradient = torch.addmv(gradients[row], changes[:index].T, own[:index, index])
            scale, zero = grid.scales[row], grid.zeros[row]
            wanted = values[row] - gradient / curvatures[row]
            code = codes[row] = (wanted / scale).round_().add_(zero).clamp_(0, 2**grid.bits - 1)
            changes[index] = (code - zero) * scale - values[row]
        gradients[start + BLOCK :].addmm_(hessian[start + BLOCK :, block], changes)
    return codes
