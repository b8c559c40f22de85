"""A session over the real engine: complete results, fresh prompts, and a fair comparison."""

from __future__ import annotations

import asyncio
import io
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Self

import pytest
from rich.console import Console

from llmopt_cli.bench.baseline import TransformersTarget
from llmopt_cli.bench.environment import fingerprint
from llmopt_cli.bench.http_target import HttpTarget
from llmopt_cli.bench.prompts import make_asks, read_source
from llmopt_cli.bench.run import PAIRS, Session
from llmopt_cli.bench.tables import show
from llmopt_cli.bench.targets import EngineTarget, Target
from llmopt_cli.errors import ServerError
from llmopt_cli.estimate import host
from llmopt_cli.estimate.predict import expect
from llmopt_cli.output import Report
from llmopt_cli.runtime import Engine
from llmopt_cli.spec.recipe import Recipe
from llmopt_cli.spec.result import Result, read_results
from llmopt_cli.spec.workload import Lengths, Slo, Workload

SMALL = replace(
    Workload.read("decode"), num_requests=6, warmup=2, output_len=Lengths(mean=8), slo=Slo(ttft_ms=60_000)
).with_load(concurrency=3)


@contextmanager
def no_progress(label: str) -> Iterator[Report]:
    yield lambda done, total: None


def session(target: Target, folder: Path, *workloads: Workload, baseline: Target | None = None) -> list[Result]:
    recipe = Recipe(dtype="float32")
    return Session(target, workloads, recipe, fingerprint(), "llmopt bench", folder, baseline).run(no_progress)


def test_every_load_gives_one_complete_result_that_is_kept(demo_engine: Engine, tmp_path: Path) -> None:
    loads = [SMALL, SMALL.with_load(rate=200)]
    results = session(EngineTarget(demo_engine), tmp_path, *loads)
    assert read_results(tmp_path / "bench.jsonl") == [Result.parse(line) for line in map(to_line, results)]
    for result, workload in zip(results, loads, strict=True):
        metrics = result.metrics
        assert result.workload == asdict(workload)
        assert (metrics["completed"], metrics["failed"], metrics["load"]) == (6, 0, workload.arrivals.label)
        assert metrics["total_output_tokens"] == metrics["requested_output_tokens"] == 6 * 8
        assert metrics["total_input_tokens"] == metrics["requested_input_tokens"]
        assert metrics["slo_attainment"] == 1
        assert 0 < metrics["median_ttft_ms"] < metrics["median_e2el_ms"]
        assert not result.partial
    assert results[0].metrics["max_concurrent_requests"] == 3
    assert results[0].metrics["nonce"] != results[1].metrics["nonce"]


