"""Results: a line says everything back, and lines of several writers never mix."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from llmopt_cli.errors import ConfigFileError
from llmopt_cli.spec.result import Environment, Result, read_results

ENVIRONMENT = Environment(
    date="2026-01-02T03:04:05+00:00",
    platform="Linux",
    cpu="a CPU | with a bar",
    cores=2,
    threads=1,
    memory=8 * 2**30,
    load_average=0.1,
    versions={"llmopt": "0.1.0", "python": "3.12.1"},
)
RESULT = Result(
    verb="bench",
    target="engine",
    command="llmopt bench",
    seed=3,
    environment=ENVIRONMENT,
    metrics={"output_throughput": 12.5, "median_tpot_ms": None, "against": {"ratio": 2.0}},
    recipe={"model": "demo"},
    workload={"name": "chät"},
)


def test_a_line_reads_back_as_the_result_it_was(tmp_path: Path) -> None:
    results = [RESULT, replace(RESULT, predicted={"output_throughput": 13.0}, partial=True)]
    for result in results:
        path = result.append(tmp_path / "not" / "there" / "yet")
    assert path.name == "bench.jsonl"
    assert len(path.read_text().splitlines()) == 2
    assert read_results(path) == results


def test_writers_side_by_side_never_mix_their_lines(tmp_path: Path) -> None:
    results = [replace(RESULT, seed=seed, command="x" * 50_000) for seed in range(64)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda result: result.append(tmp_path), results))
    found = read_results(tmp_path / "bench.jsonl")
    assert sorted(result.seed for result in found) == list(range(64))
    assert {result.command for result in found} == {"x" * 50_000}


def test_what_json_cannot_hold_is_not_half_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        replace(RESULT, metrics={"output_throughput": float("nan")}).append(tmp_path)
    assert not (tmp_path / "bench.jsonl").exists()


@pytest.mark.parametrize("line", ["{", '{"verb": "bench"}', "[]", json.dumps({"environment": {"cpu": "?"}})])
def test_a_line_that_is_no_result_is_named(tmp_path: Path, line: str) -> None:
    path = RESULT.append(tmp_path)
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ConfigFileError, match=r"bench.jsonl`, line 2 is not a result"):
        read_results(path)
