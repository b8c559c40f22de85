"""Cost: the hourly rate of all GPUs, spread over the tokens of an hour."""

from __future__ import annotations

import pytest

from llmopt_cli.estimate.cost import usd_per_tokens


def test_an_hour_of_tokens_costs_the_hourly_rate() -> None:
    assert usd_per_tokens(9.8, tokens_per_s=500, tokens=500 * 3600) == pytest.approx(9.8)


def test_a_million_cost_a_thousand_times_a_thousand() -> None:
    assert usd_per_tokens(2, 100, tokens=1_000_000) == pytest.approx(1000 * usd_per_tokens(2, 100))
    assert usd_per_tokens(0, 100) == 0
