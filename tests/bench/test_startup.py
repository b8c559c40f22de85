"""The start-up benchmark: real processes, one line; how long they take is for the line to say."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmopt_cli.bench import startup
from llmopt_cli.errors import LlmoptError
from llmopt_cli.spec.result import read_results


def test_start_up_adds_a_line_with_both_medians(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "REPEATS", 1)
    startup.startup(results=tmp_path)
    (result,) = read_results(tmp_path / "startup.jsonl")
    assert set(startup.COMMANDS) < set(result.metrics)
    assert all(result.metrics[name] > 0 for name in startup.COMMANDS)


def test_a_command_that_fails_is_no_measurement() -> None:
    with pytest.raises(LlmoptError, match=r"`llmopt estimate --model nobody` failed"):
        startup.wall_time(["estimate", "--model", "nobody"])
