"""Metrics: a hand-computed example, a naive reference for any records, and the rules at the edges."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmopt_cli.bench.metrics import Chunk, Latency, Record, Reply, peak_concurrency, summarize, token_gaps
from llmopt_cli.bench.prompts import Ask
from llmopt_cli.runtime.request import SamplingParams
from llmopt_cli.spec.workload import Slo


def record(sent_at: float, *chunks: tuple[float, int], late: float = 0.0, wanted: int = 4, cached: int = 0) -> Record:
    """A request of 10 prompt tokens; without chunks it failed after a second."""
    reply = Reply(tuple(Chunk(*chunk) for chunk in chunks), prompt_tokens=10, cached_tokens=cached)
    ask = Ask((1,) * 10, 10, SamplingParams(max_tokens=wanted))
    if chunks:
        return Record(ask, sent_at - late, sent_at, chunks[-1][0], reply)
    return Record(ask, sent_at - late, sent_at, sent_at + 1, error="no")


def test_figures_of_a_run_worked_out_by_hand() -> None:
    records = [
        record(0.0, (0.1, 1), (0.2, 1), (0.4, 1)),  # TTFT 0.1, TPOT 0.15, gaps 0.1 0.2, E2E 0.4
        record(0.1, (0.4, 1), (0.8, 2), cached=5, late=0.01),  # TTFT 0.3, TPOT 0.2, gaps 0.2 0.2, E2E 0.7
        record(0.5, (1.0, 1), wanted=1),  # TTFT 0.5, no TPOT, E2E 0.5
        record(0.6),  # failed
    ]
    figures = summarize(records, 2.0, Slo(ttft_ms=300.001, tpot_ms=160))
    expected = {
        "duration": 2.0,
        "completed": 3,
        "failed": 1,
        "first_error": "no",
        "total_input_tokens": 30,
        "total_output_tokens": 7,
        "requested_input_tokens": 30,
        "requested_output_tokens": 9,
        "request_throughput": 1.5,
        "output_throughput": 3.5,
        "total_token_throughput": 18.5,
        "request_goodput": 0.5,  # the second is too slow per token, the third too late
        "slo_attainment": 0.25,
        "max_concurrent_requests": 3,  # the second until 0.8, the third until 1.0, the failed one until 1.6
        "mean_ttft_ms": 300,
        "median_ttft_ms": 300,
        "p90_ttft_ms": 460,  # linear: 300 + 0.8 * 200
        "p99_ttft_ms": 496,
        "mean_tpot_ms": 175,
        "median_tpot_ms": 175,
        "mean_itl_ms": 175,
        "median_itl_ms": 200,
        "mean_e2el_ms": 1600 / 3,
        "median_e2el_ms": 500,
        "p99_send_lag_ms": 9.7,
        "tokens_per_chunk": 7 / 6,
        "cached_input_share": 5 / 30,
        "itl_is_interpolated": False,
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected)


def test_a_run_without_answers_has_no_latencies_and_still_fits_in_json() -> None:
    figures = summarize([record(0.0)], 1.0, Slo())
    assert (figures["completed"], figures["failed"], figures["request_goodput"]) == (0, 1, 0)
    assert [figures[f"{part}_ttft_ms"] for part in ("mean", "median", "p90", "p99")] == [None] * 4
    json.dumps(summarize([], 1.0, Slo()), allow_nan=False)


def test_one_token_has_no_tpot_to_break_and_none_is_no_limit() -> None:
    single = Latency.of(0.0, Reply((Chunk(0.5, 1),), 1))
    assert single.tpot is None
    assert single.keeps(Slo(tpot_ms=0))
    assert single.keeps(Slo())
    assert not single.keeps(Slo(ttft_ms=499))


chunks = st.lists(st.tuples(st.floats(0.001, 5), st.integers(1, 4)), min_size=1, max_size=8)
runs = st.lists(st.tuples(st.floats(0, 10), chunks), min_size=1, max_size=12)


def build(run: list[tuple[float, list[tuple[float, int]]]]) -> list[Record]:
    records = []
    for sent_at, steps in run:
        at, absolute = sent_at, []
        for gap, tokens in steps:
            at += gap
            absolute.append((at, tokens))
        records.append(record(sent_at, *absolute))
    return records


@given(runs)
def test_token_gaps_add_up_to_the_time_after_the_first_token(run: list[tuple[float, list[tuple[float, int]]]]) -> None:
    for one in build(run):
        assert one.reply is not None
        first, *rest = one.reply.chunks
        gaps = token_gaps(one.reply)
        assert len(gaps) == sum(chunk.tokens for chunk in rest)
        assert sum(gaps) == pytest.approx(one.reply.chunks[-1].at - first.at)


@given(runs)
def test_figures_equal_a_naive_reference(run: list[tuple[float, list[tuple[float, int]]]]) -> None:
    records = build(run)
    slo = Slo(ttft_ms=1987.654321, tpot_ms=487.654321)  # no generated value falls on a limit
    figures = summarize(records, 20.0, slo)
    ttfts, tpots, good, tokens = [], [], 0, 0
    for sent_at, steps in run:
        count = sum(number for _, number in steps)
        times = [sent_at + sum(gap for gap, _ in steps[: index + 1]) for index in range(len(steps))]
        ttfts.append(1000 * (times[0] - sent_at))
        tpot = 1000 * (times[-1] - times[0]) / (count - 1) if count > 1 else None
        tpots += [tpot] if tpot is not None else []
        good += ttfts[-1] <= 1987.654321 and (tpot is None or tpot <= 487.654321)
        tokens += count
    assert figures["mean_ttft_ms"] == pytest.approx(sum(ttfts) / len(ttfts))
    assert figures["p90_ttft_ms"] == pytest.approx(percentile(ttfts, 0.9))
    assert figures["p99_ttft_ms"] == pytest.approx(percentile(ttfts, 0.99))
    assert figures["median_tpot_ms"] == (pytest.approx(percentile(tpots, 0.5)) if tpots else None)
    assert figures["output_throughput"] == pytest.approx(tokens / 20)
    assert figures["request_goodput"] == pytest.approx(good / 20)


def percentile(values: list[float], share: float) -> float:
    """Linear between the ranks, written out."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), max_size=15))
def test_peak_concurrency_counts_what_runs_at_each_instant(spans: list[tuple[int, int]]) -> None:
    records = [record(float(start), (float(start + length), 1)) for start, length in spans]
    running = [sum(start <= instant < start + length for start, length in spans) for instant in range(41)]
    assert peak_concurrency(records) == max(running)
