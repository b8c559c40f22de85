"""One weight onto an integer grid: codes, with a float16 scale and a zero for each group of inputs.

Pure functions on tensors. Knows no model and no file; which range a group's grid spans is decided here: by its
extremes (round to nearest), or by a search on the error of the weights or of the outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt_cli.model.codes import IntCodes
from llmopt_cli.quant.solved import RangeError
from llmopt_cli.spec.scheme import Scheme

SMALLEST_SCALE = 2.0**-24  # the smallest positive float16
SHRINKS = (1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.5)  # what the search makes of either end of a range
SWEEPS = 2
WEIGHTS_AT_ONCE = 2**21  # searched together: bounds the memory of the search


@dataclass(frozen=True, eq=False)
class Grid:
    """What the codes of groups mean: (code - zero) * scale. Both float32 [..., G], in values that a file can hold.

    A symmetric grid has its zero at the middle code, and may have a negative scale: of its 2^b values one more lies
    below the middle than above, and the sign says which way is down.
    """

    scales: Tensor
    zeros: Tensor
    bits: int

    def codes(self, groups: Tensor) -> Tensor:
        """The nearest code of each weight [..., G, size], as float32."""
        steps = (groups / self.scales[..., None]).round_()
        return steps.add_(self.zeros[..., None]).clamp_(0, 2**self.bits - 1)

    def nearest(self, groups: Tensor) -> Tensor:
        """The nearest values on the grid."""
        return self.codes(groups).sub_(self.zeros[..., None]).mul_(self.scales[..., None])

    def at(self, rows: Tensor) -> Grid:
        """The grid of these rows, in this order."""
        return Grid(self.scales[rows], self.zeros[rows], self.bits)

    def better(self, other: Grid, where: Tensor) -> Grid:
        """This one, but the other one `where` that is so, bool [..., G]."""
        scales = torch.where(where, other.scales, self.scales)
        return Grid(scales, torch.where(where, other.zeros, self.zeros), self.bits)


def quantize_weight(weight: Tensor, scheme: Scheme, gram: Tensor | None = None) -> IntCodes:
    """Quantize `weight` float32 [out, in] in groups of `scheme.group_size` inputs, each weight by itself.

    Without `gram`, every group spans its extremes (round to nearest). With `gram` [in, in], the mean of x x^T over
    calibration inputs, the ranges of the groups are searched for the least output error.
    """
    groups = grouped(weight, scheme)
    grid = extremes(groups, scheme) if gram is None else _search(groups, gram, scheme)
    return settled(grid.codes(groups).view(weight.shape), grid)


def settled(codes: Tensor, grid: Grid) -> IntCodes:
    """Codes [out, in] and their grid [out, G] as they are stored."""
    _refuse_infinite(grid.scales)
    return IntCodes(codes.to(torch.uint8), grid.scales.half(), grid.zeros.to(torch.uint8), grid.bits)


def grouped(weight: Tensor, scheme: Scheme) -> Tensor:
    """[out, in] -> [out, G, size]."""
    return weight.view(weight.shape[0], -1, scheme.group_size or weight.shape[1])


def extremes(groups: Tensor, scheme: Scheme) -> Grid:
    """The grid that spans each group's smallest and largest weight, or plus and minus the larger if symmetric.

    Zero is always on it: the stored zero is a code.
    """
    if scheme.symmetric:
        return _centred(2 * groups.abs().amax(-1) / (2**scheme.weight_bits - 1), scheme)
    return _between(*_bounds(groups), scheme)


def weighted(groups: Tensor, importance: Tensor, scheme: Scheme) -> Grid:
    """The grid of least squared error of weights [out, G, size], each counted by the `importance` [in] of its input.

    With the diagonal of x x^T for importance this is the output error but for correlations.
    """
    importance = importance.view(groups.shape[1:])
    parts = torch.split(groups, max(1, WEIGHTS_AT_ONCE // groups[0].numel()))
    found = [_weighted(part, importance, scheme) for part in parts]
    scales, zeros = (torch.cat([getattr(one, name) for one in found]) for name in ("scales", "zeros"))
    return Grid(scales, zeros, scheme.weight_bits)


def divide_rows(quantized: IntCodes, divisor: Tensor) -> IntCodes:
    """The same codes for a weight whose rows are divided by `divisor` [out]: only the scales change."""
    scales = storable(quantized.scales.float() / divisor[:, None])
    _refuse_infinite(scales)
    return quantized.with_scales(scales.half())


def output_error(weight: Tensor, approximation: Tensor, gram: Tensor) -> Tensor:
    """Mean squared output error per row [out]: e^T (x x^T) e for e = approximation - weight."""
    error = approximation - weight
    return ((error @ gram) * error).sum(-1)


def relative_error(weight: Tensor, approximation: Tensor, gram: Tensor) -> float:
    """|(W' - W) x| / |W x| over the calibration inputs: the noise-to-signal ratio of the linear's output."""
    signal = output_error(weight, torch.zeros_like(weight), gram).sum()
    noise = output_error(weight, approximation, gram).sum()
    return float((noise.clamp(min=0) / signal.clamp(min=torch.finfo(signal.dtype).tiny)).sqrt())


def storable(scales: Tensor) -> Tensor:
    """Scales rounded to float16, never zero."""
    signs = torch.where(scales < 0, -1.0, 1.0)
    return scales.abs().clamp(min=SMALLEST_SCALE).half().float() * signs


def _refuse_infinite(scales: Tensor) -> None:
    if not bool(scales.isfinite().all()):
        raise RangeError


def _bounds(groups: Tensor) -> tuple[Tensor, Tensor]:
    return groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)


def _between(low: Tensor, high: Tensor, scheme: Scheme) -> Grid:
    """The grid from `low` to `high`."""
    top = 2**scheme.weight_bits - 1
    scales = storable((high - low) / top)
    return Grid(scales, (-low / scales).round().clamp(0, top), scheme.weight_bits)


def _centred(scales: Tensor, scheme: Scheme) -> Grid:
    """The symmetric grid of these steps."""
    return Grid(storable(scales), torch.full_like(scales, 2 ** (scheme.weight_bits - 1)), scheme.weight_bits)


def _ranges(groups: Tensor, scheme: Scheme) -> Iterator[Grid]:
    """Grids to try. The two ends of an asymmetric range move independently of each other.

    The symmetric ones are of full range, as llama.cpp's Q4_0: the larger side goes down to the lowest code. The other
    direction and longer ranges are tried as well, since in few bits one code more or less is much.
    """
    if not scheme.symmetric:
        low, high = _bounds(groups)
        yield from (_between(low * below, high * above, scheme) for below in SHRINKS for above in SHRINKS)
        return
    middle = 2 ** (scheme.weight_bits - 1)
    peak = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
    longest = middle / (middle - 1)
    for shrink in (longest, *SHRINKS):
        for sign in (-1, 1):
            yield _centred(sign * shrink * peak / middle, scheme)


def _weighted(groups: Tensor, importance: Tensor, scheme: Scheme) -> Grid:
    best = extremes(groups, scheme)
    least = ((best.nearest(groups) - groups).square_() * importance).sum(-1)
    for grid in _ranges(groups, scheme):
        loss = (grid.nearest(groups).sub_(groups).square_().mul_(importance)).sum(-1)
        best, least = best.better(grid, loss < least), torch.minimum(least, loss)
    return best


def _search(groups: Tensor, gram: Tensor, scheme: Scheme) -> Grid:
    """Weight clipping by output error, as AWQ does it (arXiv 2306.00978), with a change that lowers the error.

    The error is that of the whole output row, not of the group alone: groups are chosen one after the other, each given
    the errors of the others (coordinate descent, `SWEEPS` times).
    """
    found = [_descend(part, gram, scheme) for part in torch.split(groups, max(1, WEIGHTS_AT_ONCE // groups.shape[-1]))]
    scales, zeros = (torch.cat([getattr(one, name) for one in found]) for name in ("scales", "zeros"))
    return Grid(scales, zeros, scheme.weight_bits)


def _descend(groups: Tensor, gram: Tensor, scheme: Scheme) -> Grid:
    rows, count, size = groups.shape
    best = extremes(groups, scheme)
    errors = torch.zeros_like(groups)  # of the groups chosen so far
    for index in [*range(count)] * SWEEPS:
        own = slice(index * size, (index + 1) * size)
        group = groups[:, index]
        errors[:, index] = 0
        cross = errors.view(rows, -1) @ gram[:, own]  # what the other groups' errors add to this group's gradient
        least = torch.full((rows,), torch.inf, device=groups.device)
        chosen = Grid(best.scales[:, index], best.zeros[:, index], best.bits)
        for grid in _ranges(group, scheme):
            error = grid.nearest(group).sub_(group)
            loss = ((error @ gram[own, own] + 2 * cross) * error).sum(-1)
            chosen, least = chosen.better(grid, loss < least), torch.minimum(least, loss)
        best.scales[:, index], best.zeros[:, index] = chosen.scales, chosen.zeros
        errors[:, index] = chosen.nearest(group).sub_(group)
    return best
