"""Sampling: the right distribution, the right cut, and independence of rows."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmopt_cli.errors import UsageError
from llmopt_cli.runtime.request import SamplingParams
from llmopt_cli.runtime.sampler import sample, top_logprobs

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0, 0.5])


def draw(params: SamplingParams, count: int) -> Counter[int]:
    rows, streams = LOGITS.repeat(count, 1), [Random(i) for i in range(count)]
    return Counter(sample(rows, [params] * count, streams))


def chi_square(found: Counter[int], expected: torch.Tensor, count: int) -> float:
    return sum((found[i] - count * float(p)) ** 2 / (count * float(p)) for i, p in enumerate(expected) if p > 0)


def test_greedy_takes_the_likeliest() -> None:
    assert draw(SamplingParams(), 5) == {4: 5}


@pytest.mark.parametrize("temperature", [1e-45, 1e-6])
def test_next_to_no_temperature_is_greedy(temperature: float) -> None:
    assert draw(SamplingParams(temperature=temperature), 5) == {4: 5}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_draws_from_the_softmax(temperature: float) -> None:
    expected = torch.softmax(LOGITS / temperature, -1)
    found = draw(SamplingParams(temperature=temperature), 20_000)
    assert chi_square(found, expected, 20_000) < 25.7  # 5 degrees of freedom, p = 1e-4


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(temperature=1, top_k=2), [4, 0]),
        (SamplingParams(temperature=1, top_p=0.01), [4]),
        (SamplingParams(temperature=1, top_p=0.7), [4, 0]),  # 0.60 + 0.22: the second reaches 0.7
        (SamplingParams(temperature=1, top_k=3, top_p=0.7), [4, 0]),  # of the renormalised three
        (SamplingParams(temperature=1, top_k=1, top_p=0.99), [4]),
        (SamplingParams(temperature=1, min_p=0.3), [4, 0]),  # 0.60, 0.22 and 0.08: a third of 0.60 is 0.18
        (SamplingParams(temperature=1, min_p=1), [4]),
        (SamplingParams(temperature=1, typical_p=0.2), [0]),  # surprise 1.51 is nearest to the entropy 1.19
        (SamplingParams(temperature=1, typical_p=0.5), [0, 4]),
    ],
)
def test_top_k_and_top_p_keep_the_smallest_set(params: SamplingParams, kept: list[int]) -> None:
    probabilities = torch.softmax(LOGITS, -1)
    expected = torch.zeros(6).index_copy(0, torch.tensor(kept), probabilities[kept])
    found = draw(params, 5_000)
    assert set(found) == set(kept)
    if len(kept) > 1:
        assert chi_square(found, expected / expected.sum(), 5_000) < 15.2  # 1 degree of freedom, p = 1e-4


@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.7, 1.5]), st.sampled_from([0, 2, 50]), st.sampled_from([0.3, 0.9, 1.0])),
        min_size=1,
        max_size=6,
    )
)
def test_a_row_does_not_depend_on_its_neighbours(settings: list[tuple[float, int, float]]) -> None:
    params = [SamplingParams(temperature=t, top_k=k, top_p=p) for t, k, p in settings]
    logits = torch.randn(len(params), 40, generator=torch.Generator().manual_seed(0))
    together = sample(logits, params, [Random(i) for i in range(len(params))])
    alone = [sample(logits[i : i + 1], [one], [Random(i)])[0] for i, one in enumerate(params)]
    assert together == alone


@pytest.mark.parametrize(
    "wrong",
    [
        *({"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"max_tokens": 0}, {"stop": ("",)}),
        *({"min_p": 2}, {"typical_p": 0}, {"repetition_penalty": 0}, {"presence_penalty": 3}, {"logprobs": -1}),
        *({"frequency_penalty": float("nan")}, {"min_tokens": 200}, {"logit_bias": ((5, 101.0),)}),
    ],
)
def test_parameters_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_top_logprobs_are_those_of_the_softmax() -> None:
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    expected = logits.log_softmax(-1)
    for row, (found, count) in enumerate(zip(top_logprobs(logits, [7, 8, 9], [0, 2, 5]), (0, 2, 5), strict=True)):
        assert found.logprob == pytest.approx(float(expected[row, found.token]))
        assert found.rank == 1 + int((expected[row] > expected[row, found.token]).sum())
        assert [token for token, _ in found.top] == expected[row].topk(count).indices.tolist()
