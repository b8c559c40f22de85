"""`llmopt replay`: run the scheduler over the log of a server, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmopt_cli.errors import LlmoptError
from llmopt_cli.options import JsonOpt
from llmopt_cli.output import Output, lines

LogArg = Annotated[Path, typer.Argument(metavar="LOG", help="What `llmopt serve --schedule-log LOG` wrote.")]


def replay(log: LogArg, as_json: JsonOpt = False) -> None:
    """Plan again what a log says was planned, without a model; exit code 1 at the first plan that differs."""
    from dataclasses import asdict

    from llmopt_cli.runtime.journal import replay as run

    found = run(log)
    rows = [
        ("requests", f"{found.requests:,}, at most {found.most_running:,} at once"),
        ("steps", f"{found.plans:,} with {found.tokens:,} tokens, {found.preemptions:,} preemptions"),
        ("plans", "all as logged" if found.difference is None else "one differs"),
    ]
    Output(as_json=as_json).result(asdict(found), lambda: lines(rows))
    if found.difference:
        raise LlmoptError(f"the scheduler plans differently now: {found.difference}")
