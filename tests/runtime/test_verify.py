"""The verifier's tokens are distributed as the target says, whoever drafted; a wrong one is found out."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
import torch
from torch import Tensor

from llmopt_cli.runtime.speculative.verify import choose, draw

DRAWS = 4_000
TESTS = 40  # by which the level is corrected
LEVEL = 1e-4 / TESTS
Choose = Callable[[Tensor, int, Tensor | None, Random], int]


def p_value(counts: Tensor, expected: Tensor) -> float:
    """Of Pearson's chi-square; cells that are expected fewer than five times are one."""
    rare = expected < 5
    cells = [*zip(counts[~rare].tolist(), expected[~rare].tolist(), strict=True)]
    if float(expected[rare].sum()) > 0:
        cells.append((float(counts[rare].sum()), float(expected[rare].sum())))
    statistic = sum((count - wanted) ** 2 / wanted for count, wanted in cells)
    half = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half, torch.tensor(statistic / 2, dtype=torch.float64)))


def distribution(size: int, seed: int, sharpness: float, cut: int = 0) -> Tensor:
    """float64 [size]; the last `cut` tokens can't come, as after top-k."""
    logits = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * sharpness
    if cut:
        logits[-cut:] = -torch.inf
    return logits.softmax(-1)


def drawn(rule: Choose, target: Tensor, chances: Tensor | None) -> float:
    """The p-value of what `rule` makes of drafts from `chances`, or of ever the same draft."""
    stream, proposer = Random(7), Random(8)
    counts = torch.zeros(len(target), dtype=torch.float64)
    certain = int(target.argsort()[-2])
    for _ in range(DRAWS):
        drafted = certain if chances is None else draw(chances.double(), proposer)
        counts[rule(target, drafted, chances, stream)] += 1
    return p_value(counts, target * DRAWS)


@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("sharpness", [0.3, 2.0])
@pytest.mark.parametrize("drafting", ["near", "far", "certain"])
def test_tokens_are_distributed_as_the_target_says(size: int, sharpness: float, drafting: str) -> None:
    target = distribution(size, 1, sharpness, cut=2)
    noise = 0.3 if drafting == "near" else 3.0
    chances = (target.clamp(min=1e-9).log() + noise * distribution(size, 2, 1.0).log()).softmax(-1).float()
    assert drawn(choose, target, None if drafting == "certain" else chances) > LEVEL


def always(target: Tensor, drafted: int, chances: Tensor | None, stream: Random) -> int:
    return drafted


def redraws_from_the_target(target: Tensor, drafted: int, chances: Tensor | None, stream: Random) -> int:
    token = choose(target, drafted, chances, stream)
    return token if token == drafted else draw(target, stream)


@pytest.mark.parametrize("wrong", [always, redraws_from_the_target])
def test_a_wrong_verifier_fails_the_test(wrong: Choose) -> None:
    target, chances = distribution(8, 1, 1.0), distribution(8, 3, 1.0).float()
    assert drawn(wrong, target, chances) < LEVEL


def test_as_many_drafts_stand_as_both_distributions_share() -> None:
    target, chances = distribution(16, 1, 1.5), distribution(16, 5, 1.5).float()
    stream, proposer = Random(1), Random(2)
    drafts = [draw(chances.double(), proposer) for _ in range(DRAWS)]
    stood = sum(choose(target, drafted, chances, stream) == drafted for drafted in drafts)
    assert stood / DRAWS == pytest.approx(float(torch.minimum(target, chances.double()).sum()), abs=0.03)


def test_a_draft_that_cannot_come_never_stands_and_equal_distributions_always_do() -> None:
    target = torch.tensor([0.0, 0.25, 0.75], dtype=torch.float64)
    both = (None, target.float())
    assert all(choose(target, 0, chances, Random(seed)) for seed in range(50) for chances in both)
    assert all(choose(target, 1, target.float(), Random(seed)) == 1 for seed in range(50))
