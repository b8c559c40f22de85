"""Results: a line says everything back, and lines of several writers never mix."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from llmopt_cli.errors import ConfigFileError, UsageError
from llmopt_cli.spec.result import Environment, Result, check_writable, read_lines, read_results

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
    results = [RESULT, replace(RESULT, partial=True, command="a\u2028b\x85c\udcffd")]
    for result in results:
        path = result.save(tmp_path / "not" / "there" / "yet")
    assert path.name == "bench.jsonl"
    assert len(path.read_text().splitlines()) == 2
    assert read_results(path) == results


def test_a_line_from_before_predictions_still_reads(tmp_path: Path) -> None:
    path = RESULT.save(tmp_path)
    old = {key: value for key, value in json.loads(path.read_text()).items() if key != "predicted"}
    path.write_text(json.dumps(old) + "\n")
    (found,) = read_results(path)
    assert found.predicted == {}
    assert found.off("output_throughput") is None


def test_how_far_off_a_prediction_was_is_relative_to_the_measurement() -> None:
    result = replace(RESULT, predicted={"output_throughput": 10.0, "median_tpot_ms": 4.0})
    assert result.off("output_throughput") == pytest.approx(-0.2)
    assert result.off("median_tpot_ms") is None


def test_broken_lines_lose_no_others(tmp_path: Path) -> None:
    path = RESULT.save(tmp_path)
    with path.open("ab") as file:
        file.write(b'{"verb": "ben\n')
    RESULT.save(tmp_path)
    found = list(read_lines(path))
    assert [number for number, _ in found] == [1, 2, 3]
    assert [isinstance(one, Result) for _, one in found] == [True, False, True]


def test_writers_side_by_side_never_mix_their_lines(tmp_path: Path) -> None:
    results = [replace(RESULT, seed=seed, command="x" * 50_000) for seed in range(64)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda result: result.save(tmp_path), results))
    found = read_results(tmp_path / "bench.jsonl")
    assert sorted(result.seed for result in found) == list(range(64))
    assert {result.command for result in found} == {"x" * 50_000}


def test_what_json_cannot_hold_is_not_half_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        replace(RESULT, metrics={"output_throughput": float("nan")}).save(tmp_path)
    assert not (tmp_path / "bench.jsonl").exists()


@pytest.mark.parametrize("line", [b"{", b'{"verb": "bench"}', b"[]", b"\xff", b'{"environment": {"cpu": "?"}}'])
def test_a_line_that_is_no_result_is_named(tmp_path: Path, line: bytes) -> None:
    path = RESULT.save(tmp_path)
    with path.open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(ConfigFileError, match=r"bench.jsonl`, line 2 is not a result"):
        read_results(path)


def test_asking_whether_a_folder_can_be_written_changes_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "not" / "yet", "bench")
    check_writable(tmp_path, "bench")
    assert not list(tmp_path.iterdir())
    path = RESULT.save(tmp_path)
    check_writable(tmp_path, "bench")
    assert read_results(path) == [RESULT]


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "bench.jsonl").mkdir()
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path):
        with pytest.raises(UsageError, match=r"cannot write `.*bench.jsonl`: \w") as caught:
            check_writable(folder, "bench")
        assert "--results" in (caught.value.hint or "")
        with pytest.raises(UsageError, match="cannot write"):
            RESULT.save(folder)
