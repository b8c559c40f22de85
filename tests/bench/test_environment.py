"""The fingerprint, and when it warns."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from llmopt_cli.bench.environment import _commit, fingerprint, spinning
from llmopt_cli.spec.result import Environment


def test_fingerprint_says_what_a_figure_depends_on() -> None:
    found = fingerprint()
    assert datetime.fromisoformat(found.date).tzinfo is not None
    assert found.threads == torch.get_num_threads()
    assert found.versions["torch"] == version("torch")
    assert found.cores >= 1
    assert found.memory > 2**28
    assert found.cpu
    assert Environment(**json.loads(json.dumps(asdict(found)))) == found


@pytest.mark.parametrize(
    ("threads", "load", "warned"), [(2, 0.3, False), (2, 1.0, True), (1, 1.0, False), (1, 2.5, True), (4, 0.0, True)]
)
def test_a_busy_machine_is_said_to_be_one(threads: int, load: float, warned: bool) -> None:
    environment = replace(fingerprint(), cores=2, threads=threads, load_average=load)
    message = spinning(environment)
    assert (message is not None) == warned
    assert message is None or ("OMP_NUM_THREADS=1" in message) == (threads > 1)


def test_commit_is_that_of_the_checkout_and_tells_changes(tmp_path: Path) -> None:
    assert _commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "one"]):
        subprocess.run([*git, *arguments], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    found = _commit(tmp_path)
    assert found is not None
    assert len(found) == 12
    assert head.startswith(found)
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    assert _commit(tmp_path) == f"{found}-dirty"


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _commit(tmp_path) is None
