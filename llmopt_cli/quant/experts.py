"""Experts as linear layers: what transformers stacks into 3-D parameters, taken apart so that each can be quantized.

Whether a stack is of the kind known here (gate and up one behind the other, then down) is tried out on small random
numbers, not read off its class. Knows no files and no quantization.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llmopt_cli.errors import ModelError

MEMBERS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}  # stacked parameter -> its linears
TOLERANCE = 1e-4


class Expert(nn.Module):
    """down(act(gate(x)) * up(x)), without biases."""

    def __init__(self, hidden: int, inner: int, act: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
        return out


class Experts(nn.ModuleList):
    """All experts of a block. Each runs, on no tokens if none came: what it saw can then be counted."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], the chosen experts and their weights [T, k] -> [T, H]."""
        out = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self):
            token, slot = torch.where(top_k_index == index)
            weighted = expert(hidden_states[token]) * top_k_weights[token, slot, None]
            out.index_add_(0, token, weighted.to(out.dtype))
        return out


def stacks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of all modules that hold stacked experts."""
    for name, module in model.named_modules():
        if any(parameter.ndim == 3 for parameter in module.parameters(recurse=False)):
            yield name, module


def split_experts(model: nn.Module) -> None:
    """Replace every stack of a model on the meta device by `Experts`; ModelError names one that computes otherwise."""
    for name, stack in list(stacks(model)):
        try:
            _same_as_split(stack)
        except (KeyError, RuntimeError, AttributeError, TypeError, IndexError, AssertionError) as error:
            raise ModelError(f"`{name}` holds experts of a kind that can't be taken apart: {error}") from None
        count, double, hidden = stack.get_parameter("gate_up_proj").shape
        act: Any = stack.act_fn
        with torch.device("meta"):
            model.set_submodule(name, Experts(Expert(hidden, double // 2, act) for _ in range(count)))


@torch.inference_mode()
def _same_as_split(stack: Any) -> None:
    """AssertionError unless a small stack of this class computes what `Experts` computes with the same numbers."""
    assert dict(stack.named_parameters()).keys() == MEMBERS.keys(), "other weights than gate_up_proj and down_proj"
    count, hidden, inner, tokens = len(stack.gate_up_proj), 8, 6, 16
    generator = torch.Generator().manual_seed(0)
    small = copy.copy(stack)
    small.config = copy.copy(stack.config)
    small.config._experts_implementation = "eager"
    both = torch.randn(count, 2 * inner, hidden, generator=generator)
    down = torch.randn(count, hidden, inner, generator=generator)
    small._parameters = {"gate_up_proj": nn.Parameter(both), "down_proj": nn.Parameter(down)}
    split = Experts(Expert(hidden, inner, stack.act_fn) for _ in range(count))
    for index, expert in enumerate(split):
        gate, up = both[index].chunk(2)
        parts = {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down[index]}
        expert.load_state_dict(parts)
    x = torch.randn(tokens, hidden, generator=generator)
    weights, chosen = torch.rand(tokens, count, generator=generator).topk(min(2, count), dim=-1)
    difference = (split(x, chosen, weights) - small(x, chosen, weights)).abs().max()
    assert difference < TOLERANCE, f"its output is off by {float(difference):.2g}"
