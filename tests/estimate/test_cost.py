"""Cost: the hourly rate of all GPUs spread over tokens, over a day, and against what an API asks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmopt_cli.errors import UsageError
from llmopt_cli.estimate.bill import Bill, bill
from llmopt_cli.estimate.cost import ApiPrice, TokenCost, Work, break_even, day, usd_per_tokens
from llmopt_cli.estimate.deployment import wanted
from llmopt_cli.estimate.load import Load
from llmopt_cli.estimate.plan import answer
from llmopt_cli.estimate.question import ask
from llmopt_cli.spec.workload import Slo

SECONDS = st.floats(1e-4, 1e3)
LENGTHS = st.floats(1, 1e5)
RATES = st.floats(0.01, 1e3)
WORKS = st.builds(Work, LENGTHS, LENGTHS, SECONDS, SECONDS)
CHAT = Work(input_len=1000, output_len=250, prefill=0.05, decode=0.15)


def billed(
    model: str = "8b", gpu: str = "h100x1", slo: Slo | None = None, price: float | None = None, **asked: Any
) -> Bill:
    question = ask(wanted(None, model=model, gpu=gpu), Load.fixed(32, 1024, 256), price)
    found = bill(answer(question), slo or Slo(), **asked)
    assert found
    return found


def test_an_hour_of_tokens_costs_the_hourly_rate() -> None:
    assert usd_per_tokens(9.8, tokens_per_s=500, tokens=500 * 3600) == pytest.approx(9.8)


def test_a_million_cost_a_thousand_times_a_thousand() -> None:
    assert usd_per_tokens(2, 100, tokens=1_000_000) == pytest.approx(1000 * usd_per_tokens(2, 100))
    assert usd_per_tokens(0, 100) == 0


def test_7b_on_an_a100_at_3_dollars_costs_a_fiftieth_of_a_cent_per_1k() -> None:
    assert usd_per_tokens(3, tokens_per_s=4000) == pytest.approx(0.0002, rel=0.05)
    assert usd_per_tokens(3, tokens_per_s=2000) == pytest.approx(0.0004, rel=0.05)


@given(WORKS, RATES)
def test_input_and_output_sum_to_the_whole_request(work: Work, rate: float) -> None:
    cost = TokenCost(rate, work)
    parts = cost.input(1) * work.input_len + cost.output(1) * work.output_len
    assert parts == pytest.approx(cost.per_request, rel=1e-12)
    assert cost.all_in(1) * work.output_len == pytest.approx(cost.per_request, rel=1e-12)


@given(WORKS, RATES, st.floats(1, 10), st.floats(1, 1e6))
def test_cost_never_falls_when_the_price_rises(work: Work, rate: float, factor: float, requests: float) -> None:
    some, more = TokenCost(rate, work), TokenCost(rate * factor, work)
    assert more.input() >= some.input()
    assert more.output() >= some.output()
    assert more.all_in() >= some.all_in()
    assert day(more, requests).usd >= day(some, requests).usd


@given(WORKS, RATES, st.floats(1, 1e6))
def test_a_day_has_the_fewest_replicas_and_they_are_never_more_than_busy(
    work: Work, rate: float, requests: float
) -> None:
    found = day(TokenCost(rate, work), requests)
    busy = requests * work.seconds / 86400
    assert 0 <= found.idle_share < 1
    assert found.replicas * (1 - found.idle_share) == pytest.approx(busy)
    assert found.replicas == 1 or found.replicas - 1 < busy


def test_an_idle_gpu_is_paid_for() -> None:
    found = day(TokenCost(3, CHAT), requests=43_200)  # of the 432,000 that one replica can do
    assert found.idle_share == pytest.approx(0.9)
    assert found.usd == pytest.approx(72)
    assert found.usd_per_1m_output == pytest.approx(10 * TokenCost(3, CHAT).all_in())


@given(WORKS, RATES, st.floats(0.01, 100), st.floats(0.01, 100))
def test_at_the_break_even_both_cost_the_same(work: Work, rate: float, input_: float, output: float) -> None:
    cost, api = TokenCost(rate, work), ApiPrice(input_, output)
    requests = break_even(cost, api)
    if requests is None:
        assert api.per_request(work) < cost.per_request * (1 + 1e-9)
    else:
        found = day(cost, requests * (1 - 1e-12), api)
        assert found.usd == pytest.approx(found.api_usd)


@pytest.mark.parametrize("text", ["", "1", "1,2,3", "a,b", "-1,2", "nan,1", "0,0", "inf,1"])
def test_an_api_price_is_a_pair_of_prices(text: str) -> None:
    with pytest.raises(UsageError, match="no pair of prices"):
        ApiPrice.parse(text)


def test_an_api_price_may_leave_the_input_free() -> None:
    assert ApiPrice.parse("0, 2.4") == ApiPrice(0, 2.4)


def test_the_most_requests_at_once_make_the_cheapest_token() -> None:
    found = billed()
    assert found.best
    assert found.given.load.concurrency == 32
    assert found.best.load.concurrency == 256
    assert found.best.cost.all_in() < found.given.cost.all_in()


def test_a_limit_makes_tokens_dearer_and_an_impossible_one_none_good() -> None:
    free, limited, none = billed(), billed(slo=Slo(tpot_ms=15)), billed(slo=Slo(tpot_ms=0.1))
    assert free.best
    assert limited.best
    assert limited.best.good
    assert limited.best.cost.all_in() > free.best.cost.all_in()
    assert none.best is None
    assert not none.given.good
    assert none.daily is none.given


def test_spot_is_the_low_end_of_the_range_unless_it_is_given() -> None:
    listed, given_ = billed(), billed(spot_price=0.5)
    assert listed.spot
    assert listed.spot.usd_per_hour == 1.99
    assert "low end of the range 1.99-5.50" in listed.spot.source
    assert listed.given.spot
    assert listed.given.spot.all_in() == pytest.approx(listed.given.cost.all_in() * 1.99 / 2.95)
    assert given_.spot
    assert (given_.spot.usd_per_hour, given_.spot.source) == (0.5, "--spot-price")
    assert billed(price=1.5).spot is None  # the range begins above the price that is paid


@pytest.mark.parametrize("price", [-1.0, float("nan"), float("inf")])
def test_a_spot_price_is_a_price(price: float) -> None:
    with pytest.raises(UsageError, match=r"--spot-price .* is no price"):
        billed(spot_price=price)


def test_nobody_bills_what_has_no_price_or_does_not_fit() -> None:
    for model, gpu in (("8b", "mi325x"), ("405b", "t4")):
        assert bill(answer(ask(wanted(None, model=model, gpu=gpu), Load.fixed(8, 512, 64))), Slo()) is None


def test_a_dear_api_is_beaten_and_a_cheap_one_never() -> None:
    dear, cheap = billed(api=ApiPrice(3, 15)), billed(api=ApiPrice(0.001, 0.001))
    assert dear.break_even
    assert dear.break_even.usd == pytest.approx(dear.break_even.api_usd)
    assert cheap.break_even is None
    assert all(one.api_usd is not None and one.api_usd < one.usd for one in cheap.days)


def test_the_day_that_was_asked_for_is_billed() -> None:
    found = billed(requests_per_day=10_000)
    assert found.asked
    assert found.asked.tokens == 10_000 * 1280
    assert replace(found.asked, requests=0) != found.asked
    assert 0.9 < found.asked.idle_share < 1
