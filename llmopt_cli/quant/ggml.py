"""Weights into GGML's blocks: the codes and scales of least weighted error, searched as ggml searches them.

Pure functions on tensors. An importance, the mean square of every input (the diagonal of x x^T), says how much an
error counts; without one, larger weights count more. Which bytes hold the result: `model.ggml`.

The searches follow the reference quantizers of ggml (ggml-quants.c) closely enough that most blocks come out byte for
byte the same; only the order in which sums are rounded differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llmopt_cli.model.codes import GgmlCodes
from llmopt_cli.model.ggml import gathered, halves, pairs_6bit
from llmopt_cli.quant.solved import RangeError
from llmopt_cli.spec.gguf import BLOCK_TYPES, SUPER_BLOCK

WEIGHTS_AT_ONCE = 2**17  # more fall out of the cache
TINY = 1e-15  # a block whose weights are all smaller is one of zeros
STEPS = tuple(0.1 * step for step in range(-9, 10) if step)  # shares of a code by which a signed grid is stretched
FINE_STEPS = tuple(-0.9 + 0.05 * step for step in range(37))  # the same for a grid with a minimum
SUPER_STEPS = tuple(0.1 * step for step in range(-4, 5) if step)
PASSES = 5
Encoder = Callable[[Tensor, Tensor | None], Tensor]  # [R, B, size], importance [B, size] -> uint8 [R * B, bytes]


def encode(weight: Tensor, name: str, importance: Tensor | None = None) -> GgmlCodes:
    """Quantize `weight` float [out, in] into blocks of the type `name`, whose size must divide the rows.

    `importance` float32 [in]. Peak memory: the result and some 20 float32 copies of WEIGHTS_AT_ONCE weights. Raises
    RangeError if a number is not finite or too large for the scales, which are float16.
    """
    kind = BLOCK_TYPES[name]
    rows, columns = weight.shape
    assert columns % kind.size == 0, f"{name} blocks do not divide rows of {columns}"
    if importance is not None:
        importance = importance.float().to(weight.device).view(-1, kind.size)
    parts = torch.split(weight, max(1, WEIGHTS_AT_ONCE // columns))
    blocks = [ENCODERS[name](part.float().view(len(part), -1, kind.size), importance) for part in parts]
    codes = GgmlCodes(torch.cat(blocks).view(rows, -1), name)
    if not bool(codes.dequantize().isfinite().all()):
        raise RangeError
    return codes


def signed(x: Tensor, weights: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Scales [..., 1] of the grid -top ... top - 1 for groups x [..., n], and the codes from 0, float32 [..., n].

    The weight of largest size goes to the lowest code, or near it. For each stretch the codes are rounded, then the
    scale of least weighted squared error for these codes is sum(w q x) / sum(w q q).
    """
    peak = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    scale = best = torch.zeros_like(peak)
    chosen = torch.zeros_like(x)
    for step in (0.0, *STEPS):
        codes = (x * _over(-(top + step), peak)).round_().clamp_(-top, top - 1)
        weighted = weights * codes
        product, square = (weighted * x).sum(-1, keepdim=True), weighted.mul_(codes).sum(-1, keepdim=True)
        better = (square > 0) & (product * product > best * square)
        scale = torch.where(better, product / square, scale)
        best = torch.where(better, scale * product, best)
        chosen = torch.where(better, codes, chosen)
    empty = peak.abs() < TINY
    return scale.masked_fill_(empty, 0.0), chosen.add_(top).masked_fill_(empty, 0.0)


