"""The load that an SLO allows and that a rate keeps busy, held against trying every number of requests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt_cli.errors import UsageError
from llmopt_cli.estimate.deployment import Deployment
from llmopt_cli.estimate.latency import StepModel
from llmopt_cli.estimate.load import Load
from llmopt_cli.estimate.slo import best_load, keep_up, meets, offered_rate, request_rate
from llmopt_cli.spec.catalog import find_gpu, find_model
from llmopt_cli.spec.scheme import find_scheme
from llmopt_cli.spec.workload import Slo, Workload

STEP = StepModel(Deployment(find_model("llama-3.1-8b"), find_gpu("h100")[0], find_scheme("bf16")))
LOAD = Load.fixed(1, 1024, 256)


@settings(max_examples=25, deadline=None)
@given(ttft=st.floats(50, 1000), tpot=st.floats(5, 60), most=st.integers(1, 80))
def test_the_best_load_is_the_largest_that_meets_the_slo(ttft: float, tpot: float, most: int) -> None:
    slo = Slo(ttft_ms=ttft, tpot_ms=tpot)
    fine = [count for count in range(1, most + 1) if meets(STEP, LOAD.at(count), slo)]
    found = best_load(STEP, LOAD, slo, most)
    assert (found.concurrency if found else 0) == max(fine, default=0)


def test_without_limits_the_best_load_is_the_most() -> None:
    assert best_load(STEP, LOAD, Slo(), 77) == LOAD.at(77)


def test_the_whole_request_has_a_limit_too() -> None:
    whole = STEP.ttft(LOAD.at(9)) + 255 * STEP.tpot(LOAD.at(9))
    assert best_load(STEP, LOAD, Slo(e2e_ms=1000.001 * whole), 256) == LOAD.at(9)


@pytest.mark.parametrize("rate", [0.1, 1, 5, 12])
def test_a_rate_keeps_the_fewest_requests_busy_that_end_as_fast(rate: float) -> None:
    found = keep_up(STEP, LOAD, rate, 256)
    assert found
    assert request_rate(STEP, found) >= rate
    assert found.concurrency == 1 or request_rate(STEP, LOAD.at(found.concurrency - 1)) < rate
    seconds = STEP.ttft(found) + 255 * STEP.tpot(found)
    assert found.concurrency == pytest.approx(rate * seconds, abs=1)  # Little's law


def test_a_workload_offers_the_rate_that_it_names() -> None:
    chat = Workload.read("chat")
    assert offered_rate(chat) is None
    assert offered_rate(chat.with_load(rate=3.0)) == pytest.approx(3.0)
    assert offered_rate(replace(chat.with_load(rate=3.0), num_requests=1)) is None


def test_requests_that_all_come_at_once_have_no_rate(tmp_path: Path) -> None:
    trace = tmp_path / "burst.jsonl"
    line = '{"timestamp": 0, "input_length": 600, "output_length": 20, "hash_ids": [1, 2]}\n'
    trace.write_text(3 * line)
    with pytest.raises(UsageError, match="come at the same time"):
        offered_rate(Workload.read(trace))


def test_a_rate_that_cannot_be_kept_up_with_has_no_load() -> None:
    assert keep_up(STEP, LOAD, 500, 256) is None
