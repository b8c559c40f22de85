"""A run that is stopped at any moment goes on where it was, and ends with the very bytes of one that was not."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Tiny = Callable[..., Path]
Command = Callable[..., list[str]]


@pytest.fixture
def command(tiny: Tiny, tmp_path: Path) -> Command:
    model = tiny("Llama", num_hidden_layers=4, hidden_size=128, intermediate_size=512)

    def make(*more: str) -> list[str]:
        size = ("--method", "gptq", "--samples", "32", "--seq-len", "128", "--group-size", "64", "--seed", "3")
        return [sys.executable, "-m", "llmopt_cli", "quantize", str(model), "-o", str(tmp_path / "out"), *size, *more]

    return make


def started(command: list[str]) -> subprocess.Popen[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def stop(command: list[str], moment: Path, number: int) -> str:
    """Start the command, send it a signal as soon as `moment` exists, and return what it said."""
    process = started(command)
    while not moment.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    process.send_signal(number)
    return process.communicate(timeout=120)[1]


def finish(command: list[str]) -> str:
    process = started(command)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    return ((path.name, path.read_bytes()) for path in sorted(folder.iterdir()))


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_makes_the_same_bytes(command: Command, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    moments = ("streams/base-0000", "streams/fitted-0001.tmp", "blocks/0001.json", "model/config.json")
    for moment in moments:
        stop(command(), partial / moment, signal.SIGKILL)
        assert partial.is_dir()
        assert not (tmp_path / "out").exists()
    assert (partial / "blocks" / "0003.json").exists()
    finish(command())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    resumed = dict(contents(tmp_path / "out"))
    finish(command("--overwrite"))
    assert resumed == dict(contents(tmp_path / "out"))


@pytest.mark.slow
def test_an_interrupt_keeps_what_is_done_and_another_run_needs_overwrite(command: Command, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    said = stop(command(), partial / "blocks" / "0000.json", signal.SIGINT)
    if (tmp_path / "out").exists():  # a machine that paused let it end before the signal came
        shutil.rmtree(tmp_path / "out")
        said = stop(command(), partial / "blocks" / "0000.json", signal.SIGINT)
    assert "error: interrupted; " in said
    assert "the same command goes on" in said
    assert "Traceback" not in said
    done = sorted((partial / "blocks").glob("*.json"))
    process = started([*command(), "--samples", "16"])
    _, refusal = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "holds an unfinished run with another samples" in refusal
    assert sorted((partial / "blocks").glob("*.json")) == done
    finish([*command(), "--samples", "16", "--overwrite"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
