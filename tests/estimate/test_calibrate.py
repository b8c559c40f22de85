"""Calibration: runs made with known constants teach them back, the rest of a results folder does no harm."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, fields, replace
from pathlib import Path
from random import Random

import pytest

from llmopt_cli.errors import UsageError
from llmopt_cli.estimate import host
from llmopt_cli.estimate.calibrate import FEWEST, FITTED, KNOBS, calibrate, read_runs
from llmopt_cli.estimate.constants import Constants, find_engine
from llmopt_cli.estimate.host import Machine
from llmopt_cli.estimate.latency import StepModel
from llmopt_cli.estimate.predict import deployment, expect, load_of
from llmopt_cli.estimate.work import work
from llmopt_cli.spec.hardware import GIB
from llmopt_cli.spec.recipe import Recipe
from llmopt_cli.spec.result import Environment, Result
from llmopt_cli.spec.workload import Workload

HERE = Machine("a CPU", 4, 2, None, "2026-01-02", 8 * GIB, 20.0, {"float32": 0.1, "bfloat16": 0.25})
ENVIRONMENT = Environment("2026-01-03", "Linux", HERE.cpu, HERE.cores, HERE.threads, 8 * GIB, 0.1, {})
TRUE = replace(find_engine("llmopt"), step_s=3e-3, gemm_s=20e-6, attention_s=32e-6, dispatch_s=2e-3, queue_slope=0.5)
LOADS = [
    (dtype, workload, concurrency)
    for dtype in ("bfloat16", "float32")
    for workload in ("decode", "chat")
    for concurrency in (1, 4, 16)
]


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMOPT_CONFIG_DIR", str(tmp_path / "own"))
    return host.keep(HERE)


def measured(dtype: str, workload: str, concurrency: int, factor: float = 1.0) -> Result:
    """A run as an engine whose constants are TRUE would have shown it, `factor` times as slow."""
    recipe = Recipe(dtype=dtype)
    traffic = Workload.read(workload).with_load(concurrency=concurrency)
    on = replace(deployment(recipe, ENVIRONMENT), engine=TRUE)
    step, load = StepModel(on), load_of(traffic, on)
    return Result(
        verb="bench",
        target="engine",
        command="llmopt bench",
        seed=0,
        environment=ENVIRONMENT,
        metrics={
            "completed": 64,
            "failed": 0,
            "mean_ttft_ms": factor * 1e3 * step.ttft(load),
            "mean_tpot_ms": factor * 1e3 * step.tpot(load),
            "output_throughput": work(step, load).tokens_per_s / factor,
        },
        recipe=asdict(recipe),
        workload=asdict(traffic),
    )


def off(dtype: str, workload: str, concurrency: int) -> float:
    """How far what is expected now is from what such a run shows; the worse of both figures."""
    run = measured(dtype, workload, concurrency)
    traffic = Workload.read(workload).with_load(concurrency=concurrency)
    found = replace(run, predicted=expect(Recipe(dtype=dtype), traffic, ENVIRONMENT).record())
    return max(abs(found.off(f"mean_{figure}") or 0.0) for figure in FITTED)


def test_runs_teach_the_constants_behind_them(tmp_path: Path) -> None:
    for load in LOADS:
        measured(*load).save(tmp_path)
    assert off("bfloat16", "chat", 8) > 0.3
    report = calibrate(tmp_path)
    (outcome,) = report.outcomes
    assert outcome.kept
    assert (outcome.runs, outcome.loads, report.skipped) == (12, 12, Counter())
    assert max(outcome.after.values()) < 0.01 < 0.3 < min(outcome.before.values())
    assert max(outcome.left_out.values()) < 0.02
    for load in (("bfloat16", "chat", 8), ("float32", "decode", 32)):  # which were not among the runs
        assert off(*load) < 0.02
    expected = expect(Recipe(), Workload.read("chat"), ENVIRONMENT)
    assert expected.basis == "calibrated from 12 runs, +-0%"
    assert report.file == host.config_folder() / host.FILE
    assert host.machines()[0].calibrations[0].schemes == ["bf16", "fp32"]


def test_the_second_time_what_was_learned_is_what_was_before(tmp_path: Path) -> None:
    for load in LOADS:
        measured(*load).save(tmp_path)
    first, second = (calibrate(tmp_path).outcomes[0] for _ in range(2))
    assert second.before == pytest.approx(first.after)
    assert [change.after for change in second.changes] == [change.after for change in first.changes]


def test_noise_is_told_as_the_error_of_unseen_loads(tmp_path: Path) -> None:
    rng = Random(1)
    for load in LOADS * 2:
        measured(*load, factor=math.exp(rng.gauss(0, 0.08))).save(tmp_path)
    measured(*LOADS[0], factor=6).save(tmp_path)  # while something else ran
    (outcome,) = calibrate(tmp_path).outcomes
    assert outcome.kept
    assert (outcome.runs, outcome.loads) == (25, 12)
    assert all(0.02 < error < 0.15 for error in outcome.left_out.values())
    assert off("bfloat16", "chat", 8) < 0.15
    spread = host.machines()[0].calibrations[0].errors["tpot_ms"]
    assert 0.6 < spread.low < 1 < spread.high < 1.6


def test_too_few_loads_say_so_and_change_nothing(tmp_path: Path, machine: Path) -> None:
    before = machine.read_bytes()
    for load in LOADS[: FEWEST - 1] * 3:
        measured(*load).save(tmp_path)
    report = calibrate(tmp_path)
    (outcome,) = report.outcomes
    assert (outcome.kept, report.file) == (False, None)
    assert "5 different loads are too few" in outcome.reason
    assert machine.read_bytes() == before


def test_a_fit_that_predicts_no_better_is_not_kept(tmp_path: Path, machine: Path) -> None:
    before = machine.read_bytes()
    usual = find_engine("llmopt")
    rng = Random(3)
    for dtype, workload, concurrency in LOADS:
        run = measured(dtype, workload, concurrency)
        on = replace(deployment(Recipe(dtype=dtype), ENVIRONMENT), engine=usual)
        step = StepModel(on)
        load = load_of(Workload.read(workload).with_load(concurrency=concurrency), on)
        figures = {"mean_ttft_ms": step.ttft(load), "mean_tpot_ms": step.tpot(load)}
        noisy = {name: 1e3 * value * math.exp(rng.gauss(0, 0.3)) for name, value in figures.items()}
        replace(run, metrics={**run.metrics, **noisy}).save(tmp_path)
    (outcome,) = calibrate(tmp_path).outcomes
    assert not outcome.kept
    assert "no better than before" in outcome.reason
    assert machine.read_bytes() == before


def test_what_says_nothing_is_skipped_with_its_reason_and_does_no_harm(tmp_path: Path) -> None:
    for load in LOADS:
        path = measured(*load).save(tmp_path)
    clean = calibrate(tmp_path).outcomes
    one = measured(*LOADS[0])
    foreign = replace(one, environment=replace(ENVIRONMENT, cpu="another"))
    others = {
        "an interrupted run": replace(one, partial=True),
        "a run with drafts: what they bring is the text's": replace(
            one, recipe={**one.recipe, "speculation": {"method": "ngram"}}
        ),
        "a run with failed requests": replace(one, metrics=one.metrics | {"failed": 9}),
        "a run without TTFT and TPOT": replace(one, metrics=one.metrics | {"mean_tpot_ms": None}),
        "a server: its settings are its own": replace(one, target="http://127.0.0.1:8000"),
        "a machine that was not measured: run `llmopt env --probe` there first": foreign,
        "a recipe of another version": replace(one, recipe={**one.recipe, "warp": 9}),
        "unknown model `nonesuch`": replace(one, recipe={**one.recipe, "model": "nonesuch"}),
    }
    for other in others.values():
        other.save(tmp_path)
    replace(one, verb="startup").save(tmp_path)
    with path.open("ab") as file:
        file.write(
            b'{"verb": "bench", "tar\n[]\n' + b'{"verb": "bench", "target": "engine", "command": "", "seed": 0}\n'
        )
    again = calibrate(tmp_path)
    assert again.skipped == Counter(dict.fromkeys(others, 1)) + Counter(
        {"no bench run": 1, "a line that is no result": 3}
    )
    assert [change.after for change in again.outcomes[0].changes] == [change.after for change in clean[0].changes]


def test_an_open_loop_is_skipped(tmp_path: Path) -> None:
    run = measured(*LOADS[0])
    path = replace(run, workload=asdict(Workload.read("chat").with_load(rate=2))).save(tmp_path)
    groups, skipped = read_runs(path)
    assert (groups, list(skipped)) == ([], ["an open loop: how many requests ran at once is not known"])


def test_a_folder_without_results_is_one_sentence(tmp_path: Path) -> None:
    for nothing in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UsageError, match="there are no results in"):
            calibrate(nothing)


def test_every_knob_moves_constants_that_there_are_and_begins_within_its_bounds() -> None:
    known = {field.name for field in fields(Constants)}
    names = [name for knob in KNOBS for name in knob.names]
    assert set(names) <= known
    assert len(names) == len(set(names))
    for knob in KNOBS:
        low, high = knob.bounds(find_engine("llmopt"))
        assert low < 0 < high


def test_the_kept_file_is_data_that_people_can_read(tmp_path: Path, machine: Path) -> None:
    for load in LOADS:
        measured(*load).save(tmp_path)
    calibrate(tmp_path)
    text = machine.read_text()
    for part in ("engine: llmopt", "runs: 12", "step_s:", "median_error:", "models:"):
        assert part in text
    assert json.dumps(HERE.name) not in text  # the name is made of the other fields, and has no home of its own
