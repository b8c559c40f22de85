"""What a calibration changed, as people and programs read it."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

from rich.console import Console

from llmopt_cli.estimate.calibrate import Change, Outcome, Report
from llmopt_cli.views import calibration as view

KEPT = Outcome(
    machine="a CPU, 2 cores, 1 threads",
    engine="llmopt",
    runs=24,
    loads=12,
    changes=[
        Change("between two steps", "step_s", 0.0, 0.0044),
        Change("memory", "memory_efficiency", 0.8, 0.91),
    ],
    before={"ttft_ms": 1.5, "tpot_ms": 0.4, "offline_tok_s": 0.9},
    after={"ttft_ms": 0.05, "tpot_ms": 0.02, "offline_tok_s": 0.04},
    left_out={"ttft_ms": 0.06, "tpot_ms": 0.03, "offline_tok_s": 0.05},
    kept=True,
)
REFUSED = Outcome("a GPU", "llmopt", 2, 2, [], {"ttft_ms": 0.5, "tpot_ms": 0.4}, {}, {}, False, "2 loads are too few")


def text(report: Report) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    for part in view.render(report):
        console.print(part)
    return console.export_text()


def rows(shown: str) -> list[list[str]]:
    return [line.split() for line in shown.splitlines()]


def test_constants_and_errors_stand_before_and_after() -> None:
    shown = text(Report([KEPT], Counter(), Path("machines.yaml")))
    assert "llmopt on a CPU, 2 cores, 1 threads: 24 runs of 12 loads" in shown
    assert ["between", "two", "steps", "(step_s)", "0", "us", "4,400", "us"] in rows(shown)
    assert ["memory", "(memory_efficiency)", "0.8", "0.91"] in rows(shown)
    assert ["TTFT", "150%", "5%", "6%"] in rows(shown)
    assert ["TPOT", "40%", "2%", "3%"] in rows(shown)
    assert "Nothing was changed" not in shown


def test_what_was_not_kept_or_not_used_says_why() -> None:
    shown = text(Report([REFUSED], Counter({"an interrupted run": 3}), None))
    assert "Nothing was changed: 2 loads are too few." in shown
    assert ["TPOT", "40%", "-", "-"] in rows(shown)
    assert ["3", "x", "an", "interrupted", "run"] in rows(shown)
    assert "Nothing to learn from" in text(Report([], Counter(), None))


def test_json_holds_everything() -> None:
    document = json.loads(json.dumps(view.data(Report([KEPT], Counter({"no bench run": 1}), Path("machines.yaml")))))
    (outcome,) = document["outcomes"]
    assert outcome["left_out"] == {"ttft_ms": 0.06, "tpot_ms": 0.03, "offline_tok_s": 0.05}
    assert outcome["changes"][0] == {"what": "between two steps", "name": "step_s", "before": 0.0, "after": 0.0044}
    assert (document["skipped"], document["file"]) == ({"no bench run": 1}, "machines.yaml")
