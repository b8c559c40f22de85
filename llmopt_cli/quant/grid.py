"""One weight onto an integer grid: asymmetric codes, one float16 scale and one zero per group of inputs.

Pure functions on tensors. Knows no model and no file; which range a group's grid spans is decided here, either by
its extremes (round to nearest) or by a search on the output error.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from llmopt_cli.errors import ModelError
from llmopt_cli.model.codes import IntCodes
from llmopt_cli.spec.scheme import Scheme

SMALLEST_SCALE = 2.0**-24  # the smallest positive float16
SHRINKS = (1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.5)  # what the search makes of either end of a range
SWEEPS = 2
ROWS_AT_ONCE = 2**21  # weights of one group column searched together: bounds the memory of the search


def quantize_weight(weight: Tensor, scheme: Scheme, gram: Tensor | None = None) -> IntCodes:
    """Quantize `weight` float32 [out, in] in groups of `scheme.group_size` inputs.

    Without `gram`, every group spans its own smallest and largest weight (round to nearest). With `gram` [in, in], the
    mean of x x^T over calibration inputs, the ends of every group's range move where that lowers the output error.
    """
    groups = _grouped(weight, scheme)
    low, high = _bounds(groups)
    if gram is not None:
        low, high = _search(groups, low, high, gram, scheme)
    scales, zeros = _fit(low, high, scheme)
    _refuse_infinite(scales)
    codes = _encode(groups, scales, zeros, scheme)
    return IntCodes(codes.view(weight.shape).to(torch.uint8), scales.half(), zeros.to(torch.uint8), scheme.weight_bits)


def divide_rows(quantized: IntCodes, divisor: Tensor) -> IntCodes:
    """The same codes for a weight whose rows are divided by `divisor` [out]: only the scales change."""
    scales = _storable(quantized.scales.float() / divisor[:, None])
    _refuse_infinite(scales)
    return quantized.with_scales(scales)


def output_error(weight: Tensor, approximation: Tensor, gram: Tensor) -> Tensor:
    """Mean squared output error per row [out]: e^T (x x^T) e for e = approximation - weight."""
    error = approximation - weight
    return ((error @ gram) * error).sum(-1)


def relative_error(weight: Tensor, approximation: Tensor, gram: Tensor) -> float:
    """|(W' - W) x| / |W x| over the calibration inputs: the noise-to-signal ratio of the linear's output."""
    signal = output_error(weight, torch.zeros_like(weight), gram).sum()
    noise = output_error(weight, approximation, gram).sum()
    return float((noise.clamp(min=0) / signal.clamp(min=torch.finfo(signal.dtype).tiny)).sqrt())


def _storable(scales: Tensor) -> Tensor:
    """Scales as float16, never zero."""
    return scales.clamp(min=SMALLEST_SCALE).half()


def _refuse_infinite(scales: Tensor) -> None:
    if not bool(scales.isfinite().all()):
        raise ModelError("a weight is too large for a float16 scale, or not a number")


def _grouped(weight: Tensor, scheme: Scheme) -> Tensor:
    return weight.view(weight.shape[0], -1, scheme.group_size or weight.shape[1])


def _bounds(groups: Tensor) -> tuple[Tensor, Tensor]:
    """The extremes of each group, zero included: the stored zero is a code, so the grid must contain it."""
    return groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)


def _fit(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and zero of the grid from `low` to `high`, both as float32 but with values that the file can hold."""
    top = 2**scheme.weight_bits - 1
    scales = _storable((high - low) / top).float()
    return scales, (-low / scales).round().clamp(0, top)


def _encode(groups: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme) -> Tensor:
    """The nearest code of each weight, as float32; scales and zeros have one dimension less than `groups`."""
    return (groups / scales[..., None]).round_().add_(zeros[..., None]).clamp_(0, 2**scheme.weight_bits - 1)


def _search(groups: Tensor, low: Tensor, high: Tensor, gram: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Weight clipping by output error, as AWQ does it (arXiv 2306.00978), with two changes that lower the error.

    The two ends of a range move independently, and the error is that of the whole output row, not of the group alone:
    groups are chosen one after the other, each given the errors of the others (coordinate descent, `SWEEPS` times).
    """
    low, high = low.clone(), high.clone()
    rows = max(1, ROWS_AT_ONCE // groups.shape[-1])
    for start in range(0, groups.shape[0], rows):
        part = slice(start, start + rows)
        _descend(groups[part], low[part], high[part], gram, scheme)
    return low, high


def _descend(groups: Tensor, low: Tensor, high: Tensor, gram: Tensor, scheme: Scheme) -> None:
    """Shrink `low` and `high` [rows, G] in place."""
    rows, count, size = groups.shape
    full_low, full_high = low.clone(), high.clone()
    errors = torch.zeros_like(groups)  # of the groups chosen so far
    for index in [*range(count)] * SWEEPS:
        own = slice(index * size, (index + 1) * size)
        errors[:, index] = 0
        cross = errors.view(rows, -1) @ gram[:, own]  # what the other groups' errors add to this group's gradient
        best = torch.full((rows,), torch.inf, device=groups.device)
        for shrink_low, shrink_high in _shrinks():
            ends = full_low[:, index] * shrink_low, full_high[:, index] * shrink_high
            error = _round_trip_error(groups[:, index], *ends, scheme)
            loss = ((error @ gram[own, own] + 2 * cross) * error).sum(-1)
            better = loss < best
            best = torch.where(better, loss, best)
            low[:, index] = torch.where(better, ends[0], low[:, index])
            high[:, index] = torch.where(better, ends[1], high[:, index])
        errors[:, index] = _round_trip_error(groups[:, index], low[:, index], high[:, index], scheme)


def _shrinks() -> Iterable[tuple[float, float]]:
    return ((low, high) for low in SHRINKS for high in SHRINKS)


def _round_trip_error(weights: Tensor, low: Tensor, high: Tensor, scheme: Scheme) -> Tensor:
    """What rounding to the grid from `low` to `high` [rows] adds to `weights` [rows, size]."""
    scales, zeros = _fit(low, high, scheme)
    codes = _encode(weights, scales, zeros, scheme)
    return codes.sub_(zeros[:, None]).mul_(scales[:, None]).sub_(weights)
