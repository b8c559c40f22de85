"""Batched sampling. Each row has its own random stream: a token depends on its logits and seed, not on neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor

from llmopt_cli.runtime.request import SamplingParams

COLDEST = 1e-5  # below it, dividing logits would overflow; the likeliest token has all the weight long before


def sample(logits: Tensor, params: Sequence[SamplingParams], streams: Sequence[Random]) -> list[int]:
    """One token for each row of `logits` (N, V): the likeliest at temperature 0, else drawn with the row's stream."""
    tokens = logits.argmax(dim=-1).tolist()
    for filtered in (False, True):
        # Rows with and without top-k/top-p are drawn apart: the two walk the vocabulary in different orders.
        rows = [i for i, p in enumerate(params) if p.temperature > 0 and (p.top_k > 0 or p.top_p < 1) == filtered]
        if not rows:
            continue
        chosen = [params[row] for row in rows]
        uniforms = [streams[row].random() for row in rows]
        draw = _draw_filtered if filtered else _draw
        drawn = draw(_probabilities(logits[rows], chosen), uniforms, chosen)
        for row, token in zip(rows, drawn, strict=True):
            tokens[row] = token
    return [int(token) for token in tokens]


def _probabilities(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    temperatures = torch.tensor([max(p.temperature, COLDEST) for p in params], device=logits.device)
    return torch.softmax(logits.float() / temperatures[:, None], dim=-1)


def _draw(probabilities: Tensor, uniforms: Sequence[float], params: Sequence[SamplingParams]) -> list[int]:
    return _invert(probabilities, uniforms).tolist()


def _draw_filtered(probabilities: Tensor, uniforms: Sequence[float], params: Sequence[SamplingParams]) -> list[int]:
    """Top-k, then top-p on what is left: the smallest set of likeliest tokens with mass top_p (arXiv 1904.09751)."""
    ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
    vocabulary = ranked.shape[1]
    ranks = torch.arange(vocabulary, device=ranked.device)
    top_k = torch.tensor([p.top_k or vocabulary for p in params], device=ranked.device)[:, None]
    top_p = torch.tensor([p.top_p for p in params], device=ranked.device, dtype=torch.float64)[:, None]
    kept = torch.where(ranks < top_k, ranked, 0.0).double()
    before = (kept.cumsum(-1) - kept) / kept.sum(-1, keepdim=True)
    kept = torch.where((before < top_p) | (top_p >= 1), kept, 0.0)
    return order.gather(1, _invert(kept, uniforms)[:, None]).squeeze(1).tolist()


def _invert(weights: Tensor, uniforms: Sequence[float]) -> Tensor:
    """The index at which each row's cumulative weight passes u of its total. weights (N, V), u in [0, 1) -> (N,)."""
    cumulative = weights.double().cumsum(-1)
    targets = torch.tensor(uniforms, device=weights.device, dtype=torch.float64)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True).squeeze(1).clamp(max=weights.shape[1] - 1)
