"""`llmopt train-heads` as it is typed: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmopt_cli.cli import app
from llmopt_cli.errors import UnknownNameError, UsageError
from llmopt_cli.runtime.speculative.heads import Heads
from llmopt_cli.spec.checkpoint import Checkpoint


def typed(*arguments: str) -> str:
    run = CliRunner().invoke(app, ["train-heads", *arguments], catch_exceptions=False)
    assert run.exit_code == 0
    return run.stdout


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Path:
    return tiny("Llama", hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1)


SMALL = ("--samples", "2", "--seq-len", "32", "--num-heads", "2", "--quiet")


@pytest.mark.parametrize("kind", ["medusa", "eagle"])
def test_what_is_written_is_what_is_printed(kind: str, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "heads"
    found = json.loads(typed(str(model), "--kind", kind, "--out", str(folder), "--json", *SMALL))
    assert found["path"] == str(folder)
    assert found["steps"] == found["planned"]
    assert [len(found["score"][name]) for name in ("accuracy", "tokens_per_step")] == [2, 2]
    assert all(1 <= tokens <= 3 for tokens in found["score"]["tokens_per_step"])
    assert Heads.open(folder, Checkpoint.open(model)).kind == kind


def test_people_read_a_table_and_what_to_type_next(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was a fine day, and nobody was at home. " * 30)
    folder = tmp_path / "heads"
    shown = typed(str(model), "--calibration", str(text), "--as-is", "--kind", "medusa", "-o", str(folder), *SMALL)
    assert "tokens a step with so many" in shown
    assert f"--spec-method medusa --spec-model {folder}" in shown
    with pytest.raises(UsageError, match="exists already"):
        typed(str(model), "--kind", "medusa", "-o", str(folder), *SMALL)


def test_what_it_refuses(model: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown kind of heads `hydra`"):
        typed(str(model), "--kind", "hydra")
    with pytest.raises(UsageError, match="--seq-len 999 is above the model's context of 256 tokens"):
        typed(str(model), "--seq-len", "999")
