"""Comparisons: what may be offered where, the ranking, and the frontier."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmopt_cli.errors import UsageError
from llmopt_cli.estimate.choices import remark, runs_on, schemes
from llmopt_cli.estimate.compare import Comparison, compare, thinned
from llmopt_cli.estimate.deployment import Deployment, wanted
from llmopt_cli.estimate.latency import StepModel
from llmopt_cli.estimate.load import Load
from llmopt_cli.estimate.pareto import Axis, Point, frontier, picture
from llmopt_cli.estimate.plan import Verdict
from llmopt_cli.estimate.slo import request_rate
from llmopt_cli.estimate.splits import splits
from llmopt_cli.spec.catalog import find_gpu, find_model, gpus
from llmopt_cli.spec.scheme import find_scheme
from llmopt_cli.spec.workload import Lengths, Size, Slo

LOAD = Load.fixed(32, 1024, 256)


def compared(model: str = "70b", slo: Slo | None = None, load: Load = LOAD, **flags: str | int) -> Comparison:
    return compare(wanted(None, model=model, **flags), load, slo or Slo())


def offered(gpu: str) -> list[str]:
    return [scheme.name for scheme in schemes("vllm", find_gpu(gpu)[0])]


def test_precisions_are_those_that_the_cores_compute() -> None:
    assert {"fp8", "w8a8"} <= set(offered("h100"))
    assert "nvfp4" not in offered("h100")
    assert "nvfp4" in offered("b200")
    assert "w8a8" not in offered("b300")  # its int8 rate is below that of 16 bits
    assert "fp8" not in offered("v100")
    assert {"bf16", "int8", "awq"} <= set(offered("v100"))


def test_fp8_on_ampere_is_said_to_be_of_the_weights_alone() -> None:
    assert "fp8" in offered("a100")
    assert remark(find_scheme("fp8"), find_gpu("a100")[0]) == "no FP8 cores: weights alone"
    assert remark(find_scheme("fp8"), find_gpu("h100")[0]) == ""


def test_llamacpp_offers_its_own_formats_and_runs_everywhere() -> None:
    apple = find_gpu("Apple M2 Ultra 76c")[0]
    assert "q4_k_m" in [scheme.name for scheme in schemes("llamacpp", apple)]
    assert runs_on("llamacpp", apple)
    assert not runs_on("vllm", apple)


def test_over_pcie_two_share_a_layer_at_most() -> None:
    spec = find_model("70b")
    assert splits(spec, find_gpu("h100")[0]) == ((1, 1), (2, 1), (4, 1), (8, 1))
    assert splits(spec, find_gpu("l40s")[0]) == ((1, 1), (2, 1), (2, 2), (2, 4))
    assert splits(spec, find_gpu("a40")[0]) == ((1, 1), (2, 1), (2, 2), (2, 4))  # a bridge joins two
    assert splits(find_model("qwen2.5-0.5b"), find_gpu("h100")[0]) == ((1, 1), (2, 1))  # 14 heads


def test_no_offer_shares_layers_among_more_than_two_over_pcie() -> None:
    found = compared()
    slow = [one for one in found.offers if one.on.hardware.over_pcie]
    assert slow
    assert max(one.on.tp for one in slow) == 2
    assert max(one.on.pp for one in slow) > 1


def test_the_whole_catalogue_is_compared_and_what_does_not_fit_is_left_out() -> None:
    found = compared()
    names = {one.on.hardware.name for one in found.offers}
    assert found.weighed > len(found.offers) > 300
    assert len(names) > 20
    assert all(one.fit.verdict is not Verdict.NO for one in found.offers)
    assert not any(one.on.hardware.vendor == "Apple" for one in found.offers)


def test_the_ranking_is_sorted_by_price_and_then_by_speed() -> None:
    found = compared(slo=Slo(tpot_ms=40))
    good = [one for one in found.offers if one.good]
    assert found.offers[: len(good)] == tuple(good)
    prices = [one.usd_per_1m for one in good if one.usd_per_1m is not None]
    assert prices == sorted(prices)
    unpriced = good[len(prices) :]
    assert all(one.usd_per_1m is None for one in unpriced)
    speeds = [one.tokens_per_s_per_gpu for one in unpriced]
    assert speeds == sorted(speeds, reverse=True)
    assert prices
    assert speeds


def test_the_cheapest_keeps_to_the_limits_and_nothing_that_does_is_cheaper() -> None:
    found = compared(slo=Slo(ttft_ms=1000, tpot_ms=30))
    assert found.cheapest
    assert found.cheapest.usd_per_hour is not None
    assert found.cheapest.ttft <= 1
    assert found.cheapest.tpot <= 0.03
    others = [one.usd_per_hour for one in found.offers if one.good and one.usd_per_hour is not None]
    assert found.cheapest.usd_per_hour == min(others)
    assert compared(slo=Slo(tpot_ms=0.01)).cheapest is None


def test_at_a_rate_each_is_timed_with_what_it_then_has_under_way() -> None:
    asked = wanted(None, model="8b", gpu="l4")
    found = compare(asked, LOAD, Slo(), rate=2.0)
    assert found.offers
    assert len({one.load.concurrency for one in found.offers}) > 3
    for one in found.offers:
        step = StepModel(one.on)
        assert request_rate(step, one.load) >= 2.0
        assert one.load.concurrency == 1 or request_rate(step, one.load.at(one.load.concurrency - 1)) < 2.0
    hourly = [one.usd_per_hour for one in found.offers if one.usd_per_hour is not None]
    assert hourly == sorted(hourly)
    faster = compare(asked, LOAD, Slo(), rate=8.0)
    assert 0 < len(faster.offers) < len(found.offers)
    assert not compare(asked, LOAD, Slo(), rate=1e6).offers


def test_one_price_is_not_that_of_all_the_catalogue() -> None:
    with pytest.raises(UsageError, match="--gpu-price is that of one GPU"):
        compare(wanted(None, model="8b"), LOAD, Slo(), gpu_price=3.0)


def test_a_named_accelerator_precision_or_split_stays() -> None:
    assert {one.on.hardware.name for one in compared(gpu="h100").offers} == {"H100-SXM5-80GB"}
    assert {one.on.scheme.name for one in compared(scheme="awq").offers} == {"awq"}
    assert {one.on.tp for one in compared(gpu="h100", tensor_parallel_size=4).offers} == {4}


def test_a_price_that_was_given_is_that_of_the_accelerator_that_was_named() -> None:
    found = compare(wanted(None, model="8b", gpu="h100"), LOAD, Slo(), gpu_price=1.0)
    assert all(one.usd_per_hour == one.gpus for one in found.offers)


def spread_load() -> Load:
    ins = Lengths("lognormal", mean=1000, sd=1000, min=8, max=8000)
    outs = Lengths("lognormal", mean=200, sd=160, min=2, max=1000)
    rng = Random(1)
    return Load(32, tuple(Size(ins.draw(rng), outs.draw(rng)) for _ in range(512)))


def test_thinning_many_lengths_keeps_their_means() -> None:
    full, thin = spread_load(), thinned(spread_load())
    assert len(thin.sizes) == 48
    assert len({size.input_len for size in thin.sizes}) == 6
    for name in ("input_len", "output_len", "context"):
        assert getattr(thin, name) == pytest.approx(getattr(full, name), rel=0.02)
    assert thinned(LOAD) is LOAD


def test_the_mean_length_decides_how_many_fit_and_the_longest_whether_at_all() -> None:
    load = replace(spread_load(), sizes=(*spread_load().sizes, Size(100_000, 1)))
    found = compared("8b", gpu="l40s", scheme="bf16", load=load)
    one = next(one for one in found.offers if one.gpus == 1)
    assert one.fit.max_requests == pytest.approx(one.fit.kv_tokens / load.length, abs=1)
    assert not [one for one in compared("8b", gpu="rtx 4090", scheme="bf16", load=load).offers if one.gpus == 1]


POINTS = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=40)
ANY = Deployment(find_model("8b"), find_gpu("h100")[0], find_scheme("bf16"))


@given(POINTS, st.sampled_from(["throughput", "cost"]))
def test_nothing_beats_the_frontier_and_everything_else_is_beaten(pairs: list[tuple[int, int]], axis: Axis) -> None:
    sign = -1 if axis == "cost" else 1
    points = [Point(ANY, 1, user, value) for user, value in pairs]
    kept = frontier(points, axis)

    def beats(one: Point, other: Point) -> bool:
        ours, theirs = (one.per_user, sign * one.value), (other.per_user, sign * other.value)
        return ours != theirs and ours[0] >= theirs[0] and ours[1] >= theirs[1]

    assert not any(beats(one, other) for one in points for other in kept)
    for point in points:
        alike = any((one.per_user, one.value) == (point.per_user, point.value) for one in kept)
        assert alike or any(beats(one, point) for one in kept)


def test_a_larger_batch_trades_speed_for_throughput() -> None:
    found = picture(compared("8b", gpu="h100", scheme="bf16"))
    one = [point for point in found.points if point.on.gpus == 1]
    assert [point.batch for point in one] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert [point.per_user for point in one] == sorted((point.per_user for point in one), reverse=True)
    assert [point.value for point in one] == sorted(point.value for point in one)
    assert sum(len(points) for points in found.stretches) == len(found.frontier)


def test_the_axis_of_cost_has_only_what_has_a_price() -> None:
    priced = {entry.item.name for entry in gpus() if entry.item.price_usd_hour is not None}
    found = picture(compared("8b"), "cost")
    assert {point.on.hardware.name for point in found.points} <= priced
    with pytest.raises(UsageError, match="nothing to draw: none of these accelerators has a price"):
        picture(compared("8b", gpu="mi325x"), "cost")
    with pytest.raises(UsageError, match="no deployment fits"):
        picture(compared("405b", gpu="t4"))
