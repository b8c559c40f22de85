"""The index of results: made from the lines alone, and the committed one is up to date."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from llmopt_cli.bench.report import index, report
from llmopt_cli.errors import ConfigFileError
from llmopt_cli.spec.result import Environment, Result

RESULTS = Path(__file__).resolve().parents[2] / "results"
ENVIRONMENT = Environment("2026-01-02T03:04:05+00:00", "Linux", "a CPU", 2, 1, 2**30, 0.1, {"llmopt": "0.1.0"})
METRICS = {
    "load": "concurrency 8",
    "output_throughput": 1234.5,
    "request_throughput": 2.5,
    "median_ttft_ms": 40.2,
    "p99_ttft_ms": 99.8,
    "median_tpot_ms": None,
    "slo_attainment": 0.94,
    "against": {"ratio": 3.14159, "target": "transformers"},
}
BENCH = Result("bench", "engine", "llmopt bench | tee x", 0, ENVIRONMENT, METRICS, {"model": "demo"}, {"name": "chat"})
STARTUP = Result("startup", "llmopt", "python", 0, replace(ENVIRONMENT, gpu="a GPU"), {"help_s": 0.21})


def test_committed_index_is_the_one_made_from_the_lines() -> None:
    assert (RESULTS / "README.md").read_text(encoding="utf-8") == index(RESULTS)


def test_each_line_is_a_row_with_date_machine_what_figures_and_command(tmp_path: Path) -> None:
    for result in (BENCH, replace(BENCH, partial=True), STARTUP):
        result.save(tmp_path)
    rows = [line for line in index(tmp_path).splitlines() if line.startswith("| 2026")]
    assert rows == [
        "| 2026-01-02 | a CPU, 2 cores, 1 threads | demo on engine, chat, concurrency 8 | 1,234 output tok/s, 2.50 "
        "requests/s, TTFT p50 40 ms, p99 100 ms, 94% within the SLO, 3.14 times the tok/s of transformers | "
        "`llmopt bench \\| tee x` |",
        rows[0].replace("transformers |", "transformers (interrupted) |"),
        "| 2026-01-02 | a GPU | llmopt | `--help` 0.21 s | `python` |",
    ]


def test_command_writes_the_index_and_says_so_when_a_line_is_broken(tmp_path: Path) -> None:
    path = BENCH.save(tmp_path)
    command = [sys.executable, "-m", "llmopt_cli.bench.report", str(tmp_path)]
    subprocess.run(command, check=True)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == index(tmp_path)
    path.write_text("{}\n")
    with pytest.raises(ConfigFileError, match="line 1 is not a result"):
        index(tmp_path)


def test_a_command_that_is_no_text_does_not_stop_the_index(tmp_path: Path) -> None:
    replace(BENCH, command="llmopt bench --results r\udcff").save(tmp_path)
    report(tmp_path)
    assert r"--results r\udcff" in (tmp_path / "README.md").read_text(encoding="utf-8")
