"""What speculation did in a run: read from engines and servers alike, and set beside the formula."""

from __future__ import annotations

import random

import pytest

from llmopt_cli.bench.drafts import METRICS, between, figures, read_metrics, together, totals
from llmopt_cli.runtime.stats import EngineStats, Tally
from llmopt_cli.server.metrics import Metrics
from llmopt_cli.spec.recipe import Speculation

ASKED = Speculation(num_speculative_tokens=4, acceptance=0.7, method="suffix")


def thrown(acceptance: float, rounds: int = 20_000) -> Tally:
    """Of an engine in which half of the steps have drafts, of one to three tokens, each accepted with one chance."""
    dice, tally = random.Random(1), Tally()
    for _ in range(rounds):
        drafted, stood = dice.choice((0, 0, 0, 1, 2, 3)), 0
        while stood < drafted and dice.random() < acceptance:
            stood += 1
        tally.add(drafted, stood)
    tally.seconds, tally.alone = 3.0, 4.5
    return tally


def test_the_chance_of_a_token_is_found_again_and_so_are_the_tokens_of_a_step() -> None:
    found = figures(totals(thrown(0.6)), ASKED, None)
    measured, formula = found["measured"], found["formula"]
    assert measured["acceptance"] == pytest.approx(0.6, rel=0.02)
    assert measured["accepted_share"] < measured["acceptance"] - 0.1  # what lies behind a wrong token is wasted
    assert (measured["share"], measured["length"]) == pytest.approx((0.5, 2), rel=0.02)
    assert measured["speedup"] == 1.5
    # Drafts of one to three tokens bring a little less than as many of two.
    assert 0 < formula["as_accepted"]["off"]["tokens_per_step"] < 0.03
    assert formula["as_drafted"]["tokens_per_step"] > formula["as_accepted"]["tokens_per_step"]
    assert formula["as_asked"]["tokens_per_step"] == pytest.approx(2.7731)
    assert all(row["speedup"] is None for row in formula.values())  # of no known machine


def test_a_server_tells_what_its_engine_counted() -> None:
    tally = thrown(0.6, 100)
    stats = EngineStats(0, 0, 0.0, 1, 16, 0, 0, 0, 0, 0, speculation=tally)
    text = Metrics("demo, {the} one", 128, lambda: stats).exposition().decode()
    assert read_metrics(text) == totals(tally)
    assert set(METRICS.values()) == totals(tally).keys()


def test_of_another_server_what_it_tells_is_shown_and_the_rest_is_not_known() -> None:
    head = 'vllm:spec_decode_num_{}_total{{engine="{}",model_name="m"}} {}'
    lines = [
        head.format(name, engine, 2.0) for name in ("drafts", "draft_tokens", "accepted_tokens") for engine in "01"
    ]
    told = read_metrics("# HELP vllm:spec_decode_num_drafts_total x\n" + "\n".join(lines))
    assert told == {"drafts": 4, "tokens": 4, "accepted": 4}
    found = figures(told, None, None)
    assert (found["measured"]["accepted_share"], found["measured"]["speedup"]) == (1, None)
    assert found["formula"] == {}
    assert read_metrics("vllm:num_requests_running 1.0") is None


def test_a_run_is_what_it_added_and_runs_are_pooled() -> None:
    before, after = totals(thrown(0.6, 10)), totals(thrown(0.6, 30))
    run = between(before, after)
    assert run
    assert run["steps"] == 20
    pooled = together([run, None, run])
    assert pooled
    assert pooled["tokens"] == 2 * (after["tokens"] - before["tokens"])
    assert between(None, after) is together([None]) is None


def test_an_engine_that_never_drafted_has_no_acceptance() -> None:
    tally = Tally()
    tally.add(0, 0)
    found = figures(totals(tally), ASKED, None)
    assert (found["measured"]["share"], found["measured"]["acceptance"], found["measured"]["speedup"]) == (
        0,
        None,
        None,
    )
    assert found["formula"].keys() == {"as_asked"}
