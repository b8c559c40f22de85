"""How long the command line takes to answer: `python -m llmopt_cli.bench.startup [--results DIR]` adds a line.

Wall time of whole processes, the median of several. What must be quick is what needs no torch: help and estimates.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import typer

from llmopt_cli.bench.record import RESULTS, ResultsOpt, keep
from llmopt_cli.errors import LlmoptError
from llmopt_cli.output import error_boundary
from llmopt_cli.spec.result import check_writable

COMMANDS = {"help_s": ["--help"], "estimate_s": ["estimate", "--model", "70b", "--gpu", "a100"]}
REPEATS = 7


def startup(results: ResultsOpt = RESULTS) -> None:
    """Measure the wall time of `llmopt --help` and `llmopt estimate`."""
    check_writable(results, "startup")
    metrics: dict[str, float] = {}
    for name, arguments in COMMANDS.items():
        times = [wall_time(arguments) for _ in range(REPEATS)]
        metrics |= {name: statistics.median(times), f"{name}_max": max(times)}
    keep("startup", "llmopt", metrics | {"repeats": REPEATS}, results)


def wall_time(arguments: list[str]) -> float:
    """Seconds from starting `llmopt` with `arguments` until it has ended; raises LlmoptError if it fails."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "llmopt_cli", *arguments], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise LlmoptError(f"`llmopt {' '.join(arguments)}` failed: {done.stderr.strip()[-300:]}")
    return seconds


if __name__ == "__main__":
    with error_boundary():
        typer.run(startup)
