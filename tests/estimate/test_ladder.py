"""The ladder: each rung is the step model's, none is a constant, and one that loses says so."""

from __future__ import annotations

from itertools import pairwise, product
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmopt_cli.errors import CapacityError
from llmopt_cli.estimate.deployment import wanted
from llmopt_cli.estimate.ladder import (
    CLAIMS,
    Ladder,
    Rung,
    expected_longest,
    find_draft,
    ladder,
    spread,
    static_tokens_per_s,
)
from llmopt_cli.estimate.latency import StepModel
from llmopt_cli.estimate.load import Load
from llmopt_cli.estimate.plan import answer
from llmopt_cli.estimate.question import Question, ask
from llmopt_cli.estimate.work import work
from llmopt_cli.spec.recipe import Speculation


def question(model: str = "70b", gpu: str = "h100", concurrency: int = 32, output_len: int = 256) -> Question:
    return ask(wanted(None, model=model, gpu=gpu), Load.fixed(concurrency, 1024, output_len))


def climbed(model: str = "70b", gpu: str = "h100", concurrency: int = 32) -> Ladder:
    return ladder(question(model, gpu, concurrency))


def rung(found: Ladder, name: str) -> Rung:
    return next(one for one in found.rungs if one.name == name)


def test_70b_climbs_from_one_by_one_to_the_prefix_cache() -> None:
    found = climbed()
    names = ["one by one", "static batch", "continuous batching", "INT8 weights", "FP8 + speculation"]
    assert [one.name for one in found.rungs] == [*names, "the same + prefix cache"]
    assert found.on.gpus == 4
    assert [one.tokens_per_s for one in found.rungs] == sorted(one.tokens_per_s for one in found.rungs)
    assert rung(found, "static batch").relative_cost == 1


def test_factors_and_costs_follow_from_the_speeds() -> None:
    rungs = climbed().rungs
    for before, one in pairwise(rungs):
        assert one.factor == pytest.approx(one.tokens_per_s / before.tokens_per_s)
        assert one.relative_cost == pytest.approx(rungs[1].tokens_per_s / one.tokens_per_s)


def test_one_by_one_is_a_request_at_a_time() -> None:
    found = climbed("8b")
    step = StepModel(found.on)
    seconds = step.prefill(1024) + 256 * step.decode(1, 1024 + 128)
    assert rung(found, "one by one").tokens_per_s == pytest.approx(256 / seconds, rel=0.1)  # lengths are spread


def test_memory_is_that_of_the_precision() -> None:
    found = climbed()
    bf16, int8 = (rung(found, name).weight_bytes for name in ("static batch", "INT8 weights"))
    assert bf16 == pytest.approx(141e9, rel=0.02)
    assert 0.5 < int8 / bf16 < 0.54
    drafted = rung(found, "FP8 + speculation").weight_bytes
    assert drafted - int8 == pytest.approx(2.47e9, rel=0.02)  # Llama-3.2-1B in 16 bits
    assert rung(found, "one by one").kv_bytes < rung(found, "static batch").kv_bytes / 20


def test_a_step_that_loses_says_so() -> None:
    found = climbed("8b", "a100", 256)
    drafted = rung(found, "FP8 + speculation")
    assert "it loses at this batch" in drafted.reason
    gains = rung(climbed("8b", "h100", 2), "FP8 + speculation")
    assert "loses" not in gains.reason
    assert gains.factor > 1


def test_what_does_not_fit_in_16_bits_has_no_ladder() -> None:
    with pytest.raises(CapacityError, match=r"Llama-3\.1-405B in 16 bits does not fit 8 x T4"):
        climbed("405b", "t4")


def test_a_static_batch_of_equal_requests_wastes_nothing() -> None:
    recommended = answer(question("8b")).recommended
    assert recommended
    step, load = StepModel(recommended.on), Load.fixed(32, 64, 512)
    speed, wait = static_tokens_per_s(step, load, 32)
    assert wait == 1
    assert speed == pytest.approx(work(step, load).tokens_per_s, rel=0.05)


def test_a_static_batch_is_slower_the_more_lengths_differ() -> None:
    recommended = answer(question("8b")).recommended
    assert recommended
    step, equal = StepModel(recommended.on), Load.fixed(32, 1024, 256)
    load, lengths = spread(equal, 131072)
    assert "chat" in lengths
    assert static_tokens_per_s(step, load, 32)[0] < 0.5 * static_tokens_per_s(step, equal, 32)[0]


def test_fixed_lengths_are_spread_around_themselves() -> None:
    load, _ = spread(Load.fixed(32, 1024, 256), 131072)
    assert load.input_len == pytest.approx(1024, rel=0.01)
    assert load.output_len == pytest.approx(256, rel=0.01)
    assert len(set(load.sizes)) > 100
    given_, lengths = spread(load, 131072)
    assert given_ is load
    assert lengths == "as given"
    assert max(map(sum, spread(Load.fixed(32, 1024, 256), 2048)[0].sizes)) <= 2048


@given(st.lists(st.integers(1, 50), min_size=1, max_size=4), st.integers(1, 4))
def test_the_expected_longest_is_the_mean_over_all_draws(lengths: list[int], draws: int) -> None:
    assert expected_longest(lengths, draws) == pytest.approx(
        mean(max(drawn) for drawn in product(lengths, repeat=draws))
    )


def test_a_draft_shares_the_vocabulary() -> None:
    recommended = answer(question()).recommended
    assert recommended
    draft = find_draft(recommended.on)
    assert draft
    assert (draft.name, draft.tokens, draft.acceptance) == (
        "Llama-3.2-1B",
        Speculation("any").num_speculative_tokens,
        Speculation("any").acceptance,
    )


def test_without_a_draft_the_rung_is_the_precision_alone() -> None:
    found = climbed("phi-4", "h100")
    assert found.rungs[4].name == "FP8"
    assert "no draft with its vocabulary" in found.rungs[4].reason


def test_claims_are_shown_and_never_used() -> None:
    assert [claim.tokens_per_s for claim in CLAIMS] == [800, 1800, 3200, 4500]
    assert not {claim.tokens_per_s for claim in CLAIMS} & {one.tokens_per_s for one in climbed().rungs}
