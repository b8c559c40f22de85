"""The start-up benchmark: real processes, one line; how long they take is for the line to say."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmopt_cli.bench import startup
from llmopt_cli.errors import LlmoptError, UsageError
from llmopt_cli.spec.result import read_results


def test_start_up_adds_a_line_with_both_medians(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "REPEATS", 1)
    startup.startup(results=tmp_path)
    (result,) = read_results(tmp_path / "startup.jsonl")
    assert set(startup.COMMANDS) < set(result.metrics)
    assert all(result.metrics[name] > 0 for name in startup.COMMANDS)


def test_a_folder_that_cannot_be_written_is_told_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup, "COMMANDS", {"help_s": ["no-such-command"]})  # would fail if it ran
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot write"):
        startup.startup(results=tmp_path / "file")


def test_a_command_that_fails_is_no_measurement() -> None:
    with pytest.raises(LlmoptError, match=r"`llmopt estimate --model nobody` failed"):
        startup.wall_time(["estimate", "--model", "nobody"])
