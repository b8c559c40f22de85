"""`llmopt quantize` as it is typed: JSON on stdout, talk on stderr, exit codes, recipes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def llmopt(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "llmopt_cli", "quantize", *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"NO_COLOR": "1", "HF_HUB_OFFLINE": "1"},
        )

    return run


SMALL = ("--samples", "4", "--seq-len", "64", "--group-size", "32")
Run = Callable[..., subprocess.CompletedProcess[str]]


def test_json_is_one_document_and_names_what_was_written(
    llmopt: Run, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    run = llmopt(str(tiny("Llama")), *SMALL, "--json")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    folder = tmp_path / found["path"]
    assert folder.name == f"{tiny('Llama').name}-awq-w4g32"
    assert len(found["modules"]) == 14
    assert found["summary"].endswith(" fallback")
    assert found["bytes_after"] < found["bytes_before"]
    assert found["quality"]["kl_mean"]["low"] <= found["quality"]["kl_mean"]["value"]
    assert found.pop("seconds")["quantizing"] > 0  # not in the file: equal runs have equal files
    del found["path"]
    assert found == json.loads((folder / "quality.json").read_text())


def test_the_table_says_what_it_cost_and_what_to_type_next(llmopt: Run, tiny: Callable[..., Path]) -> None:
    run = llmopt(str(tiny("Llama")), *SMALL, "-o", "small", "--method", "rtn")
    assert run.returncode == 0, run.stderr
    for expected in ("14/14 RTN, 0 fallback", "perplexity, ratio to base", "top-1 agreement", "llmopt serve small"):
        assert expected in run.stdout
    assert "quantizing" in run.stderr
    assert "quantizing" not in run.stdout


def test_quiet_says_nothing_on_stderr(llmopt: Run, tiny: Callable[..., Path]) -> None:
    assert llmopt(str(tiny("Llama")), *SMALL, "--method", "rtn", "--quiet").stderr == ""


def test_a_recipe_names_the_method_and_a_flag_wins(llmopt: Run, tiny: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"model: {tiny('Llama')}\nscheme: rtn\n")
    from_file = llmopt("--recipe", "mine.yaml", *SMALL, "-o", "a", "--json")
    from_flag = llmopt("--recipe", "mine.yaml", "--method", "awq", *SMALL, "-o", "b", "--json")
    assert [json.loads(run.stdout)["scheme"]["method"] for run in (from_file, from_flag)] == ["rtn", "awq"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("demo", "--method", "awk"), 2, "unknown method `awk`"),
        (("demo", "-o", "."), 2, "exists already"),
        (("demo", "--group-size", "96"), 1, "256 inputs are no multiple of the group size 96"),
        (("demo", "--calibration", "nope.txt"), 2, "cannot read `nope.txt`"),
        (("demo", "--evaluation", "short.txt"), 2, "not two windows"),
    ],
)
def test_refusals_are_one_sentence_and_a_hint(
    arguments: tuple[str, ...], code: int, message: str, llmopt: Run, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("too short")
    run = llmopt(*arguments)
    assert run.returncode == code
    assert message in run.stderr
    assert "hint: " in run.stderr
    assert "Traceback" not in run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_the_coverage_of_experts_is_told(llmopt: Run, tiny: Callable[..., Path]) -> None:
    run = llmopt(str(tiny("Mixtral", num_local_experts=4)), *SMALL, "--method", "rtn")
    assert run.returncode == 0, run.stderr
    assert "experts     24 linears saw " in run.stdout