def test_a_prediction_is_kept_beside_what_was_measured_where_the_machine_is_known(
    demo_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMOPT_CONFIG_DIR", str(tmp_path / "own"))
    (blind,) = session(EngineTarget(demo_engine), tmp_path, SMALL)
    assert "not been measured yet: `llmopt env --probe`" in blind.predicted["unknown"]
    here = fingerprint()
    rates = {"float32": 0.1, "bfloat16": 0.2}
    host.keep(host.Machine(here.cpu, here.cores, here.threads, here.gpu, here.date, 2**33, 20.0, rates))
    (told,) = session(EngineTarget(demo_engine), tmp_path, SMALL)
    assert told.predicted == expect(Recipe(dtype="float32"), SMALL, here).record()
    assert all(told.off(f"mean_{figure}") is not None for figure in ("ttft_ms", "tpot_ms"))
    assert read_results(tmp_path / "bench.jsonl")[1].predicted == told.predicted


def to_line(result: Result) -> str:
    return json.dumps(asdict(result))


def test_requests_longer_than_the_context_are_clipped_and_counted(demo_engine: Engine, tmp_path: Path) -> None:
    workload = replace(SMALL, input_len=Lengths("uniform", min=2030, max=2060), num_requests=3)
    (result,) = session(EngineTarget(demo_engine), tmp_path, workload)
    assert result.metrics["failed"] == 0
    assert result.metrics["clipped_requests"] == workload.sizes(2048)[1] > 0


def test_baseline_answers_the_same_requests_in_pairs(demo_engine: Engine, tmp_path: Path) -> None:
    engine, baseline = EngineTarget(demo_engine), TransformersTarget(demo_engine)
    (result,) = session(engine, tmp_path, SMALL, baseline=baseline)
    ours, theirs = result.metrics, result.metrics["against"]
    assert theirs["pairs"] == PAIRS
    assert theirs["ratio_min"] <= theirs["ratio"] <= theirs["ratio_max"]
    for name in ("completed", "total_input_tokens", "total_output_tokens", "clipped_requests"):
        assert ours[name] == theirs[name]
    assert ours["completed"] == PAIRS * 6
    assert theirs["max_concurrent_requests"] == 1


def test_ctrl_c_before_the_first_request_leaves_nothing(demo_engine: Engine, tmp_path: Path) -> None:
    class Interrupted(EngineTarget):
        async def __aenter__(self) -> Self:
            await super().__aenter__()
            signal.raise_signal(signal.SIGINT)
            await asyncio.sleep(0.1)  # the event loop hears of it
            return self

    for baseline in (None, TransformersTarget(demo_engine)):
        assert session(Interrupted(demo_engine), tmp_path, SMALL, baseline=baseline) == []
    assert not list(tmp_path.iterdir())


def test_baseline_generates_the_engines_tokens_one_at_a_time(demo_engine: Engine) -> None:
    asks = make_asks(SMALL, read_source(demo_engine.tokenizer.encode), 2048, "a")[:2]

    async def main() -> list[int]:
        async with TransformersTarget(demo_engine) as target:
            replies = await asyncio.gather(*map(target.send, asks))
        assert replies[0].chunks[-1].at <= replies[1].chunks[0].at
        return [len(reply.chunks) for reply in replies]

    assert asyncio.run(main()) == [8, 8]


def test_server_in_another_process_is_measured_like_the_engine(server: tuple[str, str], tmp_path: Path) -> None:
    url, key = server
    results = [session(HttpTarget(url, api_key=key), tmp_path, SMALL)[0] for _ in range(2)]
    for result in results:
        assert (result.metrics["completed"], result.metrics["failed"]) == (6, 0)
        assert result.metrics["total_output_tokens"] == 6 * 8
        assert result.metrics["total_input_tokens"] != result.metrics["requested_input_tokens"]  # prompts were text
    assert results[0].metrics["nonce"] != results[1].metrics["nonce"]  # the server may remember the first run


def test_a_target_that_fails_from_the_start_is_told_before_measuring(demo_engine: Engine, tmp_path: Path) -> None:
    target = EngineTarget(demo_engine)
    target.context = None  # as if the limit were unknown: the engine refuses what is too long
    with pytest.raises(ServerError, match="warm-up failed: the prompt has 3,000 tokens"):
        session(target, tmp_path, replace(SMALL, input_len=Lengths(mean=3000)))
    assert not list(tmp_path.iterdir())


def test_tables_show_every_figure_and_undefined_ones_as_a_dash(demo_engine: Engine, tmp_path: Path) -> None:
    single = replace(SMALL, output_len=Lengths(mean=1), num_requests=2)
    results = session(EngineTarget(demo_engine), tmp_path, SMALL, single)
    console = Console(width=200, record=True, file=io.StringIO())
    for part in show(results):
        console.print(part)
    text = console.export_text()
    assert "decode on engine (demo), concurrency 3: 6 requests in" in text
    assert "48 of 48 tokens out" in text
    assert "TTFT <= 60000 ms" in text
    assert "0 of 6 failed" in text
    assert "side by side" in text
    tpot = next(line.split() for line in text.splitlines()[15:] if line.split()[:1] == ["TPOT"])
    assert tpot == ["TPOT", "-", "-", "-", "-"]
