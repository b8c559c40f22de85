"""What a change of a model cost: perplexity, KL divergence and top-1 agreement against the base, with intervals.

Compares two functions from token ids to logits on the same windows, token by token. Knows nothing of quantization.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from llmopt_cli.errors import ModelError
from llmopt_cli.output import Report

Logits = Callable[[Tensor], Tensor]  # token ids int64 [1, L] -> logits [1, L, vocabulary]
Both = Callable[[slice], tuple[Tensor, Tensor]]  # some of a window's positions -> logits [1, T, V] of both models
TILE = 64  # positions at once
RESAMPLES = 500
SEED = 0  # of the resampling: the same measurements have the same interval
CONVENTION = "windows do not overlap; every token but a window's first is scored"


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and the 2.5th and 97.5th percentile of its paired bootstrap over windows."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Quality:
    """`other` against `base` on the same tokens. KL is KL(base || other) per token in nats, over the whole vocabulary.

    `perplexity_ratio` is exp of the mean difference of the true token's log-probability: its interval is narrow since
    both models are measured on the same tokens. `top1_agreement` is the share of tokens with the same argmax.
    """

    windows: int
    window: int
    tokens: int
    convention: str
    perplexity_base: float
    perplexity: float
    perplexity_ratio: Interval
    kl_mean: Interval
    kl_p99: Interval
    top1_agreement: Interval


class TokenScores(NamedTuple):
    """Per scored token, each float32 [windows, L - 1]: the true token's log-probabilities, KL, same argmax or not."""

    base: Tensor
    other: Tensor
    kl: Tensor
    same: Tensor


@torch.inference_mode()
def compare(base: Logits, other: Logits, windows: Tensor, report: Report) -> Quality:
    """Measure on token ids int64 [N, L], N of at least 2. ModelError if logits are not finite."""
    pairs = ((partial(_at, base(ids), other(ids)), ids) for ids in torch.split(windows, 1))
    return compare_pairs(pairs, len(windows), report)


def _at(base: Tensor, other: Tensor, positions: slice) -> tuple[Tensor, Tensor]:
    return base[:, positions], other[:, positions]


@torch.inference_mode()
def compare_pairs(pairs: Iterable[tuple[Both, Tensor]], count: int, report: Report) -> Quality:
    """Measure on (logits, token ids [1, L]) of `count` windows, at least 2. Peak memory: logits of TILE tokens."""
    assert count > 1
    scored = []
    for done, (both, ids) in enumerate(pairs, start=1):
        tiles = [slice(at, min(at + TILE, ids.shape[1] - 1)) for at in range(0, ids.shape[1] - 1, TILE)]
        parts = [score(*both(tile), ids[:, tile.start + 1 : tile.stop + 1]) for tile in tiles]
        scored.append([torch.cat(field, 1) for field in zip(*parts, strict=True)])
        report(done, count)
    return summarize(TokenScores(*(torch.cat(field) for field in zip(*scored, strict=True))))


def score(base_logits: Tensor, other_logits: Tensor, true: Tensor) -> TokenScores:
    """Score logits [B, T, V] of both models, where the tokens `true` [B, T] came next."""
    base, other = (logits.float().log_softmax(-1) for logits in (base_logits, other_logits))
    same = (base.argmax(-1) == other.argmax(-1)).float()
    true = true[..., None].to(base.device)
    found = [logits.gather(-1, true)[..., 0] for logits in (base, other)]
    # In place: no third and fourth tensor of the vocabulary's size.
    kl = torch.linalg.vecdot(other.sub_(base), base.exp_()).neg_()
    if not bool(kl.isfinite().all()):
        raise ModelError("the model's logits are not finite numbers, so its quality can't be measured")
    return TokenScores(*(part.cpu() for part in (*found, kl.clamp_(min=0), same)))  # rounding may put a 0 below zero


def summarize(scores: TokenScores) -> Quality:
    """Figures and intervals. Tokens of a window depend on each other, hence whole windows are resampled."""
    count, scored = scores.kl.shape
    draws = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(SEED))
    difference = (scores.base - scores.other).mean(1, dtype=torch.float64)

    def of_means(values: Tensor) -> Interval:
        per_window = values.mean(1, dtype=torch.float64)
        return _interval(per_window.mean(), per_window[draws].mean(1))

    ratio = _interval(difference.mean().exp(), difference[draws].mean(1).exp())
    p99 = _interval(_p99(scores.kl), torch.stack([_p99(scores.kl[draw]) for draw in draws]))
    return Quality(
        windows=count,
        window=scored + 1,
        tokens=count * scored,
        convention=CONVENTION,
        perplexity_base=math.exp(-scores.base.mean(dtype=torch.float64)),
        perplexity=math.exp(-scores.other.mean(dtype=torch.float64)),
        perplexity_ratio=ratio,
        kl_mean=of_means(scores.kl),
        kl_p99=p99,
        top1_agreement=of_means(scores.same),
    )


def _p99(values: Tensor) -> Tensor:
    """The 99th percentile: the smallest value that at least 99 % do not exceed."""
    flat = values.flatten()
    return flat.kthvalue(max(1, -(-99 * flat.numel() // 100))).values


def _interval(value: Tensor, resampled: Tensor) -> Interval:
    ordered = resampled.sort().values
    edge = round(0.025 * (len(ordered) - 1))
    return Interval(float(value), float(ordered[edge]), float(ordered[-1 - edge]))
