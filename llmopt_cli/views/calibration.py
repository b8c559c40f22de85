"""What a calibration changed, as JSON and as tables. Computes nothing."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llmopt_cli.estimate.figures import plain
from llmopt_cli.output import lines, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from llmopt_cli.estimate.calibrate import Change, Outcome, Report

FIGURES = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "offline_tok_s": "output tokens/s"}


def data(report: Report) -> dict[str, Any]:
    """Everything; seconds and fractions as the constants' names say, errors as fractions."""
    return {
        "outcomes": [asdict(outcome) for outcome in report.outcomes],
        "skipped": dict(report.skipped),
        "file": str(report.file) if report.file else None,
    }


def render(report: Report) -> list[RenderableType]:
    """For each engine and machine what changed and what it is worth, then what was skipped."""
    parts = [part for outcome in report.outcomes for part in _outcome(outcome)]
    if not report.outcomes:
        parts.append("Nothing to learn from: no line holds a run of a known engine on a measured machine.")
    skipped = [(f"{count:,} x", reason) for reason, count in report.skipped.most_common()]
    if skipped:
        parts.append(f"\nSkipped lines\n{lines(skipped)}")
    return parts


def _outcome(outcome: Outcome) -> list[RenderableType]:
    runs = f"{outcome.runs} runs of {outcome.loads} loads"
    head = f"{outcome.engine} on {outcome.machine}: {runs}"
    if not outcome.kept:
        head += f". Nothing was changed: {outcome.reason}."
    parts: list[RenderableType] = [head]
    if outcome.changes:
        columns = ("constant", "before", "after")
        parts.append(table("", columns, [_change(change) for change in outcome.changes]))
    parts.append(table("median error", ("of", "before", "after", "of loads not seen"), _errors(outcome)))
    return parts


def _change(change: Change) -> tuple[str, str, str]:
    seconds = change.name.endswith("_s")
    before, after = (
        f"{plain(1e6 * value, 3)} us" if seconds else plain(value, 3) for value in (change.before, change.after)
    )
    return f"{change.what} ({change.name})", before, after


def _errors(outcome: Outcome) -> list[tuple[str, ...]]:
    columns = (outcome.before, outcome.after, outcome.left_out)  # nothing after, where nothing was fitted
    return [
        (name, *(f"{column[figure]:.0%}" if figure in column else "-" for column in columns))
        for figure, name in FIGURES.items()
    ]
