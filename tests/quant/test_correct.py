"""The corrected weight makes good what inputs lost upstream."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmopt_cli.quant.correct import DAMPING, corrected


def random(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def seen() -> tuple[Tensor, Tensor, Tensor]:
    """A weight, inputs, and what they would be had nothing been quantized before: a part of the loss is predictable."""
    true = random(3000, 24, seed=1) @ random(24, 24, seed=2)
    lost = 0.1 * true @ random(24, 24, seed=3) / 24**0.5 + 0.02 * random(3000, 24, seed=4)
    return random(12, 24), true - lost, true


def moments(weight: Tensor, x: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    return x.T @ x / len(x), weight @ ((true - x).T @ x) / len(x)


def test_all_of_it_is_the_least_squares_solution(seen: tuple[Tensor, Tensor, Tensor]) -> None:
    weight, x, true = seen
    gram, owed = moments(weight, x, true)
    solution = torch.linalg.lstsq(x.double(), (true @ weight.T).double()).solution.T
    found = corrected(weight, gram, owed, strength=1.0, damping=0.0)
    assert torch.allclose(found.double(), solution, atol=1e-3)


def test_it_lowers_the_error_of_outputs(seen: tuple[Tensor, Tensor, Tensor]) -> None:
    weight, x, true = seen
    half = len(x) // 2
    found = corrected(weight, *moments(weight, x[:half], true[:half]), strength=1.0)
    wanted = true[half:] @ weight.T
    before, after = ((x[half:] @ one.T - wanted).norm() for one in (weight, found))
    assert float(after) < 0.5 * float(before)


def test_without_loss_upstream_nothing_is_corrected(seen: tuple[Tensor, Tensor, Tensor]) -> None:
    weight, _, true = seen
    assert torch.equal(corrected(weight, *moments(weight, true, true)), weight)


def test_inputs_of_nothing_but_zeros_leave_the_weight_alone() -> None:
    weight = random(4, 8)
    assert torch.equal(corrected(weight, torch.zeros(8, 8), torch.zeros(4, 8)), weight)


def test_more_damping_corrects_less(seen: tuple[Tensor, Tensor, Tensor]) -> None:
    weight, x, true = seen
    known = moments(weight, x, true)
    changes = [float((corrected(weight, *known, damping=d) - weight).norm()) for d in (DAMPING, 1.0, 10.0)]
    assert changes[0] > changes[1] > changes[2] > 0
