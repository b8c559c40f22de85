"""Penalties and bias against the formulas written out, one token at a time."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmopt_cli.runtime.logits import History, shape
from llmopt_cli.runtime.request import SamplingParams

TOKENS = st.lists(st.integers(0, 11), max_size=8)


def after(prompt: list[int], answer: list[int], ends: tuple[int, ...] = ()) -> History:
    history = History(set(prompt), ends)
    for token in answer:
        history.add(token)
    return history


@given(TOKENS, TOKENS, st.floats(0.5, 2), st.floats(-2, 2), st.floats(-2, 2))
def test_penalties_are_their_formulas(
    prompt: list[int], answer: list[int], repetition: float, presence: float, frequency: float
) -> None:
    params = SamplingParams(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency, logit_bias=((3, 1.5),)
    )
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    expected = logits[0].tolist()
    expected[3] += 1.5
    for token in {*prompt, *answer}:
        expected[token] = expected[token] / repetition if expected[token] > 0 else expected[token] * repetition
    for token, count in Counter(answer).items():
        expected[token] -= presence + frequency * count
    shape(logits, [params], [after(prompt, answer)])
    assert logits[0].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_only_allowed_tokens_remain() -> None:
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    shape(logits, [SamplingParams(allowed_token_ids=(2, 5))], [after([], [])])
    assert logits.isfinite().nonzero()[:, 1].tolist() == [2, 5]
    assert torch.equal(logits[0, [2, 5]], before[0, [2, 5]])


def test_before_min_tokens_nothing_ends() -> None:
    params = SamplingParams(min_tokens=2)
    for answer, ended in (([], False), ([5], False), ([5, 5], True)):
        logits = torch.zeros(1, 12)
        shape(logits, [params], [after([], answer, ends=(7, 9))])
        assert bool(logits[0, [7, 9]].isfinite().all()) == ended


def test_a_row_asks_for_itself_alone() -> None:
    logits = torch.zeros(2, 12)
    shape(logits, [SamplingParams(logit_bias=((1, 5.0),)), SamplingParams()], [after([], []), after([], [])])
    assert logits[1].abs().sum() == 0
    assert logits[0, 1] == 5
