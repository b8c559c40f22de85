"""One line of a benchmark that stands apart from `llmopt bench`: kept in a results folder, told on the terminal.

Knows neither what was measured nor how.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from llmopt_cli.bench.environment import fingerprint
from llmopt_cli.output import Output, lines
from llmopt_cli.spec.result import Result

ResultsOpt = Annotated[Path, typer.Option("--results", help="Folder to which the line is added.")]
TraceArg = Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The file of recorded requests.")]
RESULTS = Path("results")


def keep(verb: str, target: str, metrics: Mapping[str, Any], results: Path, seed: int = 0, **nouns: Any) -> None:
    """Add the line `verb` to `results`; `nouns` are its recipe and workload. May raise UsageError."""
    out = Output()
    line = Result(verb, target, _command(verb), seed, fingerprint(), metrics, **nouns)
    path = line.save(results)
    out.result(metrics, lambda: lines([(name, _shown(value)) for name, value in metrics.items()]))
    out.note(f"added to {path}")


def _command(verb: str) -> str:
    """What was typed, without the folders of this machine."""
    given = [re.sub(r"(^|=)(\.\.)?/(.*/)?", r"\1", part) for part in sys.argv[1:]]
    return shlex.join(["python", "-m", f"llmopt_cli.bench.{verb}", *given])


def _shown(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
