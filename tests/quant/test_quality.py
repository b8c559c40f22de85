"""Quality figures against naive loops, and what their intervals must do."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llmopt_cli.errors import ModelError
from llmopt_cli.quant.quality import Quality, compare, score

VOCABULARY = 11


def model(noise: float, seed: int = 1) -> Callable[[Tensor], Tensor]:
    """A table of bigram logits, disturbed by `noise`."""
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))
    table += noise * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    return lambda ids: table[ids]


def tokens(windows: int, length: int) -> Tensor:
    return torch.randint(VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(5))


def measure(noise: float, windows: int = 8, length: int = 9) -> Quality:
    return compare(model(0), model(noise), tokens(windows, length), lambda done, total: None)


def test_a_model_equals_itself() -> None:
    same = measure(0)
    assert same.perplexity == same.perplexity_base
    assert (same.perplexity_ratio.low, same.perplexity_ratio.value, same.perplexity_ratio.high) == (1, 1, 1)
    assert (same.kl_mean.value, same.kl_p99.value, same.top1_agreement.value) == (0, 0, 1)


def test_figures_equal_naive_loops() -> None:
    ids, base, other = tokens(8, 9), model(0), model(0.5)
    losses: dict[str, list[float]] = {"base": [], "other": []}
    divergences, agreed = [], 0
    for window in ids:
        for position in range(8):
            p, q = (torch.softmax(one(window[position].double().long()).double(), -1) for one in (base, other))
            true = int(window[position + 1])
            losses["base"].append(-math.log(p[true]))
            losses["other"].append(-math.log(q[true]))
            divergences.append(sum(float(p[i]) * math.log(p[i] / q[i]) for i in range(VOCABULARY)))
            agreed += int(p.argmax() == q.argmax())
    found = measure(0.5)
    means = {name: sum(values) / 64 for name, values in losses.items()}
    assert found.tokens == 64
    assert found.perplexity_base == pytest.approx(math.exp(means["base"]), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(means["other"]), rel=1e-5)
    assert found.perplexity_ratio.value == pytest.approx(math.exp(means["other"] - means["base"]), rel=1e-5)
    assert found.kl_mean.value == pytest.approx(sum(divergences) / 64, rel=1e-4)
    assert found.kl_p99.value == pytest.approx(
        sorted(divergences)[63], rel=1e-4
    )  # 64 values: the 99th percentile is the last
    assert found.top1_agreement.value == agreed / 64


def test_intervals_hold_their_figure_and_narrow_with_more_windows() -> None:
    few, many = measure(0.5, windows=8), measure(0.5, windows=200)
    for name in ("perplexity_ratio", "kl_mean", "kl_p99", "top1_agreement"):
        for found in (few, many):
            figure = getattr(found, name)
            assert figure.low <= figure.value <= figure.high
    assert many.kl_mean.high - many.kl_mean.low < 0.5 * (few.kl_mean.high - few.kl_mean.low)


def test_the_mean_interval_covers_as_often_as_it_says() -> None:
    """Of 60 measurements on fresh windows, about 57 intervals must hold the figure of a very long text."""
    truth = measure(0.5, windows=3000).kl_mean.value
    hits = 0
    for trial in range(60):
        ids = torch.randint(VOCABULARY, (40, 9), generator=torch.Generator().manual_seed(100 + trial))
        found = compare(model(0), model(0.5), ids, lambda done, total: None).kl_mean
        hits += found.low <= truth <= found.high
    assert 51 <= hits <= 60


def test_more_noise_costs_more() -> None:
    slight, strong = measure(0.1, windows=50), measure(0.5, windows=50)
    assert slight.kl_mean.high < strong.kl_mean.low
    assert slight.top1_agreement.value > strong.top1_agreement.value


def test_logits_that_are_no_numbers_are_refused() -> None:
    ids = tokens(1, 4)
    with pytest.raises(ModelError, match="not finite"):
        score(model(0)(ids), torch.full((1, 4, VOCABULARY), torch.nan), ids)