def affine(x: Tensor, weights: Tensor, top: int, steps: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Scales and minima [..., 1] of the grid scale * (0 ... top) + minimum for groups x [..., n], and codes [..., n].

    For each stretch the codes are rounded, then scale and minimum solve the weighted normal equations of a line; a
    minimum is never above zero. The next stretch starts from the best minimum so far.
    """
    low, high = x.amin(-1, keepdim=True).clamp_(max=0), x.amax(-1, keepdim=True)
    flat = high <= low
    weight_sum, x_sum = weights.sum(-1, keepdim=True), (weights * x).sum(-1, keepdim=True)
    scale = (high - low) / top
    chosen = ((x - low) * _over(top, high - low)).round_().clamp_(0, top)
    best = _line_error(x, weights, chosen, scale, low)
    for step in steps:
        codes = ((x - low) * _over(top + step, high - low)).round_().clamp_(0, top)
        weighted = weights * codes
        total, product = weighted.sum(-1, keepdim=True), (weighted * x).sum(-1, keepdim=True)
        square = weighted.mul_(codes).sum(-1, keepdim=True)
        determinant = weight_sum * square - total * total
        minimum = (square * x_sum - total * product) / determinant
        slope = (weight_sum * product - x_sum * total) / determinant
        slope = torch.where(minimum > 0, product / square, slope)
        minimum.clamp_(max=0)
        error = _line_error(x, weights, codes, slope, minimum)
        better = (determinant > 0) & (error < best)
        best, scale = torch.where(better, error, best), torch.where(better, slope, scale)
        low, chosen = torch.where(better, minimum, low), torch.where(better, codes, chosen)
    return scale.masked_fill_(flat, 0.0), low, chosen.masked_fill_(flat, 0.0)


def positive(x: Tensor, weights: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Scales [..., 1] of the grid 0 ... top for numbers x [..., n] >= 0, and the codes float32 [..., n].

    The best of a few stretches, then coordinate descent: a code moves if that, with the scale fitted, is better.
    """
    high = x.amax(-1, keepdim=True)
    inverse = best_inverse = _over(top, high)
    best = _error(x, weights, inverse, top)
    for step in SUPER_STEPS:
        inverse = _over(top + step, high)
        error = _error(x, weights, inverse, top)
        best_inverse = torch.where(error < best, inverse, best_inverse)
        best = torch.minimum(error, best)
    codes = (x * best_inverse).round_().clamp_(max=top)
    scale = _descend(x, weights, codes, top)
    empty = high < TINY
    return scale.masked_fill_(empty, 0.0), codes.masked_fill_(empty, 0.0)


def _descend(x: Tensor, weights: Tensor, codes: Tensor, top: int) -> Tensor:
    """Move `codes` in place, one of each group at a time, while that lowers the error; returns the scales [..., 1]."""
    product, square = (weights * codes * x).sum(-1), (weights * codes * codes).sum(-1)
    for _ in range(PASSES):
        before = codes.clone()
        for index in range(x.shape[-1]):
            own, weight, code = x[..., index], weights[..., index], codes[..., index]
            others = product - weight * own * code, square - weight * code * code
            moved = (own * others[1] / others[0]).round_().clamp_(max=top)
            after = others[0] + weight * own * moved, others[1] + weight * moved * moved
            better = (others[0] > 0) & (others[1] > 0) & (after[0] * after[0] * square > product * product * after[1])
            code.copy_(torch.where(better, moved, code))
            product, square = torch.where(better, after[0], product), torch.where(better, after[1], square)
        if torch.equal(before, codes):
            break
    return torch.where(square > 0, product / square, 0.0)[..., None]


def _error(x: Tensor, weights: Tensor, inverse: Tensor, top: int) -> Tensor:
    codes = (x * inverse).round_().clamp_(max=top)
    return (weights * (x - codes / inverse).square_()).sum(-1, keepdim=True)


def _line_error(x: Tensor, weights: Tensor, codes: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    return (codes * scale).add_(low).sub_(x).square_().mul_(weights).sum(-1, keepdim=True)


def _stored(number: Tensor) -> Tensor:
    """As it comes back from float16."""
    return number.half().float()


def _over(number: float, divisor: Tensor) -> Tensor:
    """number / divisor, rounded once: torch multiplies by the reciprocal, which moves weights halfway between codes."""
    return torch.full_like(divisor, number) / divisor


def _inverse(number: Tensor) -> Tensor:
    """1 / number, zero where it is zero."""
    return torch.where(number == 0, 0.0, 1 / number)


def _emphasised(x: Tensor, importance: Tensor, energy: Tensor) -> Tensor:
    """How much each error counts: the importance of its input, and more where the weight itself is large."""
    return importance * (energy + x.square()).sqrt_()


def _energy(x: Tensor, *dims: int) -> Tensor:
    return x.square().mean(dims, keepdim=True)


def _blocks(*fields: Tensor) -> Tensor:
    """Fields uint8 [R, B, bytes] side by side, as [R * B, bytes]."""
    return torch.cat([field.reshape(-1, field.shape[-1]) for field in fields], dim=1)


def _nibbles(codes: Tensor, bits: int) -> tuple[Tensor, ...]:
    """Codes [R, B, 32] as blocks of 32 store them: the fifth bits first, if there are any, then the lower four."""
    flat = codes.to(torch.uint8).view(-1, codes.shape[-1])
    low = gathered(flat, 16, 4)
    return (low,) if bits == 4 else (gathered(flat >> 4, 1, 1), low)


def _signed_32(x: Tensor, importance: Tensor | None, bits: int) -> Tensor:
    """q4_0, q5_0: one scale for 32 weights. Without importance the weight of largest size gets the lowest code."""
    top = 2 ** (bits - 1)
    if importance is None:
        scale = x.gather(-1, x.abs().argmax(-1, keepdim=True)) / -top
        codes = (x * _inverse(scale) + (top + 0.5)).floor_().clamp_(max=2 * top - 1)
    else:
        scale, codes = signed(x, _emphasised(x, importance, _energy(x, 1, 2)), top)
    return _blocks(halves(scale), *_nibbles(codes, bits))


def _affine_32(x: Tensor, importance: Tensor | None, bits: int) -> Tensor:
    """q4_1, q5_1: a scale and a minimum for 32 weights."""
    top = 2**bits - 1
    if importance is None:
        low = x.amin(-1, keepdim=True)
        scale = (x.amax(-1, keepdim=True) - low) / top
        codes = ((x - low) * _inverse(scale) + 0.5).floor_().clamp_(max=top)
    else:
        scale, low, codes = affine(x, _emphasised(x, importance, _energy(x, 1, 2)), top, FINE_STEPS)
    return _blocks(halves(torch.cat([scale, low], -1)), *_nibbles(codes, bits))


def _q8_0(x: Tensor, importance: Tensor | None) -> Tensor:
    """One scale for 32 weights of 8 bits; an importance would change nothing that can be measured."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    scaled = x * _inverse(scale)
    codes = (scaled.abs() + 0.5).floor_().copysign_(scaled)  # halves away from zero
    return _blocks(halves(scale), codes.to(torch.int8).view(torch.uint8))


@dataclass(frozen=True, slots=True)
class _Affine:
    """A type of super-blocks whose sub-blocks of `sub` weights have a scale and a minimum of `levels` steps each.

    Without importance an error counts as the weight's size plus `floor` times the root mean square of its sub-block,
    and the stretches are `steps`; `energy` times the mean square of the super-block counts with importance.
    """

    sub: int
    top: int
    levels: int
    energy: float
    floor: float
    steps: tuple[float, ...]

    def encode(self, x: Tensor, importance: Tensor | None) -> tuple[Tensor, ...]:
        """Codes uint8 [N, 256], scales and minima uint8 [N, k], and the float16 pair they are multiples of [N, 4]."""
        parts = x.view(*x.shape[:2], -1, self.sub)
        if importance is None:
            weights = _energy(parts, -1).sqrt_().mul_(self.floor) + parts.abs()
            scales, lows, _ = affine(parts, weights, self.top, self.steps)
            found = [self._spanned(part.squeeze(-1)) for part in (scales, -lows)]
        else:
            given = importance.view(importance.shape[0], -1, self.sub)
            energy = self.energy * _energy(x, -1)[..., None]
            weights = _emphasised(parts, given, energy)
            scales, lows, _ = affine(parts, weights, self.top, FINE_STEPS)
            sums = weights.sum(-1)
            found = [positive(part.squeeze(-1), sums, self.levels) for part in (scales, -lows)]
        (scale, scale_codes), (low, low_codes) = found
        step, offset = (_stored(scale) * scale_codes)[..., None], (_stored(low) * low_codes)[..., None]
        codes = ((parts + offset) / step).round_().clamp_(0, self.top)
        codes = torch.where(step == 0, 0.0, codes)
        flat = (part.to(torch.uint8).view(-1, part[0, 0].numel()) for part in (codes, scale_codes, low_codes))
        return *flat, halves(torch.cat([scale, low], -1)).view(-1, 4)

    def _spanned(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """The grid from 0 to the largest of `numbers` [..., k]: its step [..., 1] and the codes."""
        high = numbers.amax(-1, keepdim=True)
        inverse = torch.where(high > 0, _over(self.levels, high), 0.0)
        return high / self.levels, (numbers * inverse).round_().clamp_(max=self.levels)


Q2_K = _Affine(sub=16, top=3, levels=15, energy=1.0, floor=0.0, steps=FINE_STEPS)
Q4_K = _Affine(sub=32, top=15, levels=63, energy=2.0, floor=1.0, steps=tuple(-1 + 0.1 * step for step in range(21)))
Q5_K = _Affine(sub=32, top=31, levels=63, energy=2.0, floor=1.0, steps=tuple(-0.5 + 0.1 * step for step in range(16)))


def _q2_k(x: Tensor, importance: Tensor | None) -> Tensor:
    codes, scales, mins, pair = Q2_K.encode(x, importance)
    return _blocks(scales | (mins << 4), gathered(codes, 32, 2), pair)


def _q4_k(x: Tensor, importance: Tensor | None) -> Tensor:
    codes, scales, mins, pair = Q4_K.encode(x, importance)
    return _blocks(pair, pairs_6bit(scales, mins), gathered(codes, 32, 4))


def _q5_k(x: Tensor, importance: Tensor | None) -> Tensor:
    codes, scales, mins, pair = Q5_K.encode(x, importance)
    return _blocks(pair, pairs_6bit(scales, mins), gathered(codes >> 4, 32, 1), gathered(codes, 32, 4))


def _rounded(parts: Tensor, step: Tensor, top: int, found: Tensor) -> Tensor:
    """The nearest codes 0 ... 2 top - 1 at these steps [..., k], uint8 [N, 256]; those `found` where a step is zero."""
    codes = (parts / step[..., None]).round_().clamp_(-top, top - 1).add_(top)
    return torch.where(step[..., None] == 0, found, codes).to(torch.uint8).view(-1, SUPER_BLOCK)


def _q3_k(x: Tensor, importance: Tensor | None) -> Tensor:
    """Sub-blocks of 16 with signed scales of 6 bits."""
    parts = x.view(*x.shape[:2], -1, 16)
    if importance is None:
        weights = _energy(parts, -1).sqrt_() + parts.abs()
    else:
        weights = _emphasised(parts, importance.view(len(importance), -1, 16), 2 * _energy(x, -1)[..., None])
    scales, found = signed(parts, weights, 4)
    scale, scale_codes = signed(scales.squeeze(-1), weights.sum(-1), 32)
    codes = _rounded(parts, _stored(scale) * (scale_codes - 32), 4, found)
    packed = scale_codes.to(torch.uint8).view(-1, 16)
    scale_fields = gathered(packed, 8, 4), gathered(packed >> 4, 4, 2)
    return _blocks(gathered(codes >> 2, 32, 1), gathered(codes, 32, 2), *scale_fields, halves(scale))


def _q6_k(x: Tensor, importance: Tensor | None) -> Tensor:
    """Sub-blocks of 16 with scales of 8 bits, the largest of which becomes -128."""
    parts = x.view(*x.shape[:2], -1, 16)
    weights = parts.square() if importance is None else importance.view(len(importance), -1, 16).expand_as(parts)
    scales, found = signed(parts, weights, 32)
    scales = scales.squeeze(-1)
    peak = scales.gather(-1, scales.abs().argmax(-1, keepdim=True))
    inverse = torch.where(peak.abs() < TINY, 0.0, _over(-128, peak))
    scale = _inverse(inverse)
    scale_codes = (scales * inverse).round_().clamp_(max=127)
    codes = _rounded(parts, _stored(scale) * scale_codes, 32, found)
    signed_bytes = scale_codes.to(torch.int8).view(torch.uint8)
    return _blocks(gathered(codes, 64, 4), gathered(codes >> 4, 32, 2), signed_bytes, halves(scale))


def _plain(x: Tensor, importance: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).view(-1, 1).view(torch.uint8)


ENCODERS: dict[str, Encoder] = {
    "f32": partial(_plain, dtype=torch.float32),
    "f16": partial(_plain, dtype=torch.float16),
    "bf16": partial(_plain, dtype=torch.bfloat16),
    "q4_0": partial(_signed_32, bits=4),
    "q4_1": partial(_affine_32, bits=4),
    "q5_0": partial(_signed_32, bits=5),
    "q5_1": partial(_affine_32, bits=5),
    "q8_0": _q8_0,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
}
