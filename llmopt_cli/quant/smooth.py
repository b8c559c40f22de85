"""SmoothQuant (Xiao et al., arXiv 2211.10438): what is hard to round in inputs is moved into weights.

Works on one group of linears that read the output of a norm, given what they saw. Inputs are divided by a factor per
channel, which the norm takes up, and weights multiplied by it; both are then rounded to 8 bits. Nothing is accepted
that does not lower the error with inputs rounded, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llmopt_cli.model.inputs import round_inputs
from llmopt_cli.quant.awq import Choice
from llmopt_cli.quant.int8 import int8
from llmopt_cli.quant.structure import Group
from llmopt_cli.quant.walk import Seen, first_output
from llmopt_cli.spec.scheme import Scheme

STRENGTH = 0.8  # alpha, how much of the difficulty moves: the paper's for models with gated MLPs
FLOOR = 1e-5  # below it a maximum is noise


@torch.inference_mode()
def choose(block: nn.Module, group: Group, seen: Seen, scheme: Scheme) -> Choice:
    """The smoothing of the inputs of `group`, or none; the block is left as it was. All linears count as clipped."""
    none = torch.ones_like(seen.max_abs)
    found = [none]
    if group.producer is not None and group.producer.kind != "rows" and seen.calls:
        weights = [block.get_parameter(f"{name}.weight") for name in group.linears]
        found.append(smoothing(seen.max_abs, weights))
    best = min(found, key=lambda scale: _error(block, group, seen, scale, scheme)) if len(found) > 1 else none
    return Choice(best, frozenset(group.linears))


def smoothing(max_abs: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """s_j = max|X_j|^a / max|W_j|^(1 - a), equation 4, for inputs' absolute maxima [in] and weights [out, in] each."""
    x = max_abs.clamp(min=FLOOR)
    w = torch.cat(list(weights)).abs().amax(0).clamp(min=FLOOR)
    return x**STRENGTH / w ** (1 - STRENGTH)


def _error(block: nn.Module, group: Group, seen: Seen, scale: Tensor, scheme: Scheme) -> float:
    """Mean squared error at the output of the group's parent, both weights and inputs rounded after `scale`."""
    parent = block.get_submodule(group.parent)
    with _rounded(block, group.linears, scale, scheme):
        squares = [
            (first_output(parent(*call.args, **call.kwargs)) - call.output).square().mean() for call in seen.calls
        ]
    return float(torch.stack(squares).mean())


@contextmanager
def _rounded(block: nn.Module, linears: Sequence[str], scale: Tensor, scheme: Scheme) -> Iterator[None]:
    """Let `linears` compute round(x / scale) round(weight * scale)^T for a while."""

    def divide(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (round_inputs(args[0] / scale, scheme),)

    saved = {name: block.get_parameter(f"{name}.weight").clone() for name in linears}
    hooks = [block.get_submodule(name).register_forward_pre_hook(divide) for name in linears]
    try:
        for name, weight in saved.items():
            block.get_parameter(f"{name}.weight").copy_(int8(weight * scale, None, scheme).codes.dequantize())
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, weight in saved.items():
            block.get_parameter(f"{name}.weight").copy_(weight)
