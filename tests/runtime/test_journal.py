"""The scheduler's log: a real engine's run replays to the same plans, and a changed one is found out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmopt_cli.errors import ConfigFileError
from llmopt_cli.runtime import Engine, SamplingParams
from llmopt_cli.runtime.journal import replay
from llmopt_cli.spec.recipe import Batching


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Requests that share prefixes, are preempted, aborted and late, on a cache for three of them."""
    path = tmp_path_factory.mktemp("log") / "schedule.jsonl"
    batching = Batching(max_num_seqs=6, block_size=4, max_model_len=96, kv_cache_memory_bytes=72 * 4 * 3072)
    engine = Engine.from_pretrained("demo", dtype="bfloat16", device="cpu", batching=batching)
    engine.record(path)
    head = list(range(20, 40))
    for index in range(8):
        params = SamplingParams(max_tokens=50, ignore_eos=True, max_seconds=0 if index == 5 else None)
        engine.add_request([*head[: 4 * index], 100 + index], params, f"r{index}")
    engine.step()
    engine.abort("r2")
    while engine.has_work():
        engine.step()
    engine.reset_prefix_cache()
    engine.generate([head], SamplingParams(max_tokens=3, prompt_logprobs=0))
    assert engine.stats().num_preemptions > 0
    assert engine.stats().prefix_cache_hits > 0
    engine.close()
    return path


def test_a_run_replays_to_the_same_plans(log: Path) -> None:
    found = replay(log)
    assert found.difference is None
    assert (found.requests, found.preemptions > 0, found.most_running > 2) == (9, True, True)
    assert found.plans > 50


def test_another_plan_is_found_out(log: Path, tmp_path: Path) -> None:
    lines = log.read_text().splitlines()
    number, plan = next((n, json.loads(line)) for n, line in enumerate(lines) if '"plan"' in line and n > 20)
    plan["chunks"][0][2] += 1
    changed = tmp_path / "changed.jsonl"
    changed.write_text("\n".join([*lines[:number], json.dumps(plan), *lines[number + 1 :]]))
    assert f"line {number + 1}: logged" in str(replay(changed).difference)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("{", "cannot read the log"),
        ('{"event": "plan"}', "line 1 is no line of a scheduler's log"),
        ('{"event": "begin", "limits": {"max_num_seqs": 0}, "num_blocks": 1, "share_prefixes": true}', "line 1 is no"),
        ("[1]", "line 1 is no"),
    ],
)
def test_what_is_no_log_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wrong.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigFileError, match=message):
        replay(path)
    with pytest.raises(ConfigFileError, match="cannot read"):
        replay(tmp_path / "nowhere.jsonl")
