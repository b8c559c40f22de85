"""Batched sampling. Each row has its own random stream: a token depends on its logits and seed, not on neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor

from llmopt_cli.runtime.request import SamplingParams, TokenLogprobs
from llmopt_kernels import argmax

COLDEST = 1e-5  # below it, dividing logits would overflow; the likeliest token has all the weight long before


def sample(logits: Tensor, params: Sequence[SamplingParams], streams: Sequence[Random]) -> list[int]:
    """One token for each row of `logits` (N, V): the likeliest at temperature 0, else drawn with the row's stream."""
    tokens: list[int] = argmax(logits).tolist()
    rows = [row for row, one in enumerate(params) if one.temperature > 0]
    if rows:
        uniforms = [streams[row].random() for row in rows]
        drawn = invert(weights_of(logits[rows], [params[row] for row in rows]), uniforms).tolist()
        for row, token in zip(rows, drawn, strict=True):
            tokens[row] = token
    return tokens


def _probabilities(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    temperatures = _column(params, "temperature", logits.device, torch.float32).clamp(min=COLDEST)
    return torch.softmax(logits.float() / temperatures, dim=-1)


def weights_of(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """How likely each token is to be drawn from rows of `logits` (N, V) at a temperature, but for a factor: float64."""
    probabilities = _probabilities(logits, params)
    rows = [row for row, one in enumerate(params) if one.cuts]
    weights = probabilities.double()
    if rows:
        kept, order = _cut(probabilities[rows], [params[row] for row in rows])
        weights[rows] = torch.zeros_like(kept).scatter(1, order, kept)
    return weights


def _cut(probabilities: Tensor, params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    """Typical-p, then top-k, then top-p of what is left, then min-p; one token stays at least.

    Weights float64 (N, V) from the likeliest token down, and which tokens those are.
    """
    probabilities = _typical(probabilities, params)
    ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
    vocabulary, device = ranked.shape[1], ranked.device
    top_k = torch.tensor([p.top_k or vocabulary for p in params], device=device)[:, None]
    top_p, min_p = (_column(params, name, device, torch.float64) for name in ("top_p", "min_p"))
    kept = torch.where(torch.arange(vocabulary, device=device) < top_k, ranked, 0.0).double()
    # Top-p (arXiv 1904.09751): the smallest set of likeliest tokens with that mass.
    before = (kept.cumsum(-1) - kept) / kept.sum(-1, keepdim=True)
    kept = torch.where((before < top_p) | (top_p >= 1), kept, 0.0)
    kept = torch.where(kept >= min_p * kept[:, :1], kept, 0.0)  # min-p (arXiv 2407.01082): relative to the likeliest
    return kept, order


def _typical(probabilities: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Typical-p (arXiv 2202.00666): the smallest set, by distance of surprise from its mean, with that mass."""
    typical_p = _column(params, "typical_p", probabilities.device, torch.float64)
    if bool((typical_p >= 1).all()):
        return probabilities
    exact = probabilities.double()
    surprise = -exact.clamp(min=torch.finfo(torch.float64).tiny).log()
    distance = (surprise - (exact * surprise).sum(-1, keepdim=True)).abs()
    order = distance.argsort(dim=-1, stable=True)
    mass = exact.gather(1, order)
    kept = (mass.cumsum(-1) - mass < typical_p) | (typical_p >= 1)
    return torch.where(torch.zeros_like(kept).scatter(1, order, kept), probabilities, 0.0)


def top_logprobs(logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    """For each row of `logits` (N, V): the log-probability and rank of `tokens`, and the likeliest `counts` tokens."""
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])
    ranks = (logprobs > chosen).sum(-1) + 1
    best, where = logprobs.topk(max(1, *counts), dim=-1)
    rows = zip(tokens, chosen[:, 0].tolist(), ranks.tolist(), where.tolist(), best.tolist(), counts, strict=True)
    return [
        TokenLogprobs(token, logprob, rank, tuple(zip(ids[:count], values[:count], strict=True)))
        for token, logprob, rank, ids, values, count in rows
    ]


def _column(params: Sequence[SamplingParams], name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """One parameter of all rows as (N, 1)."""
    return torch.tensor([getattr(one, name) for one in params], device=device, dtype=dtype)[:, None]


def invert(weights: Tensor, uniforms: Sequence[float]) -> Tensor:
    """The index at which each row's cumulative weight passes u of its total. weights (N, V), u in [0, 1) -> (N,)."""
    cumulative = weights.double().cumsum(-1)
    targets = torch.tensor(uniforms, device=weights.device, dtype=torch.float64)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True).squeeze(1).clamp(max=weights.shape[1] - 1)
