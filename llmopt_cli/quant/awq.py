"""Activation-aware weight quantization (Lin et al., arXiv 2306.00978): scale channels that matter, then clip ranges.

Works on one group of linears that read the same tensor, given what they saw. Scales are chosen here; clipping is the
grid's search. Nothing is accepted that does not lower the output error on the calibration inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmopt_cli.quant.gptq import gptq
from llmopt_cli.quant.grid import output_error, quantize_weight
from llmopt_cli.quant.structure import Group, Producer
from llmopt_cli.quant.walk import Seen, first_output
from llmopt_cli.spec.scheme import Scheme

STEPS = 20  # of the exponent, as in the paper
CALL_TOKENS = 2048  # of the parent's inputs on which candidates are compared
FLOOR = 1e-4  # below it a mean is noise


@dataclass(frozen=True, eq=False)
class Choice:
    """What is best for a group: weights multiplied by `scale` [in], and searched ranges for the `clipped` linears."""

    scale: Tensor
    clipped: frozenset[str]

    @property
    def scaled(self) -> bool:
        """Whether the scale does anything."""
        return not bool((self.scale == 1).all())


def choose(block: nn.Module, group: Group, seen: Seen, scheme: Scheme) -> Choice:
    """Search scale and clipping for the linears of `group`; the block is left as it was."""
    return _choose(block, group, seen, scheme, _clip)


def choose_for_gptq(block: nn.Module, group: Group, seen: Seen, scheme: Scheme) -> Choice:
    """The scale after which GPTQ leaves the smallest error, or none; all linears count as clipped."""
    return _choose(block, group, seen, scheme, _solve)


Finish = Callable[["_Error", Tensor, Scheme], tuple[float, Choice]]


@torch.inference_mode()
def _choose(block: nn.Module, group: Group, seen: Seen, scheme: Scheme, finish: Finish) -> Choice:
    """The scale that is best for plain rounding competes with none at all once more, after `finish`."""
    weights = {name: _weight(block, name).clone() for name in group.linears}
    error = _Error(block, group, seen, weights)
    unscaled, *scales = candidates(seen.mean_abs, list(weights.values()), group.producer, scheme)
    ranked = sorted(scales, key=lambda scale: error(_rounded(weights, scale, scheme)))
    _, best = min((finish(error, scale, scheme) for scale in (unscaled, *ranked[:1])), key=lambda found: found[0])
    for name, weight in weights.items():
        _weight(block, name).copy_(weight)
    return best


def candidates(
    mean_abs: Tensor, weights: Sequence[Tensor], producer: Producer | None, scheme: Scheme
) -> Iterator[Tensor]:
    """Scales [in] to try: none at all, and if a producer can absorb one, the two forms of the paper's released code.

    x^r and x^r / w^(1-r) for r of 0 to 1, where x is the mean |input| of a channel and w its mean share of its group's
    largest weight; normalised to sqrt(max * min) = 1, and equal where consumer channels share a producer channel.
    """
    yield torch.ones_like(mean_abs)
    if producer is None:
        return
    stacked = torch.cat(list(weights))
    groups = stacked.view(stacked.shape[0], -1, scheme.group_size or stacked.shape[1]).abs()
    shares = (groups / groups.amax(-1, keepdim=True).clamp(min=FLOOR)).view_as(stacked).mean(0)
    x, w = (producer.tie(values).clamp(min=FLOOR) for values in (mean_abs, shares))
    for step in range(STEPS + 1):
        r = step / STEPS
        for scale in (x**r, x**r / w ** (1 - r)):
            yield producer.spread(scale / (scale.max() * scale.min()).sqrt())


def rescale(weight: Tensor, gram: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """weight * scale, and the second moments [in, in] of the inputs x / scale that it then meets."""
    return weight * scale, gram / scale / scale[:, None]


@dataclass(frozen=True, eq=False)
class _Error:
    """Mean squared error that approximate weights make at the output of the group's parent (or of its only linear)."""

    block: nn.Module
    group: Group
    seen: Seen
    weights: Mapping[str, Tensor]

    def __call__(self, approximate: Mapping[str, Tensor]) -> float:
        if not self.seen.calls:
            rows = [output_error(self.weights[name], approximate[name], self.seen.gram) for name in self.weights]
            return float(torch.cat(rows).sum())
        for name, weight in approximate.items():
            _weight(self.block, name).copy_(weight)
        parent = self.block.get_submodule(self.group.parent)
        squares = [
            (first_output(parent(*call.args, **call.kwargs)) - call.output).square().mean() for call in self.seen.calls
        ]
        return float(torch.stack(squares).mean())


def _clip(error: _Error, scale: Tensor, scheme: Scheme) -> tuple[float, Choice]:
    """Search the ranges of each linear in turn, kept only if the error falls. Returns the error and the choice."""
    current = _rounded(error.weights, scale, scheme)
    least, clipped = error(current), set()
    for name, weight in error.weights.items():
        scaled, gram = rescale(weight, error.seen.gram, scale)
        trial = current | {name: quantize_weight(scaled, scheme, gram).dequantize() / scale}
        found = error(trial)
        if found < least:
            current, least = trial, found
            clipped.add(name)
    return least, Choice(scale, frozenset(clipped))


def _solve(error: _Error, scale: Tensor, scheme: Scheme) -> tuple[float, Choice]:
    """GPTQ of all linears: the error that it leaves."""
    approximate = {}
    for name, weight in error.weights.items():
        solved = gptq(*rescale(weight, error.seen.gram, scale), scheme)
        approximate[name] = solved.codes.dequantize() / scale
    return error(approximate), Choice(scale, frozenset(approximate))


def _rounded(weights: Mapping[str, Tensor], scale: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """The weights [out, in] as scaling, rounding to nearest and scaling back leave them."""
    return {name: quantize_weight(weight * scale, scheme).dequantize() / scale for name, weight in weights.items()}


def _weight(block: nn.Module, name: str) -> Tensor:
    weight: Any = block.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight
