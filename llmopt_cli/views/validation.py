"""How a validation looks: as JSON and as tables of errors. Computes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmopt_cli.estimate.figures import plain
from llmopt_cli.output import lines, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from llmopt_cli.estimate.validate import Outcome, Summary, Validation

WORST = 12
COLUMNS = ("rows", "median error", "bias", "in the band")


def data(found: Validation) -> dict[str, Any]:
    """kind -> figure -> errors in percent, rows, and the share of rows inside the stated band."""
    summaries: dict[str, Any] = {"dense": {}, "moe": {}, "memory": {}}
    for (kind, figure), summary in found.by(lambda outcome: (outcome.case.kind, outcome.case.figure)).items():
        summaries[kind][figure] = {
            "median_ape": round(100 * summary.median_error, 2),
            "bias": round(100 * summary.bias, 2),
            "rows": summary.rows,
            "covered": None if summary.covered is None else round(summary.covered, 3),
        }
    return {**summaries, "rows": len(found.outcomes), "skipped": dict(found.skipped.most_common())}


def render(found: Validation) -> list[RenderableType]:
    """The same by figure, engine, GPU and precision, the worst rows, and what was skipped."""
    timed = type(found)(tuple(one for one in found.outcomes if one.case.kind != "memory"), found.skipped)
    skipped = sum(found.skipped.values())
    return [
        f"{len(found.outcomes)} published figures replayed, {skipped} skipped. An error is |estimated / measured - 1|.",
        _table("\nBy figure", "figure", found.by(lambda one: f"{one.case.kind}: {one.case.figure}")),
        _table("Time by engine", "engine", timed.by(lambda one: f"{one.case.on.engine.name}: {one.case.figure}")),
        _table("Time by GPU", "GPU", timed.by(lambda one: one.case.on.hardware.name)),
        _table("Time by precision", "precision", timed.by(lambda one: one.case.on.scheme.name)),
        _worst(found.worst(WORST)),
        *_skipped(found),
    ]


def _table(title: str, first: str, summaries: Mapping[str, Summary]) -> RenderableType:
    rows = [
        (
            name,
            f"{summary.rows:,}",
            f"{summary.median_error:.1%}",
            f"{summary.bias:+.1%}",
            "" if summary.covered is None else f"{summary.covered:.0%}",
        )
        for name, summary in summaries.items()
    ]
    return table(title, (first, *COLUMNS), rows)


def _worst(outcomes: list[Outcome]) -> RenderableType:
    rows = [
        (
            f"{one.case.row['id']}: {one.case.row['model']} on {one.case.row['gpu']}, {one.case.row['engine']}",
            one.case.figure,
            plain(one.case.value, 4),
            plain(one.predicted, 4),
        )
        for one in outcomes
    ]
    return table("Furthest off", ("row", "figure", "measured", "estimated"), rows)


def _skipped(found: Validation) -> list[RenderableType]:
    if not found.skipped:
        return []
    return ["Skipped:", lines([(f"{count:,}", reason) for reason, count in found.skipped.most_common()])]
