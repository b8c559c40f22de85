"""The benchmarks that stand alone: each runs small, adds its line, and its figures are what they say."""

from __future__ import annotations

import csv
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from llmopt_cli.bench import host_overhead
from llmopt_cli.bench.batch_baseline import GenerateBatchTarget
from llmopt_cli.bench.batching import batching
from llmopt_cli.bench.environment import fingerprint
from llmopt_cli.bench.kv_policies import kv_policies
from llmopt_cli.bench.kv_waste import kv_waste
from llmopt_cli.bench.prefix_hits import ideal, prefix_hits
from llmopt_cli.bench.report import index
from llmopt_cli.bench.run import Session
from llmopt_cli.bench.speculation import ratio, speculation
from llmopt_cli.bench.targets import EngineTarget
from llmopt_cli.errors import UsageError
from llmopt_cli.runtime import Engine
from llmopt_cli.spec.recipe import Recipe
from llmopt_cli.spec.result import read_results
from llmopt_cli.spec.trace import TracedRequest
from llmopt_cli.spec.workload import Lengths, Workload


def azure(file: Path, sizes: list[tuple[int, int]]) -> Path:
    with file.open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["TIMESTAMP", "ContextTokens", "GeneratedTokens"])
        rows.writerows((f"2023-11-16 18:15:{at:02}.0000000", *size) for at, size in enumerate(sizes))
    return file


def test_waste_is_the_empty_part_of_the_blocks_that_are_held(tmp_path: Path) -> None:
    # One request at a time: 100 tokens in 7 blocks of 16, then 101 and so on up to 111 of 112.
    trace = azure(tmp_path / "trace.csv", [(100, 12), (100, 12)])
    kv_waste(trace, tmp_path, block_size=16)
    (result,) = read_results(tmp_path / "kv_waste.jsonl")
    assert 1 - 111 / 112 < result.metrics["waste"] < 1 - 100 / 112
    assert result.metrics["contiguous_waste"] == pytest.approx(1 - 105.5 / 4096, abs=0.01)
    assert "of the held slots are empty in pages of 16" in index(tmp_path)


def test_policies_beat_the_last_tokens_and_stream_in_constant_memory(tmp_path: Path) -> None:
    kv_policies(tmp_path, "demo", tokens=2048, texts=1, share=0.25)
    (result,) = read_results(tmp_path / "kv_policies.jsonl")
    streamed, selected = result.metrics["streamed"], result.metrics["selected"]
    assert 0.9 < streamed["to_alone"] < 1.2
    assert len(set(streamed["blocks_by_sixteenth"])) == 1
    assert selected["recall"] == {"full": 1, "snapkv": 1, "pyramidkv": 1, "last": 0}
    assert 0 == selected["kl"]["full"] < selected["kl"]["snapkv"] < selected["kl"]["last"]
    assert "at most 81 blocks" in index(tmp_path)


def test_hits_are_the_blocks_that_earlier_prompts_brought(tmp_path: Path) -> None:
    lines = [
        {"timestamp": 0, "input_length": 1100, "output_length": 4, "hash_ids": [1, 2, 3]},
        {"timestamp": 60_000, "input_length": 1100, "output_length": 4, "hash_ids": [1, 2, 4]},
        {"timestamp": 120_000, "input_length": 1600, "output_length": 4, "hash_ids": [1, 5, 6, 7]},
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(map(json.dumps, lines)))
    prefix_hits(trace, tmp_path)
    (result,) = read_results(tmp_path / "prefix_hits.jsonl")
    assert result.metrics["hit_rate"] == (1024 + 512) / 3800 == result.metrics["ideal_hit_rate"]


def test_the_ideal_counts_whole_beginnings_only() -> None:
    requests = [TracedRequest(0, 1000, 1, (1, 2)), TracedRequest(1, 1000, 1, (1, 2)), TracedRequest(2, 900, 1, (9, 2))]
    assert ideal(requests) == 1000


def test_a_trace_without_hashes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="which prompts begin alike"):
        prefix_hits(azure(tmp_path / "trace.csv", [(100, 12)]), tmp_path)


def test_host_overhead_parts_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_overhead, "QUEUES", (0, 100_000 // 1000))
    host_overhead.host_overhead(tmp_path, requests=4, steps=3, model="demo")
    (result,) = read_results(tmp_path / "host_overhead.jsonl")
    found = result.metrics
    parts = (found["host_us"] + found["text_us"] + found["sample_us"]) * found["requests"] / 1e3
    assert 0 < parts < found["step_ms"]
    assert set(found["host_us_by_queue"]) == {"0", "100"}


def test_drafts_are_raced_against_none_by_text_and_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{speculation.__module__}.ANSWER", 24)
    text = tmp_path / "text.txt"
    text.write_text("One two three four. " * 100)
    speculation([f"counting={text}"], ["ngram", "suffix"], [1, 2], pairs=2, adaptive=False, results=tmp_path)
    found = read_results(tmp_path / "speculation.jsonl")
    assert [one.metrics["drafts"] for one in found] == ["ngram", "suffix"]
    for metrics in (one.metrics for one in found):
        cells = {(cell["text"], cell["batch"]): cell for cell in metrics["found"]}
        assert cells.keys() == {(text, batch) for text in ("repetitive", "counting") for batch in (1, 2)}
        assert cells["counting", 1]["tokens_per_step"] > 1
        assert all(cell["tokens_per_s"] > 0 < cell["tokens_per_s_without"] for cell in cells.values())
        assert metrics["slowest"] == min(cell["ratio"] for cell in cells.values()) <= metrics["fastest"]
    assert "suffix: " in index(tmp_path)


def test_the_ratio_is_that_of_typical_pairs() -> None:
    found = ratio([(100.0, 150.0)] * 9 + [(100.0, 10.0)])  # the machine paused once
    assert found["ratio"] == found["high"] == pytest.approx(1.5)
    assert found["low"] < 0.5  # ten pairs are too few to leave it out
    assert ratio([(100.0, 100.0 + each) for each in range(-10, 11)])["low"] < 0.98


def test_ways_to_batch_are_compared_on_the_same_requests(tmp_path: Path) -> None:
    batching(tmp_path, requests=2, concurrency=2, rounds=1)
    (result,) = read_results(tmp_path / "batching.jsonl")
    assert set(result.metrics["tokens_per_s"]) == {"continuous", "static", "none"}
    assert "one by one" in index(tmp_path)


def test_generate_batch_answers_the_same_requests_at_once(demo_engine: Engine, tmp_path: Path) -> None:
    workload = Workload.read("decode").with_load(concurrency=2)
    small = replace(workload, num_requests=2, warmup=0, output_len=Lengths(mean=6))
    session = Session(
        EngineTarget(demo_engine),
        [small],
        Recipe(),
        fingerprint(),
        "llmopt bench",
        tmp_path,
        GenerateBatchTarget(demo_engine),
    )
    (result,) = session.run(lambda label: nullcontext(lambda done, total: None))
    against = result.metrics["against"]
    assert (against["target"], against["load"]) == ("generate_batch", "concurrency 2")
    assert against["failed"] == 0
    assert against["total_output_tokens"] == result.metrics["total_output_tokens"]
