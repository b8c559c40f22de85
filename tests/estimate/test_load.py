"""Loads out of workloads: the few lengths that are timed have the means of all, and what prompts share is known."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from llmopt_cli.estimate.load import BANDS, Load
from llmopt_cli.spec.workload import Lengths, Size, Workload

TRACES = Path(__file__).resolve().parents[2] / "../shared/data/traces"


def test_fixed_lengths_are_all_alike() -> None:
    load = Load.fixed(8, 1000, 200)
    assert (load.input_len, load.output_len, load.longest, load.context) == (1000, 200, 1200, 1100)


def test_a_workload_of_equal_requests_is_one_size() -> None:
    alike = replace(Workload.read("chat"), input_len=Lengths(mean=1024), output_len=Lengths(mean=256))
    assert Load.of(alike).sizes == Load.fixed(1, 1024, 256).sizes


def test_the_mean_context_counts_long_answers_as_often_as_they_are_met() -> None:
    load = Load(1, (Size(100, 1000), Size(100, 10)))
    steps = [100 + position / 2 for position in (1000,)] * 1000 + [100 + 5.0] * 10
    assert load.context == pytest.approx(statistics.mean(steps))


@pytest.mark.parametrize("name", ["chat", "code", "rag", "decode"])
def test_few_lengths_stand_for_the_distribution(name: str) -> None:
    workload = Workload.read(name)
    load = Load.of(workload)
    drawn = replace(workload, num_requests=50_000).sizes(None)[0]
    assert len(load.sizes) == BANDS**2
    assert load.concurrency == workload.arrivals.concurrency
    assert load.input_len == pytest.approx(statistics.mean(size.input_len for size in drawn), rel=0.08)
    assert load.output_len == pytest.approx(statistics.mean(size.output_len for size in drawn), rel=0.08)
    assert load == Load.of(workload)


def test_lengths_are_clipped_to_the_context() -> None:
    assert Load.of(Workload.read("rag"), context=500).longest == 500


def test_an_open_loop_has_no_concurrency_of_its_own() -> None:
    assert Load.of(Workload.read("chat").with_load(rate=3)).concurrency == 1


def test_a_shared_prefix_is_a_share_of_all_prompts() -> None:
    workload = replace(Workload.read("chat"), input_len=Lengths(mean=400), shared_prefix=100, num_requests=50)
    assert Load.of(workload).cached_share == pytest.approx(0.25 * 49 / 50)
    assert Load.of(replace(workload, shared_prefix=0)).cached_share == 0


def test_few_requests_of_a_trace_stand_for_all() -> None:
    if not TRACES.is_dir():
        pytest.skip("the traces are not at hand")
    workload = Workload.read(TRACES / "mooncake_conversation_trace.jsonl")
    load = Load.of(workload)
    sizes = workload.sizes(None)[0]
    assert set(load.sizes) <= set(sizes)
    assert load.input_len == pytest.approx(statistics.mean(size.input_len for size in sizes), rel=0.03)
    assert load.output_len == pytest.approx(statistics.mean(size.output_len for size in sizes), rel=0.05)
    assert load.cached_share == pytest.approx(0.374, abs=0.001)
