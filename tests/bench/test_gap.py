"""Predicted beside measured: in the tables, in the index, and what may be said of a gap."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llmopt_cli.bench.gap import where
from llmopt_cli.bench.metrics import summarize
from llmopt_cli.bench.report import index
from llmopt_cli.bench.tables import show
from llmopt_cli.spec.result import Environment, Result
from llmopt_cli.spec.workload import Slo

ENVIRONMENT = Environment("2026-01-02T03:04:05+00:00", "Linux", "a CPU", 4, 1, 2**30, 0.1, {})
METRICS = summarize([], 1.0, Slo()) | {
    "load": "concurrency 8",
    "clipped_requests": 0,
    "completed": 32,
    "mean_ttft_ms": 50.0,
    "mean_tpot_ms": 5.0,
    "output_throughput": 1000.0,
}
WORKLOAD = {
    "name": "chat",
    "description": "",
    "arrivals": {"concurrency": 8, "rate": None},
    "slo": {"ttft_ms": None, "tpot_ms": None},
}
PREDICTED = {
    "mean_ttft_ms": 55.0,
    "mean_tpot_ms": 5.0,
    "output_throughput": 900.0,
    "bound": "overhead",
    "basis": "calibrated from 12 runs, +-6%",
}
RESULT = Result(
    "bench", "engine", "llmopt bench", 0, ENVIRONMENT, METRICS, {"model": "demo"}, WORKLOAD, False, PREDICTED
)


def text(result: Result) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    for part in show([result]):
        console.print(part)
    return console.export_text()


def with_predicted(**changes: Any) -> Result:
    return replace(RESULT, predicted={**PREDICTED, **changes})


def test_tables_show_predictions_with_their_error_and_basis() -> None:
    shown = text(RESULT)
    assert "predicted mean" in shown
    ttft = next(line.split() for line in shown.splitlines() if line.split()[:1] == ["TTFT"])
    assert ttft == ["TTFT", "50.00", "-", "-", "-", "55.00", "+10%"]
    assert "900.00 output tokens/s (-10%), calibrated from 12 runs, +-6%" in shown
    assert "the gap" not in shown


def test_without_a_prediction_the_tables_are_as_they_were() -> None:
    for predicted in ({}, {"unknown": "this machine has not been measured yet"}):
        shown = text(replace(RESULT, predicted=predicted))
        assert "predicted" not in shown
        ttft = next(line.split() for line in shown.splitlines() if line.split()[:1] == ["TTFT"])
        assert ttft == ["TTFT", "50.00", "-", "-", "-"]


def test_the_index_tells_how_far_off_a_prediction_was(tmp_path: Path) -> None:
    RESULT.save(tmp_path)
    row = next(line for line in index(tmp_path).splitlines() if line.startswith("| 2026"))
    assert "TTFT predicted +10%" in row
    assert "tok/s predicted -10%" in row
    assert "TPOT predicted +0%" in row


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (with_predicted(mean_ttft_ms=20.0), "prefill, dispatch or queueing"),
        (with_predicted(mean_tpot_ms=2.0), "the fixed time of a step and its kernels"),
        (with_predicted(mean_tpot_ms=9.0, bound="memory"), "reading weights and cache"),
        (with_predicted(mean_tpot_ms=9.0, basis="constants of llmopt"), "--calibrate"),
        (replace(with_predicted(mean_tpot_ms=9.0), metrics=METRICS | {"completed": 8}), "never full"),
        (
            replace(with_predicted(mean_tpot_ms=2.0), environment=replace(ENVIRONMENT, load_average=6.5)),
            "busy (load average 6.5)",
        ),
    ],
)
def test_a_wide_gap_is_said_to_be_where_the_result_shows_it(result: Result, said: str) -> None:
    assert said in "; ".join(where(result))
    assert "far off" in text(result)


def test_drafts_that_bring_less_than_assumed_are_a_reason() -> None:
    found = {"measured": {"tokens_per_step": 1.2}}
    for brought, said in ((1.2, True), (2.4, False)):
        asked = {"tokens_per_step": 2.5, "off": {"tokens_per_step": 2.5 / brought - 1}}
        metrics = METRICS | {"speculation": {**found, "formula": {"as_asked": asked}}}
        reasons = "; ".join(where(replace(with_predicted(mean_tpot_ms=2.0), metrics=metrics)))
        assert ("drafts made 1.20 tokens a step where 2.50 were assumed" in reasons) is said


def test_a_busy_machine_is_no_reason_for_being_faster_than_predicted() -> None:
    busy = replace(with_predicted(mean_tpot_ms=9.0), environment=replace(ENVIRONMENT, load_average=6.5))
    assert "busy" not in "; ".join(where(busy))
